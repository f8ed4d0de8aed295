"""A user's script in the place of torchtitan's loop: checked, and copied into the run, where no later edit reaches."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.errors import Problem
from titan_slurm.recipe.accelerate import problems_with as unsupported
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_atomic
from titan_slurm.run.plan import Plan

LIFE = "titan_slurm.accelerate.rank"


@dataclass(frozen=True)
class UserScript:
    """What `--script` and the words after it say. `folder`: what its imports are looked for in, beside the packages."""

    source: Path
    arguments: tuple[str, ...]
    folder: Path

    def planned(self) -> dict[str, Any]:
        """As a plan has it."""
        return {
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
    return UserScript(run.path / had["path"], tuple(arguments or had["arguments"]), Path(had["folder"]))


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


def take(run: RunDirectory, plan: Plan) -> None:
    """Copy the plan's script into the run, if it has one. What the run had goes to its history."""
    if plan.script is None:
        return
    target, text = run.path / plan.script["path"], Path(plan.script["source"]).read_text(encoding="utf-8")
    if target.is_file() and target.read_text(encoding="utf-8") != text:
        target.rename(run.next_in_history(target.stem, target.suffix))
    target.parent.mkdir(exist_ok=True)
    write_atomic(target, text)
