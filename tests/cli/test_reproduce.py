"""`titan-slurm reproduce`, on runs that were never trained; tests/train has one of a real training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine
from titan_slurm.run.directory import RunDirectory


@pytest.fixture
def runs(cli: CommandLine, make_run: Callable[..., RunDirectory]) -> tuple[RunDirectory, RunDirectory]:  # noqa: ARG001
    """Two runs."""
    return make_run(name="one"), make_run(name="other")


def test_what_cannot_be_reproduced_is_said(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    runs[0].lock_file.unlink()
    outcome = cli("reproduce", "one")
    assert outcome.code == 2
    assert "has no lock of this titan-slurm, or no copy of its code" in outcome.errors[0]
    assert "no run 'none' in" in cli("reproduce", "none").errors[0]
    assert cli("reproduce", "other", "--name", "one").errors[0].startswith("--name: there is a run one already")


def folder_of_checkpoints(cli: CommandLine, source: str) -> Path:
    """Where the run saves that is to reproduce another; by its plan, when it is made. Removes it."""
    outcome = cli("reproduce", source, "--name", "again")
    assert outcome.code == 0, outcome.err
    run = RunDirectory(Path("runs", "again").absolute())
    folder = run.checkpoints_folder
    shutil.rmtree(run.path)
    return folder


def test_a_run_saves_in_its_own_folder_though_the_other_was_moved(
    cli: CommandLine,
    runs: tuple[RunDirectory, RunDirectory],
    make_run: Callable[..., RunDirectory],
    fake_command: Callable[[str, str], Callable[[], list[str]]],
    tmp_path: Path,
) -> None:
    fake_command("sbatch", "echo Submitted batch job 12")
    for name, setting in (("named", "./own/steps"), ("outside", str(tmp_path / "scratch"))):
        make_run(f"checkpointing.save_dir={setting}", name=name)
    expected = Path("runs", "again").absolute()
    for name, path in (("one", "checkpoints"), ("named", "own/steps")):
        # A copy, beside which the one that was there still is.
        shutil.copytree(runs[0].path.with_name(name), tmp_path / "elsewhere" / name)
        assert folder_of_checkpoints(cli, str(tmp_path / "elsewhere" / name)) == expected / path
    # What it cannot do is said.
    words = cli("reproduce", "outside", "--name", "again", "--dry-run").err
    assert f"it saved its checkpoints below {tmp_path / 'scratch'}, which cannot be written here" in words
    (tmp_path / "scratch").mkdir()
    assert "it saved its checkpoints" not in cli("reproduce", "outside", "--name", "again", "--dry-run").err
    assert folder_of_checkpoints(cli, "outside") == tmp_path / "scratch" / "again"


def test_what_would_differ_is_said_before_anything_is_made(
    cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]
) -> None:
    other = runs[1]
    found = json.loads(other.lock_file.read_text())
    found["packages"]["torch"] = "2.13.0"
    other.lock_file.write_text(json.dumps(found))
    (other.code_folder / "titan_slurm" / "__init__.py").write_text("edited = True\n")
    outcome = cli("reproduce", "other", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    about = json.loads(outcome.out)
    here = json.loads(runs[0].lock_file.read_text())["packages"]["torch"]
    assert about["differences"] == [
        "the run's copy of the code was changed after it was submitted",
        f"torch was 2.13.0 and is {here} here",
    ]
    assert about["run"] == str(other.path.with_name("other-again"))
    assert not other.path.with_name("other-again").exists()
    for line in about["differences"]:
        assert f"note: not the same here: {line}\n" in outcome.err
