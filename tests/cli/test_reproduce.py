"""`titan-slurm reproduce`, on runs that were never trained; tests/train has one of a real training."""

import json
from collections.abc import Callable

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
