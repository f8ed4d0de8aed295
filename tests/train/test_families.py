"""Every family trains, stops, goes on, and leaves weights that transformers reads as the same model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from tests.train.conftest import LocalRun
from titan_slurm.run.directory import RunDirectory
from titan_slurm.train import cpu

# Before torchtitan is first imported, whichever test does it.
cpu.install()

from transformers import AutoModelForCausalLM  # noqa: E402

from titan_slurm.train.models import model_spec  # noqa: E402

LENGTH = 64
# Experts compute in bf16 whatever the recipe says (torchtitan).
EXACT, BF16 = 1e-5, 3e-3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LocalRun:
    """A Llama that has trained for 21 steps and was exported."""
    return trained_and_exported(tmp_path_factory.mktemp("runs"), "llama3_debug")


@pytest.mark.parametrize(
    ("recipe", "tolerance"),
    [
        ("qwen3_debug", EXACT),
        ("gemma3_debug", EXACT),
        ("qwen3_moe_debug", BF16),
        ("deepseek_v3_debug", BF16),
    ],
)
def test_a_family(tmp_path: Path, recipe: str, tolerance: float) -> None:
    check_export(trained_and_exported(tmp_path, recipe), tolerance)


def test_the_llama(llama: LocalRun) -> None:
    check_export(llama, EXACT)
    # A second time there is nothing to do.
    assert "has done all of its 21 steps" in llama.submit("--resume", code=2)


def test_a_run_begins_with_exported_weights(llama: LocalRun, tmp_path: Path) -> None:
    folder = llama.run.export_folder / "step-21"
    # At a rate that changes nothing, each step's loss is the weights' own.
    tuned = LocalRun(
        tmp_path / "tuned", f"model.initial_weights={folder}", "optimizer.lr=1e-30", "training.max_steps=22"
    )
    tuned.train()
    tuned.train("training.max_steps=23")
    llama.train("training.max_steps=22", "checkpointing.export_to_hf=false")
    # The same data at the same step: here for the first time, there after all others.
    assert tuned.losses()[22] == pytest.approx(llama.losses()[22], rel=1e-5)
    assert tuned.losses()[1] < llama.losses()[1] - 1
    # Once it has checkpoints of its own, it goes on from those.
    assert f"Loading the checkpoint from {folder}" in tuned.run.attempts()[0].log_file(0).read_text()
    assert f"Loading the checkpoint from {tuned.checkpoints / 'step-22'}" in tuned.log()


def trained_and_exported(folder: Path, recipe: str) -> LocalRun:
    """A run of 21 steps, of which the second half was computed twice: the newest checkpoint was lost between."""
    run = LocalRun(folder / "mine", "checkpointing.save_interval=10", recipe=recipe)
    run.train("training.max_steps=20")
    before = run.losses()
    assert list(before) == list(range(1, 21))
    # Untrained, it knows nothing of its 2048 tokens.
    assert before[1] == pytest.approx(7.9, abs=0.5)
    assert before[20] < before[1] - 1
    shutil.rmtree(run.checkpoints / "step-20")
    run.train("training.max_steps=21", "checkpointing.export_to_hf=true")
    after = run.losses(attempt=2)
    assert list(after) == list(range(11, 22))
    assert {step: after[step] for step in range(11, 21)} == {step: before[step] for step in range(11, 21)}
    return run


def check_export(run: LocalRun, tolerance: float) -> None:
    """Its last checkpoint and what transformers reads of its export are one model."""
    folder = run.run.export_folder / "step-21"
    assert {path.name for path in run.run.export_folder.iterdir()} == {"step-21"}
    names = {path.name for path in folder.iterdir()}
    weights = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert names == weights | {"config.json", "tokenizer.json", "tokenizer_config.json"}
    model, biases = last_checkpoint(run.run)
    reference, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with safe_open(folder / "model-00001-of-00001.safetensors", framework="pt") as file:
        stored = set(file.keys())
    if biases and not any(name.endswith("e_score_correction_bias") for name in stored):
        # Of the router's balance this format knows nothing, and the log says so.
        assert "may send tokens to other experts" in run.log()
        for bias in biases:
            bias.zero_()
    inputs = torch.randint(0, 2048, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(inputs, positions=torch.arange(LENGTH).repeat(2, 1))
        expected = reference(inputs).logits
    errors = (logits - expected).abs().amax(dim=-1) / expected.abs().max()
    # Where two experts suit a token alike, a last bit decides which of them computes it.
    assert float(errors.quantile(0.8 if tolerance == BF16 else 1.0)) < tolerance
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def last_checkpoint(run: RunDirectory) -> tuple[Any, list[torch.Tensor]]:
    """The model of a run's last checkpoint on this one process, and the biases by which its experts are balanced."""
    spec = model_spec(run.plan().model)
    cpu.use_attention_with_backward(spec.model)
    model = spec.model.build()
    with torch.no_grad():
        model.init_states()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(run.checkpoints_folder / "step-21"))
    model.load_state_dict(state)
    return model.eval(), [buffer for name, buffer in model.named_buffers() if "expert_bias" in name]
