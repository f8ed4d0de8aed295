"""What a recipe costs: each word moves the part of the estimate that it is about, and what is said to help does."""

from typing import Any

import pytest

from titan_slurm.recipe.estimate import Estimate, estimate
from titan_slurm.recipe.gpus import GPUS, find_gpu
from titan_slurm.recipe.memory import Memory
from titan_slurm.recipe.resolve import parse_set, resolve

BASE = (
    "model.flavor=8B",
    "data.tokenizer=python_docs",
    "training.seq_len=8192",
    "training.batch_size=4",
    "training.global_batch_size=512",
    "training.mixed_precision=bf16",
    "training.max_steps=1000",
    "checkpointing.save_interval=100",
    "memory.activation_checkpointing=none",
    "slurm.nodes=2",
    "slurm.gpus_per_node=8",
    "slurm.tasks_per_node=8",
)


def cost_of(*settings: str, gpu: str | None = None) -> Estimate:
    resolved = resolve("llama3_debug", [parse_set(text) for text in (*BASE, *settings)], {})
    found = GPUS[gpu] if gpu else None
    return estimate(resolved.recipe, resolved.layout, found, torchtitan=resolved.torchtitan)


def memory_of(*settings: str) -> Memory:
    taken = cost_of(*settings).memory
    assert taken is not None
    return taken


def test_weights_gradients_and_optimizer_are_spread_over_the_ranks() -> None:
    cost, taken = cost_of(), memory_of()
    assert cost.parameters is not None
    share = cost.parameters * 4 / 16
    assert taken.gradients == pytest.approx(share)
    assert taken.optimizer == pytest.approx(2 * share)
    # Beside the weights stand the tables of the rotary embedding: 32 layers × 8192 positions × 64 complex numbers.
    assert taken.weights == pytest.approx(share + 32 * 8192 * 64 * 8)
    assert taken.total == sum(taken.parts().values())


@pytest.mark.parametrize(
    ("settings", "less_of"),
    [
        (("slurm.nodes=4",), ("weights", "gradients", "optimizer")),
        (("training.dtype=bf16",), ("weights", "gradients", "optimizer")),
        (("training.batch_size=2",), ("activations", "loss")),
        (("training.seq_len=4096",), ("activations", "loss")),
        (("memory.activation_checkpointing=selective",), ("activations",)),
        (("parallelism.tensor_parallel=2",), ("activations", "loss", "fsdp")),
        (("parallelism.context_parallel=2",), ("activations", "loss")),
        (("compile.enabled=true",), ("activations", "loss")),
        (("torchtitan.loss.num_chunks=16",), ("loss",)),
        (("memory.cpu_offload=true",), ("weights", "gradients", "optimizer")),
    ],
    ids=lambda each: " ".join(each),
)
def test_what_saves_memory_saves_it_where_it_should(settings: tuple[str, ...], less_of: tuple[str, ...]) -> None:
    before, after = memory_of(), memory_of(*settings)
    assert after.total < before.total
    for part in less_of:
        assert getattr(after, part) < getattr(before, part), part


@pytest.mark.parametrize("settings", [(), ("compile.enabled=true",), ("parallelism.tensor_parallel=8",)], ids=str)
def test_each_mode_of_activation_checkpointing_keeps_less_than_the_one_before(settings: tuple[str, ...]) -> None:
    modes = ("none", "selective", "full")
    kept = [memory_of(*settings, f"memory.activation_checkpointing={mode}").activations for mode in modes]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(modes)


def test_a_memory_budget_lies_between_none_and_full() -> None:
    def kept(mode: str, *more: str) -> int:
        return memory_of("compile.enabled=true", f"memory.activation_checkpointing={mode}", *more).activations

    half = kept("memory_budget")
    assert kept("full") < half < kept("none")
    path = "torchtitan.activation_checkpoint.memory_budget"
    assert kept("memory_budget", f"{path}=0.25") < half < kept("memory_budget", f"{path}=0.75")


def test_what_costs_memory_costs_it() -> None:
    before = memory_of()
    assert memory_of("parallelism.reshard_after_forward=never").fsdp > before.fsdp
    assert memory_of("parallelism.data_parallel_replicate=2").optimizer > before.optimizer
    assert memory_of("training.mixed_precision=fp32").activations > before.activations


