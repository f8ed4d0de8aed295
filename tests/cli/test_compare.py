"""`titan-slurm compare`, on runs that were never trained; tests/train has those of real trainings."""

import json
from collections.abc import Callable

import pytest

from tests.conftest import CommandLine
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import append_json_line

MakeRun = Callable[..., RunDirectory]


def train(run: RunDirectory, *losses: float, attempt: int = 1, start: int = 1) -> None:
    """Log these losses."""
    for step, loss in enumerate(losses, start):
        append_json_line(run.metrics_file, {"step": step, "attempt": attempt, "loss": loss, "grad_norm": 1.0})


@pytest.fixture
def runs(cli: CommandLine, make_run: MakeRun) -> tuple[RunDirectory, RunDirectory]:  # noqa: ARG001 (an empty folder first)
    """Two runs with different seeds."""
    return make_run(name="one"), make_run("training.seed=43", name="other")


def test_the_first_step_that_differs_is_named(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    train(runs[0], 8.0, 7.0, 6.0, 5.0)
    train(runs[1], 8.0, 7.0, 6.5)
    lines = cli("compare", "one", "other").out.splitlines()
    assert "losses: step 3 is the first that differs, in loss: 6.0 and 6.5" in lines
    assert "  1 more steps only in one" in lines
    assert [line.split() for line in lines[-4:]] == [
        ["STEP", "one", "other", "DIFFERENCE"],
        ["1", "8.000000", "8.000000", "-"],
        ["2", "7.000000", "7.000000", "-"],
        ["3", "6.000000", "6.500000", "+5.000e-01"],
    ]
    # The seed stands beside what torchtitan calls it.
    assert ["torchtitan.debug.seed", "42", "43"] in [line.split() for line in lines]
    assert "environment: the same" in lines
    found = json.loads(cli("compare", "one", "other", "--json").out)
    assert found["recipe"]["torchtitan.debug.seed"] == [42, 43]
    assert found["first_difference"] == {"step": 3, "loss": [6.0, 6.5], "grad_norm": [1.0, 1.0]}
    assert ([step["step"] for step in found["steps"]], found["only"]) == ([1, 2, 3], [1, 0])
    assert found["runs"] == [str(run.path) for run in runs]


def test_a_gradient_may_differ_before_the_loss(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    for run in runs:
        train(run, 8.0)
    append_json_line(runs[0].metrics_file, {"step": 2, "attempt": 1, "loss": 7.0, "grad_norm": 2.0})
    append_json_line(runs[1].metrics_file, {"step": 2, "attempt": 1, "loss": 7.0, "grad_norm": 2.5})
    out = cli("compare", "one", "other").out
    assert "losses: step 2 is the first that differs, in grad_norm: 2.0 and 2.5\n" in out


def test_a_step_counts_as_the_newest_attempt_did_it(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    train(runs[0], 8.0, 7.0, 6.0)
    train(runs[1], 8.0, 7.5)
    train(runs[1], 7.0, 6.0, attempt=2, start=2)
    out = cli("compare", "one", "other").out
    assert "losses: the same to the last bit in all 3 steps that both have logged, to 3\n" in out


def test_a_loss_that_is_no_number_is_equal_to_itself(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    for run, last in zip(runs, (6.0, 7.0), strict=True):
        train(run, 8.0, float("nan"), last)
    out = cli("compare", "one", "other").out
    assert "losses: step 3 is the first that differs, in loss: 6.0 and 7.0\n" in out
    assert "+nan" not in out

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(cli("compare", "one", "other", "--json").out, parse_constant=refuse)
    assert found["steps"][1]["loss"] == [None, None]
    assert found["first_difference"]["step"] == 3


def test_of_a_long_run_some_steps_are_shown(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    train(runs[0], *(1 / step for step in range(1, 1001)))
    train(runs[1], *(1 / step + (step >= 777) for step in range(1, 1001)))
    out = cli("compare", "one", "other").out
    shown = [int(line.split()[0]) for line in out[out.index("STEP") :].splitlines()[1:]]
    assert shown == sorted({*range(1, 1001, 50), 777, 1000})


def test_runs_that_have_logged_nothing(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    assert runs[0].exists()
    assert cli("compare", "one", "other").out.splitlines()[-1] == "losses: no step that both have logged"


def test_what_a_run_was_trained_with_is_compared(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    for run, version in zip(runs, ("2.14.1", "2.14.2"), strict=True):
        trained = {
            "versions": {"torch": version, "python": "3.11.2"},
            "packages": {"numpy": "2.1"},
            "nodes": {"n1": []},
        }
        run.lock_file.write_text(json.dumps(json.loads(run.lock_file.read_text()) | {"trained": trained}))
    found = json.loads(cli("compare", "one", "other", "--json").out)
    assert found["environment"] == {"torch": ["2.14.1", "2.14.2"]}


def test_a_run_that_is_not_there(cli: CommandLine, runs: tuple[RunDirectory, RunDirectory]) -> None:
    assert runs[0].exists()
    done = cli("compare", "one", "none")
    assert (done.code, len(done.errors)) == (2, 1)
