"""The converted recipe as TOML, each value with the field that it came from, and the report of what it lacks."""

import textwrap
from collections.abc import Iterator
from typing import Any

import tomli_w

from titan_slurm.fields import field_names
from titan_slurm.recipe.convert.common import Conversion, Entry, Fate, printable
from titan_slurm.recipe.schema import sections

_WIDTH = 110

# What a recipe should say, by section, with an example: a comment where neither the source nor a base recipe says it.
_TO_FILL_IN: dict[str, dict[str, Any]] = {
    "model": {"name": "llama3", "flavor": "8B"},
    "data": {"dataset": "c4", "tokenizer": "./assets/hf/Llama-3.1-8B"},
    "training": {"batch_size": 1, "seq_len": 8192, "global_batch_size": 512, "max_steps": 10000},
    "optimizer": {"lr": 3e-4},
    "slurm": {"nodes": 1, "gpus_per_node": 8, "time": "1-00:00:00"},
}
# Fields that say the same, or that leave nothing more to say.
_INSTEAD = {
    ("training", "global_batch_size"): ("training", "gradient_accumulation_steps"),
    ("optimizer", "lr"): ("training", "learning_rate"),
}


def recipe_text(conversion: Conversion, about: dict[str, Any], source: str) -> str:
    """The recipe as a file. `about` is its `[recipe]`, `source` says in a line what it was made from."""
    blocks = [f"# {printable(source)}\n# Behind each value stands what it came from.\n"]
    blocks.append(_section("recipe", about, conversion))
    for section in sections():
        if section != "recipe":
            blocks.append(_section(section, {}, conversion))
    report = report_lines(conversion)
    if report:
        blocks.append("\n".join(f"# {line}".rstrip() for line in report) + "\n")
    return "\n".join(block for block in blocks if block)


def report_lines(conversion: Conversion) -> list[str]:
    """What has no counterpart and why, for people; empty if everything has one."""
    parts: list[list[str]] = []
    for fate in Fate:
        reasons = {why: fields for (of, why), fields in conversion.report.items() if of is fate}
        if reasons:
            parts.append([f"{fate.value}:"])
        for why, fields in reasons.items():
            parts[-1] += _wrapped(f"{why}:" if why else "", "  ")
            parts[-1] += [f"    {found.shown}" for found in fields]
    if conversion.notes:
        parts.append(["Not said in the file:", *(line for note in conversion.notes for line in _wrapped(note, "  "))])
    return [line for part in parts for line in ("", *part)][1:]


def _section(section: str, about: dict[str, Any], conversion: Conversion) -> str:
    entries = {name: entry for (of, name), entry in conversion.values.items() if of == section}
    kind = sections()[section]
    order = field_names(kind) if kind else list(entries)
    lines = [f"{name} = {_value(value)}" for name, value in about.items()]
    for name in sorted(entries, key=order.index):
        lines += _entry(name, entries[name])
    missing = {} if conversion.has_base else dict(_missing(section, conversion))
    if missing:
        lines.append("# To fill in; these are examples:")
        lines += [f"# {name} = {_value(value)}" for name, value in missing.items()]
    return "\n".join([f"[{section}]", *lines, ""]) if lines else ""


def _missing(section: str, conversion: Conversion) -> Iterator[tuple[str, Any]]:
    for name, example in _TO_FILL_IN.get(section, {}).items():
        if not {(section, name), _INSTEAD.get((section, name))} & conversion.values.keys():
            yield name, example


def _entry(name: str, entry: Entry) -> Iterator[str]:
    yield from (f"# {line}" for line in _wrapped(entry.remark, ""))
    value, comment = _value(entry.value), entry.comment
    if "\n" in value or len(name) + len(value) + len(comment) > _WIDTH:
        yield f"# {comment}:"
        yield f"{name} = {value}"
    else:
        yield f"{name} = {value}  # {comment}"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
