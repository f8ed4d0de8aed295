"""From a config of DeepSpeed, Accelerate or torchtitan to a recipe, with a report of every field that has none."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.errors import bad_input
from titan_slurm.recipe import find
from titan_slurm.recipe.convert import accelerate, deepspeed, torchtitan
from titan_slurm.recipe.convert.common import Conversion, fields_of
from titan_slurm.recipe.convert.read import KINDS, kind_of, read_tables
from titan_slurm.recipe.convert.write import recipe_text, report_lines


@dataclass(frozen=True)
class Converted:
    """A recipe made from another program's config."""

    text: str
    """The recipe, as TOML with comments."""
    kind: str
    """What the file is, and how that was seen."""
    values: int
    """How many values the recipe has got."""
    report: list[str]
    """What has no counterpart, line by line."""


def convert(path: Path, *, kind: str | None = None, extends: str | None = None, to: Path | None = None) -> Converted:
    """Convert the file at `path`. `kind` forces what it is taken for, `extends` names a recipe that the result changes,
    `to` is where the result will stand.

    Raises BadInputError if the file cannot be read or recognised, or if there is no recipe to extend.
    """
    base = _base(extends, to) if extends else None
    try:
        return _convert(path, kind, base, to.stem if to else path.stem)
    except RecursionError:
        raise bad_input(str(path), "is nested too deeply") from None


def _convert(path: Path, asked: str | None, base: str | None, name: str) -> Converted:
    tree = read_tables(path)
    kind, sign = kind_of(path, tree, asked)
    conversion = Conversion(has_base=base is not None)
    fields = [fields_of(tree, str(path))]
    if kind == "deepspeed":
        deepspeed.convert(fields[0], conversion, deepspeed.Around(by_itself=True))
    elif kind == "accelerate":
        fields += accelerate.convert(fields[0], conversion, path)
    else:
        torchtitan.convert(fields[0], conversion)
    for each in fields:
        conversion.finish(each)
    about: dict[str, Any] = {"schema": 1, "name": name, "version": "1.0.0"}
    text = recipe_text(conversion, about | ({"extends": base} if base else {}), f"From {path.name}, {KINDS[kind]}.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_input(str(path), "has half a character in a text (a surrogate)") from None
    return Converted(text, f"{KINDS[kind]} ({sign})", len(conversion.values), report_lines(conversion))


def _base(name: str, to: Path | None) -> str:
    """How a recipe at `to` names the recipe that it extends."""
    found = find.recipe_file(name)
    if found.origin != "path":
        return found.name
    return os.path.relpath(found.path.resolve(), to.resolve().parent) if to else str(found.path.resolve())
