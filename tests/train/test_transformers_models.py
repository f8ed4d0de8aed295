"""A model of transformers computes, begins and is read here as transformers itself does it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_slurm.recipe import hf_config
from titan_slurm.train import cpu

# Before torchtitan is first imported, whichever test does it.
cpu.install()

from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration  # noqa: E402

from titan_slurm.train.transformers_models import TransformersAdapter, TransformersModel, spec  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA_3 = {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "rope_theta": 1e6,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# Every window is shorter than a sequence.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 5e5, "rope_scaling": LLAMA_3 | {"original_max_position_embeddings": 64}},
    "llama-with-biases-and-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "mistral-without-window": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 9},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6},
    "gemma3_text": GEMMA_3,
}
LENGTH = 48
each_kind = pytest.mark.parametrize("kind", KINDS)


def contents_of(kind: str) -> dict[str, Any]:
    """What would stand in a config.json."""
    return {"model_type": kind.split("-")[0]} | SMALL | KINDS[kind]


def ours(contents: dict[str, Any]) -> TransformersModel:
    """The model as a rank makes it: without memory first."""
    config = spec(hf_config.load(contents)).model
    config.max_seq_len = LENGTH
    with torch.device("meta"):
        model: TransformersModel = config.build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_states()
    return model


def theirs(contents: dict[str, Any]) -> Any:
    """The same model as transformers makes it, with the attention that its authors wrote down."""
    config = AutoConfig.for_model(**contents)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).eval()


def weights_of(model: TransformersModel) -> dict[str, torch.Tensor]:
    """By transformers' names."""
    weights: dict[str, torch.Tensor] = TransformersAdapter(model.config, None).to_hf(model.state_dict())
    return weights


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def tokens() -> torch.Tensor:
    # Without 0: Gemma's padding, whose embedding transformers gives no gradient.
    return torch.randint(1, SMALL["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))


@each_kind
def test_logits_and_gradients_are_those_of_transformers(kind: str) -> None:
    torch.manual_seed(0)
    model, reference = ours(contents_of(kind)), theirs(contents_of(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.08)
    reference.load_state_dict(weights_of(model), strict=not reference.config.tie_word_embeddings)
    inputs = tokens()
    logits = model(inputs, positions=torch.arange(LENGTH).repeat(2, 1))
    expected = reference(inputs).logits
    assert distance(logits, expected) < 1e-5

    weighting = torch.randn_like(expected)
    (logits * weighting).sum().backward()
    (expected * weighting).sum().backward()
    gradients = {name.removeprefix("model."): parameter.grad for name, parameter in model.named_parameters()}
    wanted = dict(reference.named_parameters())
    assert gradients.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert distance(gradients[name], parameter.grad) < 1e-5, name

    # Packed into one sequence, documents are as by themselves.
    cut = 20
    positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)]).repeat(2, 1)
    packed = model(inputs, positions=positions)
    alone = torch.cat([reference(inputs[:, :cut]).logits, reference(inputs[:, cut:]).logits], dim=1)
    assert distance(packed, alone) < 1e-5


@each_kind
def test_weights_begin_as_in_transformers(kind: str) -> None:
    torch.manual_seed(0)
    model, reference = ours(contents_of(kind)), theirs(contents_of(kind))
    begun, wanted = weights_of(model), dict(reference.named_parameters())
    assert begun.keys() == wanted.keys()
    for name, parameter in wanted.items():
        if "norm" in name or "bias" in name:
            assert torch.equal(begun[name], parameter), name
        else:
            assert begun[name].std().item() == pytest.approx(parameter.std().item(), rel=0.05), name
            assert abs(begun[name].mean().item()) < 0.005, name
    assert sum(each.numel() for each in model.parameters()) == sum(each.numel() for each in reference.parameters())


@pytest.mark.parametrize("kind", hf_config.DEFAULTS)
def test_what_is_left_out_is_what_transformers_takes(kind: str) -> None:
    given = {name: SMALL[name] for name in hf_config._SIZES}
    config = AutoConfig.for_model(kind, **given | {"num_attention_heads": 32})
    contents = hf_config.load({"model_type": kind} | given | {"num_attention_heads": 32})
    derived = {"num_key_value_heads": 32, "head_dim": SMALL["hidden_size"] // 32}
    for name in hf_config.DEFAULTS[kind]:
        if hasattr(config, name):
            wanted = getattr(config, name)
            assert contents[name] == (derived[name] if wanted is None else wanted), name
    kinds = getattr(config, "layer_types", None)
    if kinds:
        assert hf_config.layer_types(contents) == kinds


def test_a_composite_models_language_model_is_found_in_its_weights(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {name: value for name, value in (SMALL | GEMMA_3).items() if name != "model_type"}
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
        )
    )
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    model = ours({"model_type": "gemma3", "text_config": hf_config.load(str(tmp_path))})
    adapter = TransformersAdapter(model.config, None)
    state = adapter.to_hf(model.state_dict())
    dcp.load(state, storage_reader=adapter.get_hf_storage_reader(str(tmp_path)))
    model.load_state_dict(adapter.from_hf(state))

    inputs = tokens()
    expected = whole.eval()(input_ids=inputs).logits
    assert distance(model(inputs, positions=torch.arange(LENGTH).repeat(2, 1)), expected) < 1e-5