def test_a_pipeline_holds_its_microbatches_and_whole_gradients_of_its_stage() -> None:
    piped = ("parallelism.pipeline_parallel=4", "training.batch_size=16", "memory.activation_checkpointing=full")
    one_at_a_time, all_at_once = (
        memory_of(*piped, f"parallelism.pipeline_schedule={name}") for name in ("1F1B", "GPipe")
    )
    assert all_at_once.activations > 2 * one_at_a_time.activations
    # Weights of a quarter of the model in bf16, and its gradients in fp32, are not spread over the ranks meanwhile.
    assert one_at_a_time.fsdp > 8.03e9 / 4 * 0.9 * (2 + 4)


def test_experts_are_spread_by_expert_parallelism() -> None:
    moe = ("model.name=qwen3", "model.flavor=30B-A3B", "training.batch_size=1", "memory.activation_checkpointing=full")
    together, apart = memory_of(*moe), memory_of(*moe, "parallelism.expert_parallel=8")
    assert apart.fsdp < together.fsdp / 2
    # Whatever the split, each rank has a sixteenth of all states.
    assert apart.optimizer == pytest.approx(together.optimizer)


def test_offloaded_states_are_counted_on_the_host() -> None:
    cost = cost_of("memory.cpu_offload=true")
    assert cost.parameters is not None
    assert cost.host_bytes_per_gpu == pytest.approx(cost.parameters * 16 / 16, rel=1e-6)


def test_checkpoints_tokens_and_time() -> None:
    cost = cost_of("checkpointing.keep_latest=3", gpu="H100")
    assert cost.parameters is not None and cost.checkpoint_bytes is not None
    assert cost.checkpoint_bytes == cost.parameters * 12
    assert cost.disk_bytes == 4 * cost.checkpoint_bytes
    assert cost_of("checkpointing.keep_latest=0").disk_bytes == 10 * cost.checkpoint_bytes
    assert cost.tokens == 512 * 8192 * 1000
    assert cost.flops_per_token is not None and cost.seconds is not None and cost.tokens_per_second is not None
    assert cost.tokens_per_second * cost.flops_per_token == pytest.approx(16 * 989e12 * 0.4)
    assert cost.seconds * cost.tokens_per_second == pytest.approx(cost.tokens)


def test_cpus_have_neither_gpu_memory_nor_speed() -> None:
    resolved = resolve("llama3_debug", [], {})
    cost = estimate(resolved.recipe, resolved.layout, GPUS["H100"])
    assert (cost.memory, cost.seconds, cost.fits) == (None, None, None)
    assert cost.checkpoint_bytes == 6_163_712 * 12


@pytest.mark.parametrize(
    ("gpu", "settings"),
    [("H100", ()), ("A100-40", ()), ("A100-40", ("training.batch_size=1", "slurm.nodes=1"))],
    ids=str,
)
def test_what_is_said_to_help_helps(gpu: str, settings: tuple[str, ...]) -> None:
    cost = cost_of(*settings, gpu=gpu)
    assert cost.fits is False and cost.would_fit
    for change in cost.would_fit:
        helped = cost_of(*settings, change.replace(" ", ""), gpu=gpu)
        assert helped.fits, change
        assert helped.tokens == cost.tokens


def test_where_no_change_is_enough_the_best_one_is_named() -> None:
    cost = cost_of("model.flavor=405B", "training.batch_size=1", "slurm.nodes=1", gpu="A100-40")
    assert len(cost.would_fit) == 1
    assert cost.would_fit[0].startswith("not by one change; ")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("h100", "H100"),
        ("nvidia_h100_80gb_hbm3", "H100"),
        ("A100", "A100-80"),
        ("nvidia_a100-sxm4-40gb", "A100-40"),
        ("mi300x", "MI300X"),
        ("gpu", None),
    ],
)
def test_gpus_are_known_by_the_names_that_sites_give_them(name: str, found: Any) -> None:
    gpu = find_gpu(name)
    assert (gpu and gpu.name) == found
