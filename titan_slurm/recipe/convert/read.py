"""Files as nested tables, and which format their fields speak of."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from titan_slurm import toml
from titan_slurm.errors import BadInputError, bad_input, did_you_mean

KINDS = {
    "deepspeed": "a DeepSpeed config",
    "accelerate": "an Accelerate config",
    "torchtitan": "a job config of torchtitan 0.2 or older",
}

# A file is of the first kind of which it has a field of these. Accelerate refuses a file without the first of its own.
_SIGNS = {
    "accelerate": ("distributed_type", "compute_environment"),
    "deepspeed": (
        "zero_optimization",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "fp16",
        "scheduler",
    ),
    "torchtitan": ("training", "parallelism", "model", "job", "lr_scheduler", "activation_checkpoint", "float8"),
}
_SIGNS_OF_A_RECIPE = ("recipe", "lr_schedule", "checkpointing", "slurm", "requeue")


def read_tables(path: Path) -> dict[str, Any]:
    """The file's content: JSON, YAML or TOML by its ending, or whichever it turns out to be.

    Raises BadInputError if it cannot be read, is none of them, or gives a field twice.
    """
    match path.suffix.lower():
        case ".json":
            tree = _json(path)
        case ".yaml" | ".yml":
            tree = _yaml(path)
        case ".toml":
            tree = toml.read(path).tables
        case _:
            tree = _any(path)
    if not isinstance(tree, dict):
        raise bad_input(str(path), "is no config: at its top there are no named fields")
    return tree


def kind_of(path: Path, tree: dict[str, Any], asked: str | None) -> tuple[str, str]:
    """The kind of config, and what gave it away. `asked` forces it.

    Raises BadInputError for a kind that does not exist, and for content that speaks for none.
    """
    if asked is not None:
        if asked not in KINDS:
            raise bad_input(f"--from {asked}", "there is no such kind of config", did_you_mean(asked, KINDS))
        return asked, f"--from {asked}"
    for kind, signs in _SIGNS.items():
        sign = next((sign for sign in signs if sign in tree), None)
        if sign is not None and not any(other in tree for other in _SIGNS_OF_A_RECIPE):
            return kind, f"it has {sign}"
    hint = "say which by --from " + "|".join(KINDS)
    if any(sign in tree for sign in _SIGNS_OF_A_RECIPE):
        hint = "it looks like a recipe, which needs no conversion"
    raise bad_input(str(path), "is not recognised as a config of DeepSpeed, Accelerate or torchtitan", hint)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise bad_input(str(path), f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise bad_input(str(path), "is not UTF-8 text") from None


def _json(path: Path) -> Any:
    def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = next(name for name in table if [name for name, _ in pairs].count(name) > 1)
            raise bad_input(str(path), f"the field {twice!r} is given twice", "keep one")
        return table

    try:
        return json.loads(_text(path), object_pairs_hook=without_repetition)
    except json.JSONDecodeError as error:
        hint = "comments and commas at the end, which DeepSpeed allows, are to be taken out"
        what = f"not JSON: {error.msg} (column {error.colno})"
        raise bad_input(f"{path}:{error.lineno}", what, hint) from None


class _Loader(yaml.SafeLoader):
    """Refuses a field that is given twice, of which YAML's own loader drops the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else id(key_node)
            if key in seen:
                what = f"the field {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> Any:
    text = _text(path)
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise bad_input(where, f"not YAML that can be used: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        # A character that YAML does not allow; a date that does not exist.
        raise bad_input(str(path), f"not YAML: {' '.join(str(error).split())}") from None


def _any(path: Path) -> Any:
    for read in (_json, lambda path: toml.read(path).tables, _yaml):
        try:
            tree = read(path)
        except BadInputError:
            continue
        if isinstance(tree, dict):
            return tree
    _text(path)
    raise bad_input(str(path), "is neither JSON nor TOML nor YAML", "name it .json, .toml or .yaml to see why")
