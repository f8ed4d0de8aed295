"""Logged steps as columns: one curve, thinned without losing a spike."""

import math
from pathlib import Path
from typing import Any

from titan_slurm.report import series
from titan_slurm.run.files import append_json_line


def step(number: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    """A line of a training step."""
    return {"step": number, "time": 1000.0 + number, "attempt": attempt, "loss": 1.0 / number} | more


def written(tmp_path: Path, *lines: Any) -> series.Series:
    """These lines, read back."""
    file = tmp_path / "metrics.jsonl"
    for line in lines:
        append_json_line(file, line)
    return series.read(file)


def test_of_a_step_done_twice_the_newest_attempt_counts(tmp_path: Path) -> None:
    lines = [step(1), step(2), step(3), step(2, 2, loss=9.0, replayed=True), step(2, 1, loss=7.0)]
    found = written(tmp_path, *lines, {"step": 2, "time": 1.0, "attempt": 2, "validation_loss": 4.0})
    # Of step 3 nothing is left until it is done again.
    assert found.values("loss", found.curve()) == ([1, 2], [1.0, 9.0])
    assert (found.replayed, found.validations) == (1, {2: 4.0})


def test_what_is_no_number_and_no_line_is_passed_over(tmp_path: Path) -> None:
    found = written(tmp_path, step(1, mfu=40.0), step(2), step(3, loss=math.nan), [1], {"step": "a"}, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 1')
    assert len(found) == len(series.read(tmp_path / "metrics.jsonl")) == 3
    assert found.values("mfu", found.curve()) == ([1], [40.0])
    assert found.values("loss", found.curve())[0] == [1, 2]
    assert (found.has("mfu"), found.has("memory_active_gib")) == (True, False)
    assert found.median("mfu", []) is None


def test_a_million_steps_become_some_hundred_points() -> None:
    steps = list(range(1, 100_001))
    values = [2.0] * len(steps)
    values[54_321], values[77_777] = 50.0, -3.0
    xs, ys = series.thinned(steps, values)
    assert len(xs) <= 802
    assert (xs[0], xs[-1]) == (1, 100_000)
    assert (ys[xs.index(54_322)], ys[xs.index(77_778)]) == (50.0, -3.0)
    assert xs == sorted(xs)
    assert series.thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])


def test_the_trend_is_the_mean_of_neighbours() -> None:
    xs, ys = series.smoothed(range(240), [float(each % 2) for each in range(240)])
    assert len(xs) == 120
    assert set(ys) == {0.5}


def test_the_first_step_of_an_attempt_is_not_as_long_as_the_others(tmp_path: Path) -> None:
    lines = [step(number, step_seconds=60.0 if number == 1 else 1.0) for number in range(1, 6)]
    again = [step(number, 2, step_seconds=60.0 if number == 4 else 1.0) for number in range(4, 9)]
    found = written(tmp_path, *lines, *again)
    steady = found.without_first(found.curve())
    assert found.values("step_seconds", steady) == ([3, 6, 7, 8], [1.0] * 4)
