"""What tests of every room share: the command line, and an environment in which only the test decides."""

import contextlib
import dataclasses
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from titan_slurm.cli import main, options
from titan_slurm.launch import create
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parent.parent

# The machine's own settings would change what a test sees; FORCE_COLOR makes rich write escape codes into a pipe.
_NOT_OURS = ("TORCHTITAN_", "TITAN_SLURM_", "SLURM_", "SBATCH_", "WANDB_", "FORCE_COLOR")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The mistakes it reported, without the word `error`."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


class CommandLine:
    """`titan-slurm` with these arguments, in the working directory and environment of the test."""

    def __call__(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Outcome:
        """Run it inside this process, which is fast. `env` is added to the environment."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["titan-slurm", *map(str, arguments)])
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            try:
                main()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
        return Outcome(code, out.getvalue(), err.getvalue())

    def process(self, *arguments: str | Path, env: Mapping[str, str] | None = None) -> Outcome:
        """Run it as a user does, in a process of its own. `env` is added to the environment."""
        command = [sys.executable, "-m", "titan_slurm", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(env or {}), check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory, the home and all settings are the test's own. Returns the working directory."""
    for name in [name for name in os.environ if name.startswith(_NOT_OURS)]:
        monkeypatch.delenv(name)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / ".config"))
    return here


@pytest.fixture
def cli(clean_environment: Path) -> CommandLine:
    """The command line, in an empty folder."""
    assert not any(clean_environment.iterdir())
    return CommandLine()


@pytest.fixture
def prepare(clean_environment: Path) -> Callable[..., Prepared]:
    """`prepare(recipe, "section.key=value", …, name=…)`: what `submit` would do on Slurm, with nothing on disk yet."""

    def prepare_run(recipe: str, *settings: str, name: str = "mine") -> Prepared:
        return options.prepare(recipe, None, list(settings), "slurm", name, clean_environment / "runs")

    return prepare_run


@pytest.fixture
def make_run(prepare: Callable[..., Prepared]) -> Callable[..., RunDirectory]:
    """`make_run("section.key=value", …, name=…, cluster=…)`: a run of the debug recipe on disk, not submitted."""

    def make(*settings: str, name: str = "mine", cluster: str = "slurm") -> RunDirectory:
        prepared = prepare("llama3_debug", *settings, name=name)
        prepared.run.path.parent.mkdir(exist_ok=True)
        plan = dataclasses.replace(prepared.plan, cluster=cluster)
        create.create(prepared.run, plan, prepared.resolved, prepared.script)
        return prepared.run

    return make


@pytest.fixture
def fake_command(
    tmp_path: Path,
    clean_environment: Path,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, str], Callable[[], list[str]]]:
    """`fake_command(name, script)`: a program of that name for this test, in bash, and no other of Slurm's. Returns a
    function that gives the arguments of each call so far."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    for each in ("bash", "cat", "date", "sleep"):
        (folder / each).symlink_to(shutil.which(each) or each)
    monkeypatch.setenv("PATH", str(folder))

    def fake(name: str, script: str) -> Callable[[], list[str]]:
        calls = folder / f"{name}.calls"
        (folder / name).write_text(f'#!/bin/bash\necho "$*" >> {calls}\n{script}\n')
        (folder / name).chmod(0o755)
        return lambda: calls.read_text().splitlines() if calls.exists() else []

    return fake
