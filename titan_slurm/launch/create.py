"""The run directory, made complete or not at all."""

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import tomli_w

from titan_slurm.errors import bad_input
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import sync_directory, write_atomic, write_json
from titan_slurm.run.plan import Plan

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> None:
    """Raises BadInputError for a name that cannot be a run's: it becomes a folder, a job's name and a wandb id."""
    if not _NAME.fullmatch(name):
        raise bad_input("--name", f"{name!r} cannot be a run's name", "letters, digits, '.', '_', '-'; at most 100")
    if name.isdigit():
        raise bad_input("--name", f"{name!r} would be taken for a job id", "add a letter")


def free_name(recipe: str, runs: Path) -> str:
    """A name for a new run: the recipe's, and the time, to the second or a number beyond."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", recipe)[:60].strip("-._") or "run"
    base = f"{readable}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = (base if number == 1 else f"{base}-{number}" for number in range(1, 1000))
    return next(name for name in candidates if not (runs / name).exists())


def create(run: RunDirectory, plan: Plan, resolved: ResolvedRecipe, script: str) -> None:
    """Make the run's folder with plan, recipe, script, lock and code in it.

    Raises BadInputError if there is such a run already, or if the folder of runs cannot be written.
    """
    make(run, lambda new: write_contents(new, plan, resolved, script))


def make(run: RunDirectory, fill: Callable[[RunDirectory], None]) -> None:
    """Make a run's folder, whole or not at all; `fill` writes what is in it, while it has another name.

    Raises BadInputError if there is such a run already, or if the folder of runs cannot be written.
    """
    temporary = run.path.parent / f".{run.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        fill(RunDirectory(temporary))
        # A rename onto a folder that is not empty fails: of two that make the same run, one makes it whole.
        temporary.rename(run.path)
        sync_directory(run.path.parent)
    except OSError as error:
        if run.exists():
            raise bad_input("--name", f"there is a run {run.name} already: {run.path}", _ABOUT_RESUME) from None
        raise bad_input("", f"cannot make {run.path}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_ABOUT_RESUME = "choose another name, or go on with that run by --resume"


def write_contents(run: RunDirectory, plan: Plan, resolved: ResolvedRecipe, script: str) -> None:
    """Write code, lock, recipe and script, and last the plan, which makes the folder a run."""
    from titan_slurm.launch import lock

    lock.write(run, plan, resolved)
    write_atomic(run.recipe_file, resolved_toml(resolved))
    write_atomic(run.script_file, script)
    write_json(run.plan_file, plan.to_dict())


def resolved_toml(resolved: ResolvedRecipe) -> str:
    """The recipe as one file: nothing to extend, every value that was set, and where each came from as a comment. What
    a cluster profile says beneath it is left to the place where it runs next."""
    about = {
        "schema": 1,
        "name": resolved.name,
        "version": resolved.recipe.recipe.version,
        "description": resolved.recipe.recipe.description,
    }
    tables: dict[str, dict[str, object]] = {"recipe": dict(about)}
    for (section, *path), value in resolved.values.items():
        if section != "recipe" and not value.of_place:
            tables.setdefault(section, {})[".".join(path)] = value.value
    return "\n".join(_section(name, table, resolved) for name, table in tables.items())


def _section(name: str, table: dict[str, object], resolved: ResolvedRecipe) -> str:
    lines = [f"[{name}]"]
    for field, value in table.items():
        origin = resolved.values.get((name, *field.split(".")))
        comment = f"  # {origin.origin}" if origin else ""
        text = tomli_w.dumps({field: value}).rstrip("\n")
        if "." in field and name != "torchtitan":
            # A table within the section, as a dotted key. Only torchtitan's paths are the same in quotes.
            text = text.replace(f'"{field}"', field, 1)
        # A comment ends with its line and holds no control characters, and a list may take several lines.
        lines.append(text + comment if "\n" not in text and comment.isprintable() else text)
    return "\n".join(lines) + "\n"
