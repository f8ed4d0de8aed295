#!/usr/bin/env python3
"""Write titan_slurm/recipe/torchtitan.json: what a login node without torch needs to know of the installed torchtitan.

python tools/generate_torchtitan_schema.py            # write it
python tools/generate_torchtitan_schema.py --check    # say whether it is up to date (exit code 1 if not)
"""

import dataclasses
import importlib
import importlib.metadata
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


def models() -> dict[str, dict[str, dict[str, object]]]:
    """Families and flavors of decoder-only language models, with what the checks of a recipe need."""
    import torchtitan.models

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


def shape(model: object) -> dict[str, object] | None:
    from torchtitan.models.common.decoder import Decoder

    if not isinstance(model, Decoder.Config) or model.first_attention is None:
        return None
    attention = model.first_attention
    return {
        "vocab_size": model.vocab_size,
        "embed_dim": model.dim,
        "num_layers": len(model.layers),
        "num_heads": attention.n_heads,
        "num_kv_heads": getattr(attention, "n_kv_heads", None) or attention.n_heads,
        "max_seq_len": model.max_seq_len,
        "tied_weights": model.enable_weight_tying,
        "mixture_of_experts": any(getattr(layer, "moe", None) is not None for layer in model.layers),
    }


if __name__ == "__main__":
    main()
