#!/usr/bin/env python3
"""Write titan_slurm/recipe/torchtitan.json: what a login node without torch needs to know of the installed torchtitan.

python tools/generate_torchtitan_schema.py            # write it
python tools/generate_torchtitan_schema.py --check    # say whether it is up to date (exit code 1 if not)
"""

import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import pkgutil
import sys
import types
import typing
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "titan_slurm" / "recipe" / "torchtitan.json"
ACTIVATION_CHECKPOINTING = ("none", "selective", "full", "memory_budget")


def main() -> None:
    from titan_slurm.train import cpu

    cpu.install()
    text = json.dumps(schema(), indent=1) + "\n"
    if sys.argv[1:] == ["--check"]:
        if not FILE.is_file() or FILE.read_text() != text:
            sys.exit(f"{FILE.name} does not describe the installed torchtitan; run {Path(__file__).name}")
        return
    FILE.write_text(text)


def schema() -> dict[str, object]:
    from torchtitan.hf_datasets.text_datasets import DATASETS

    return {
        "torchtitan": importlib.metadata.version("torchtitan"),
        "fields": fields(),
        "datasets": sorted(name for name in DATASETS),
        "pipeline_schedules": pipeline_schedules(),
        "compile_backends": compile_backends(),
        "models": models(),
    }


def fields() -> dict[str, dict[str, object]]:
    """Every leaf of the configuration, by its dotted path. `only_with`: the kinds of activation checkpointing that
    have it, if not all."""
    from torchtitan.config import CompileConfig
    from torchtitan.trainer import Trainer

    from titan_slurm.train.config import defaults

    found: dict[str, dict[str, object]] = {}
    kinds: dict[str, list[str]] = {}
    for kind in ACTIVATION_CHECKPOINTING:
        for path, entry in leaves(Trainer.Config(compile=CompileConfig(enable=True), **defaults(kind))):
            found[path] = entry
            kinds.setdefault(path, []).append(kind)
    for path, having in kinds.items():
        if len(having) < len(ACTIVATION_CHECKPOINTING):
            found[path]["only_with"] = having
    return dict(sorted(found.items()))


def leaves(config: object, prefix: str = "") -> typing.Iterator[tuple[str, dict[str, object]]]:
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        elif (entry := describe(hints[field.name])) is not None:
            yield f"{prefix}{field.name}", entry


