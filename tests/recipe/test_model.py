"""Parameters, counted by numbers alone, against those of the models that are trained: built on the meta device."""

from typing import Any

import pytest
import torch
import transformers

from titan_slurm.recipe.mapping import torchtitan_schema
from titan_slurm.recipe.model import ModelSizes, model_sizes
from titan_slurm.recipe.schema import ModelSection, Recipe

SMALL = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
CONFIGURATIONS: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    {"model_type": "mistral"},
    {"model_type": "gemma"},
    {"model_type": "gemma2", "attention_bias": True},
    {"model_type": "gemma3_text"},
    {"model_type": "qwen2"},
    {"model_type": "qwen3", "tie_word_embeddings": True},
]


def sizes_of(**model: Any) -> ModelSizes:
    sizes = model_sizes(Recipe(model=ModelSection(**model)))
    assert sizes is not None
    return sizes


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: "-".join(map(str, each.values())))
def test_a_model_of_hugging_face_has_as_many_parameters_as_transformers_makes(configuration: dict[str, Any]) -> None:
    contents = SMALL | configuration
    kind = contents["model_type"]
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(
            kind, **{name: value for name, value in contents.items() if name != "model_type"}
        )
        model = transformers.AutoModelForCausalLM.from_config(config)
    sizes = sizes_of(name="transformers", config=contents)
    assert sizes.parameters == count(model)
    layer = model.model.layers[0]
    assert sizes.layers[0].attention == count(layer.self_attn)
    assert sizes.layers[0].feed_forward == count(layer.mlp)
    assert sizes.layers[0].dense == count(layer)


def test_a_composite_gemma_3_counts_as_its_language_model() -> None:
    text = SMALL | {"model_type": "gemma3_text"}
    composite = {"model_type": "gemma3", "text_config": SMALL}
    assert sizes_of(name="transformers", config=composite) == sizes_of(name="transformers", config=text)


def test_an_unknown_kind_of_model_is_not_known() -> None:
    assert model_sizes(Recipe(model=ModelSection(name="transformers", config=SMALL | {"model_type": "mamba"}))) is None


def test_a_llama_by_its_sizes_is_the_one_that_torchtitan_trains() -> None:
    """Llama 3 8B written out equals the flavor 8B in every number, and torchtitan's own count of it."""
    from titan_slurm.train import cpu

    cpu.install()
    from titan_slurm.train.models import model_spec

    written_out = sizes_of(
        vocab_size=128256,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=14336,
        max_seq_len=131072,
    )
    assert written_out == sizes_of(name="llama3", flavor="8B")

    sizes = {"vocab_size": 1000, "embed_dim": 96, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2}
    sizes["intermediate_size"] = 200
    config = model_spec({"name": "llama3", "sizes": sizes | {"rope_theta": 1e4, "max_seq_len": 64}}).model
    with torch.device("meta"):
        model = config.build()
    parameters, flops = config.get_nparams_and_flops(model, 64)
    made = sizes_of(**sizes)
    assert (made.parameters, made.training_flops(64)) == (parameters, flops)
    assert made.layers[0].dense == count(model.layers["0"])


def test_the_parts_of_every_flavor_add_up() -> None:
    for family, flavors in torchtitan_schema()["models"].items():
        for flavor in flavors:
            sizes = sizes_of(name=family, flavor=flavor)
            assert sum(layer.count for layer in sizes.layers) == sizes.num_layers, (family, flavor)
            # What is left is the last norm, and the vision encoder of those that have one.
            assert sizes.other == sizes.embed_dim or family in ("kimi_k2_7", "muse_glimmer"), (family, flavor)
            assert sizes.active_parameters <= sizes.parameters
            assert (sizes.active_parameters < sizes.parameters) == sizes.mixture_of_experts
