"""No verb imports what takes seconds to import: a login node may have neither torch nor the patience."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from titan_slurm.run.directory import RunDirectory

HEAVY = {"torch", "torchtitan", "wandb", "datasets", "tokenizers", "numpy", "pandas", "transformers", "accelerate"}
# Not heavy, but not needed to print a help text. (typer itself imports pydantic where there is one.)
NOT_FOR_HELP = {"submitit", "jinja2", "tomli", "psutil", "titan_slurm.recipe", "titan_slurm.launch"}

RUN = """
import atexit, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
from titan_slurm.cli import main
main()
"""


def imported(*arguments: str) -> set[str]:
    """The modules that a command has imported by its end."""
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("submit", "--help"),
        ("report", "--help"),
        ("submit", "llama3_debug", "--dry-run", "--cluster", "slurm"),
        ("submit", "llama3_debug", "--dry-run", "--cluster", "local"),
        ("submit", "llama3_debug", "--dry-run", "--cluster", "local", "--script", __file__),
        ("ensure", "llama3_debug", "--cluster", "slurm", "--print-cron"),
        ("render", "llama3_debug"),
        ("validate", "llama3_debug"),
        ("validate", "llama3_405b", "--cluster", "slurm", "--set", "data.tokenizer=python_docs", "--gpu", "H100"),
        ("recipes", "list"),
        ("recipes", "show", "llama3_debug"),
        ("recipes", "diff", "llama3_debug", "llama3_8b"),
        ("recipes", "check"),
        ("status",),
        ("cluster", "list"),
        ("templates", "check", "base"),
        ("wandb", "sync", "--help"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("clean_environment")
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    modules = imported(*arguments)
    assert "titan_slurm.cli" in modules
    assert not HEAVY & modules
    if "--help" in arguments:
        assert not NOT_FOR_HELP & modules


def test_without_slurm_validate_makes_no_script(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(clean_environment))
    modules = imported("validate", "llama3_405b", "--cluster", "slurm", "--set", "data.tokenizer=python_docs")
    assert "titan_slurm.recipe.estimate" in modules
    assert not {"submitit", "jinja2", "psutil"} & modules


def test_the_batch_script_needs_the_standard_library_alone(make_run: Callable[..., RunDirectory]) -> None:
    # -S leaves out every installed package; a container may have none of ours.
    program, attempt = [sys.executable, "-S", "-m", "titan_slurm.run"], make_run().path / "attempts" / "0001"
    for arguments, left_with, printed in (("begin",), 0, f"{attempt}\n"), (("end", attempt, "3"), 3, ""):
        command = [*program, arguments[0], attempt.parents[1], *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)})
        assert (done.returncode, done.stdout) == (left_with, printed), done.stderr


def test_a_report_draws_only_what_is_asked_for(make_run: Callable[..., RunDirectory]) -> None:
    for more in ((), ("--json",)):
        modules = imported("report", str(make_run(name=f"run{len(more)}").path), *more)
        assert "titan_slurm.report.report" in modules
        assert not (HEAVY | {"matplotlib", "jinja2", "submitit"}) & modules