def describe(hint: object) -> dict[str, object] | None:
    """The type of a field as a recipe can give it, or None if it cannot (a callable, a nested configuration)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"type": "str", "choices": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        known = [entry for each in arguments if each is not type(None) and (entry := describe(each))]
        if not known:
            return None
        # `float | int` reads as float: an int in TOML is a float too.
        return next((entry for entry in known if entry["type"] == "float"), known[0])
    if hint in (bool, int, float, str):
        return {"type": hint.__name__}  # type: ignore[attr-defined]
    if origin is list and arguments[0] is str:
        return {"type": "list[str]"}
    return None


def pipeline_schedules() -> list[str]:
    from torch.distributed.pipelining import schedules

    return sorted(
        name.removeprefix("Schedule")
        for name, value in vars(schedules).items()
        if name.startswith("Schedule") and isinstance(value, type)
    )


def compile_backends() -> list[str]:
    import torch._dynamo

    names = torch._dynamo.list_backends(exclude_tags=None)
    return [name for name in names if "TESTING_ONLY" not in name and "minifier" not in name]


def models() -> dict[str, dict[str, dict[str, object]]]:
    """Families and flavors of decoder-only language models, with what the checks of a recipe need."""
    import torchtitan.models

    from titan_slurm.train.models import register_small_flavors

    register_small_flavors()
    families = {}
    for module_info in pkgutil.iter_modules(torchtitan.models.__path__):
        try:
            family = importlib.import_module(f"torchtitan.models.{module_info.name}")
        except ImportError:
            continue  # A family whose own extra packages are not installed.
        configs = next(
            (value for name, value in vars(family).items() if name.endswith("_configs") and isinstance(value, dict)),
            None,
        )
        if configs is None or not hasattr(family, "model_registry"):
            continue
        flavors = {flavor: shape(family.model_registry(flavor).model) for flavor in configs}
        families[module_info.name] = {flavor: found for flavor, found in flavors.items() if found}
    return {name: flavors for name, flavors in families.items() if flavors}


def shape(config: object) -> dict[str, object] | None:
    """The sizes of a model, as titan_slurm.recipe.model.ModelSizes has them."""
    import torch
    from torchtitan.models.common.decoder import Decoder

    if not isinstance(config, Decoder.Config) or config.first_attention is None:
        return None
    attention = config.first_attention
    with torch.device("meta"):
        model = config.build()
    parameters = count(model)
    # torchtitan's formula is linear in the sequence length.
    flops, more_flops = (config.get_nparams_and_flops(model, seq_len)[1] for seq_len in (0, 1))
    moe = next((layer.moe for layer in config.layers if getattr(layer, "moe", None)), None)
    layers = [layer_sizes(layer) for layer in model.layers.values()]
    experts = sum(layer["expert"] for layer in layers) if moe else 0
    tied = config.enable_weight_tying
    return {
        "vocab_size": config.vocab_size,
        "embed_dim": config.dim,
        "num_layers": len(config.layers),
        "num_heads": attention.n_heads,
        "num_kv_heads": getattr(attention, "n_kv_heads", None) or attention.n_heads,
        "max_seq_len": config.max_seq_len,
        "tied_weights": tied,
        "mixture_of_experts": moe is not None,
        "num_experts": moe.num_experts if moe else 0,
        "experts_per_token": moe.router.top_k if moe else 0,
        "parameters": parameters,
        "active_parameters": parameters - (experts * (moe.num_experts - moe.router.top_k) if moe else 0),
        "embedding": count(model.tok_embeddings),
        "output_head": 0 if tied else count(model.lm_head),
        "rope_bytes": rope_bytes(attention.rope),
        "flops_per_token": flops,
        "flops_per_token_and_position": more_flops - flops,
        "layers": [{"count": len(list(alike)), **dict(sizes)} for sizes, alike in itertools.groupby(layers)],
    }


def layer_sizes(block: typing.Any) -> dict[str, typing.Any]:
    """One layer's sizes, as titan_slurm.recipe.model.LayerSizes has them."""
    attention, moe = block.attention, getattr(block, "moe", None)
    dense = moe.shared_experts if moe else block.feed_forward
    routed = moe.routed_experts.inner_experts if moe else None
    parts = {
        "attention": count(attention),
        "feed_forward": count(dense) if dense else 0,
        "router": count(moe.router) if moe else 0,
        "expert": count(routed) // routed.num_experts if routed else 0,
    }
    everything = count(block)
    norms = everything - parts["attention"] - parts["feed_forward"] - parts["router"] - (count(routed) if routed else 0)
    return parts | {
        "norms": norms,
        **attention_widths(attention),
        "post_norms": sum(name.startswith("post_") for name, _ in block.named_children()),
        "intermediate_size": dense.w1.weight.shape[0] if dense else 0,
        "expert_size": routed_width(routed) if routed else 0,
    }


def attention_widths(attention: typing.Any) -> dict[str, typing.Any]:
    """Features per token of what stands between the projections of one attention."""
    from torch import nn

    linears = {name: module for name, module in attention.named_modules() if isinstance(module, nn.Linear)}
    # Executed last, whatever stands last.
    order = sorted(linears, key=lambda name: (name == "wo", name == "o_gate"))
    heads = attention.n_heads
    if hasattr(attention, "kv_lora_rank"):
        query = key = heads * attention.qk_head_dim
        value = attended = heads * attention.v_head_dim
        # Each low rank stands before its norm and after it, and the rotary part of the key beside it.
        latent = 2 * (attention.q_lora_rank + attention.kv_lora_rank) + attention.qk_rope_head_dim
    else:
        query = attended = heads * attention.head_dim
        key = value = attention.n_kv_heads * attention.head_dim
        latent = query + key if getattr(attention, "q_norm", None) is not None else 0
    return {
        "projections": [linears[name].weight.shape[0] for name in order],
        "biased": [linears[name].bias is not None for name in order],
        "query": query,
        "key": key,
        "value": value,
        "attended": attended,
        "latent": latent,
        "gate": linears["o_gate"].weight.shape[0] if "o_gate" in linears else 0,
    }


def routed_width(experts: typing.Any) -> int:
    """Width of one expert's feed-forward layer."""
    weight = getattr(experts, "w2_EDF", None)
    return int((experts.mlp2_weight_EDF if weight is None else weight).shape[-1])


def rope_bytes(rope: typing.Any) -> int:
    """Bytes per position of the table of rotations: complex numbers, or cosines and sines, of 4 bytes a part."""
    from torchtitan.models.common.rope import ComplexRoPE

    return int(rope.dim // 2 * 8 if isinstance(rope, ComplexRoPE.Config) else rope.dim * 2 * 4)


def count(module: typing.Any) -> int:
    """Parameters of a module; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    main()
