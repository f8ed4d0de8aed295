"""A user's script in the place of torchtitan's loop: checked, and copied into the run with the modules beside it, where
no later edit reaches."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.errors import Problem
from titan_slurm.recipe.accelerate import problems_with as unsupported
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.lock import code_hash
from titan_slurm.run.plan import Plan

LIFE = "titan_slurm.accelerate.rank"

# What lies beside a script may be a whole home: beyond these, modules stay where they are.
_MOST_FILES = 500
_MOST_BYTES = 8 * 2**20
_MOST_FOLDERS = 2000
_NO_MODULES = frozenset({"__pycache__", "site-packages", "node_modules"})


@dataclass(frozen=True)
class UserScript:
    """What `--script` and the words after it say. `folder`: what its imports are looked for in, beside the packages.
    `has_modules`: whether the run has a copy of the modules there; None for a script that is not in the run yet."""

    source: Path
    arguments: tuple[str, ...]
    folder: Path
    has_modules: bool | None = None

    def planned(self, runs: Path) -> dict[str, Any]:
        """As a plan has it. `runs`: the folder of runs."""
        has_modules = self.has_modules
        if has_modules is None:
            has_modules = modules_beside(self.folder, runs) is not None
        return {
            "has_modules": has_modules,
            "path": f"training_script/{self.source.name}",
            "source": str(self.source),
            "folder": str(self.folder),
            "arguments": list(self.arguments),
        }


def named(path: Path, arguments: Sequence[str]) -> UserScript:
    """The script that a user names."""
    source = path.expanduser().absolute()
    return UserScript(source, tuple(arguments), source.parent)


def of_run(run: RunDirectory, arguments: Sequence[str]) -> UserScript | None:
    """The script that a run has, which goes on with it where the user names no other; None if it has none. `arguments`
    take the place of its own, if there are any."""
    had = run.plan().script
    if had is None:
        return None
    arguments = tuple(arguments or had["arguments"])
    return UserScript(run.path / had["path"], arguments, Path(had["folder"]), had.get("has_modules", False))


def problems_with(script: UserScript, resolved: ResolvedRecipe) -> list[Problem]:
    """Why it cannot run by this recipe."""
    problems = unsupported(resolved, has_gpus=resolved.recipe.slurm.gpus_per_node > 0)
    if importlib.util.find_spec("accelerate") is None:
        hint = "pip install 'titan-slurm[accelerate]'"
        problems.append(Problem("--script", "the package accelerate is not installed", hint))
    try:
        compile(script.source.read_bytes(), str(script.source), "exec")
    except OSError as error:
        problems.append(Problem(f"--script {script.source}", f"cannot be read: {error.strerror}"))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{script.source}:{line}" if line else str(script.source)
        problems.append(Problem(where, f"is not Python: {getattr(error, 'msg', error)}"))
    return problems


def notes(plan: Plan) -> list[str]:
    """What a user should know of the copy."""
    if plan.script is None or plan.script["has_modules"]:
        return []
    most = f"more than {_MOST_FILES} files or {_MOST_BYTES // 2**20} MiB are not copied"
    return [f"the script's own modules are imported from {plan.script['folder']}, as they are then ({most})"]


def modules_beside(folder: Path, runs: Path) -> list[Path] | None:
    """The Python files in a script's folder and below it, relative to that, without hidden folders, environments and
    runs; None if they are too many to be copied."""
    found: list[Path] = []
    size, folders, seen = 0, 0, {os.path.realpath(folder), os.path.realpath(runs)}
    for here, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if _may_hold_modules(Path(here, name), seen))
        files = [Path(here, name) for name in names if name.endswith(".py") and not name.startswith(".")]
        files = [file for file in files if file.is_file() and os.access(file, os.R_OK)]
        found += [file.relative_to(folder) for file in files]
        size, folders = size + sum(file.stat().st_size for file in files), folders + 1
        if len(found) > _MOST_FILES or size > _MOST_BYTES or folders > _MOST_FOLDERS:
            return None
    return found


def _may_hold_modules(folder: Path, seen: set[str]) -> bool:
    """`seen`: by their real paths, so that links do not lead in circles; this one is added."""
    real = os.path.realpath(folder)
    if real in seen or folder.name.startswith(".") or folder.name in _NO_MODULES:
        return False
    seen.add(real)
    return not (folder / "pyvenv.cfg").exists() and not RunDirectory(folder).exists()


def take(run: RunDirectory, plan: Plan) -> None:
    """Copy the plan's script into the run, if it has one, and the modules beside it. What the run had goes to its
    history."""
    if plan.script is None:
        return
    source, target = Path(plan.script["source"]), run.path / plan.script["path"]
    if target.exists() and target.samefile(source):
        return
    partial = run.path / f".{run.script_folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    folder = Path(plan.script["folder"])
    modules = modules_beside(folder, run.path.parent) if plan.script["has_modules"] else None
    for name in modules or []:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        # As bytes: a file says itself in which encoding it is.
        shutil.copyfile(folder / name, partial / name)
    shutil.copyfile(source, partial / source.name)
    _put(run, partial)


def _put(run: RunDirectory, partial: Path) -> None:
    if code_hash(partial) == code_hash(run.script_folder):
        shutil.rmtree(partial)
        return
    if run.script_folder.is_dir():
        run.script_folder.rename(run.next_in_history(run.script_folder.name, ""))
    partial.rename(run.script_folder)
