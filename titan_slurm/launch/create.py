"""The run directory, made complete or not at all."""

import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import tomli_w

from titan_slurm.errors import bad_input
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import sync_directory, write_atomic, write_json
from titan_slurm.run.plan import Plan

_WRITERS = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> None:
    """Raises BadInputError for a name that cannot be a run's: it becomes a folder, a job's name and a wandb id."""
    if not _NAME.fullmatch(name):
        raise bad_input("--name", f"{name!r} cannot be a run's name", "letters, digits, '.', '_', '-'; at most 100")
    if name.isdigit():
        raise bad_input("--name", f"{name!r} would be taken for a job id", "add a letter")


def stable_name(recipe: str) -> str:
    """The name of the one run of a recipe: the recipe's, as far as a run can be called so."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", recipe)[:60].strip("-._") or "run"


def free_name(recipe: str, runs: Path) -> str:
    """A name for a new run: the recipe's, and the time, to the second or a number beyond."""
    base = f"{stable_name(recipe)}-{time.strftime('%Y%m%d-%H%M%S')}"
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
    make_folders({run.path: lambda path: fill(RunDirectory(path))})


def make_folders(contents: Mapping[Path, Callable[[Path], None]]) -> None:
    """Make folders beside each other, each whole and all or none; each function writes what is in its own, while it has
    another name: the first one before the others, and these at the same time. They get their names last, in that order.

    Raises BadInputError if one is there already, or if the folder around them cannot be written.
    """
    made: list[Path] = []
    waiting = {path: path.parent / f".{path.name}.{secrets.token_hex(4)}" for path in contents}
    path = next(iter(contents))
    try:
        _write_folders([(waiting[path], fill) for path, fill in contents.items()])
        for path in contents:
            # A rename onto a folder that is not empty fails: of two that make the same run, one makes it whole.
            waiting[path].rename(path)
            made.append(path)
        sync_directory(path.parent)
    except BaseException as error:
        for each in made:
            shutil.rmtree(each)
        if not isinstance(error, OSError):
            raise
        if RunDirectory(path).exists():
            raise bad_input("--name", f"there is a run {path.name} already: {path}", _ABOUT_RESUME) from None
        raise bad_input("", f"cannot make {path}: {error.strerror}") from None
    finally:
        for temporary in waiting.values():
            shutil.rmtree(temporary, ignore_errors=True)


def _write_folders(contents: Sequence[tuple[Path, Callable[[Path], None]]]) -> None:
    def write(one: tuple[Path, Callable[[Path], None]]) -> None:
        folder, fill = one
        folder.mkdir(parents=True)
        fill(folder)

    write(contents[0])
    if len(contents) > 1:
        from concurrent.futures import ThreadPoolExecutor

        # Most of the time is waiting until something is on stable storage.
        pool = ThreadPoolExecutor(_WRITERS)
        try:
            list(pool.map(write, contents[1:]))
        finally:
            pool.shutdown(cancel_futures=True)


def hide(folders: Iterable[Path]) -> list[Path]:
    """Give folders names by which nobody finds them, also who waits for a run's lock. Returns these: some file systems
    cannot remove what is in them while a lock is open."""
    return [folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")) for folder in folders]


_ABOUT_RESUME = "choose another name, or go on with that run by --resume"


def write_contents(
    run: RunDirectory,
    plan: Plan,
    resolved: ResolvedRecipe,
    script: str,
    submitted_with: RunDirectory | None = None,
) -> None:
    """Write script, code, lock and recipe, and last the plan, which makes the folder a run. `submitted_with`: a run
    that was just made by the same command."""
    from titan_slurm.launch import lock, user_script

    user_script.take(run, plan)
    lock.write(run, plan, resolved, submitted_with)
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
