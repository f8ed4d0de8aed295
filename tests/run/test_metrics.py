"""What is read from a run's metrics, whatever became of those who wrote them."""

from pathlib import Path
from typing import Any

import pytest

from titan_slurm.run import metrics
from titan_slurm.run.files import append_json_line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the metrics are."""
    return tmp_path / "metrics.jsonl"


def step(number: int, attempt: int, loss: float) -> dict[str, Any]:
    """A line of a training step."""
    return {"step": number, "attempt": attempt, "loss": loss}


def write(file: Path, *lines: dict[str, Any]) -> None:
    for line in lines:
        append_json_line(file, line)


def test_a_run_is_one_curve_over_all_its_attempts(file: Path) -> None:
    write(file, *(step(number, 1, 1.0) for number in (1, 2, 3, 4)))
    # It fell back to step 2, got as far as 3, and fell back again.
    write(file, step(3, 2, 2.0), step(2, 3, 3.0))
    found = [(line["step"], line["attempt"], line["loss"]) for line in metrics.curve(file)]
    assert found == [(1, 1, 1.0), (2, 3, 3.0), (3, 2, 2.0), (4, 1, 1.0)]
    assert metrics.highest_step(file) == 4
    assert metrics.last(file) == step(2, 3, 3.0)


def test_an_attempt_that_was_thought_dead_does_not_win(file: Path) -> None:
    write(file, step(1, 2, 2.0), step(1, 1, 1.0))
    assert metrics.curve(file) == [step(1, 2, 2.0)]


def test_validations_are_lines_of_their_own(file: Path) -> None:
    validation = {"step": 2, "attempt": 1, "validation_loss": 5.0}
    write(file, step(1, 1, 1.0), step(2, 1, 2.0), validation)
    assert [line["step"] for line in metrics.logged(file)] == [1, 2]
    assert metrics.last(file) == step(2, 1, 2.0)
    assert metrics.validations(file) == [validation]
    write(file, validation | {"attempt": 2, "validation_loss": 4.0})
    assert [line["validation_loss"] for line in metrics.validations(file)] == [4.0]


def test_a_line_cut_short_costs_that_line_alone(file: Path) -> None:
    write(file, step(1, 1, 1.0))
    with file.open("ab") as torn:
        torn.write(b'{"step": 2, "attempt": 1, "lo')
    assert metrics.curve(file) == [step(1, 1, 1.0)]
    assert metrics.last(file) == step(1, 1, 1.0)
    write(file, step(2, 2, 2.0))
    assert metrics.curve(file) == [step(1, 1, 1.0), step(2, 2, 2.0)]


def test_a_run_without_metrics(file: Path) -> None:
    assert (metrics.curve(file), metrics.last(file), metrics.highest_step(file)) == ([], {}, 0)
