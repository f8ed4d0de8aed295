"""What a run has logged, as columns of numbers: a million steps fit into memory, and into a plot."""

import math
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_slurm.run.files import read_json_lines

# Columns of a training step's line, by the names of titan_slurm.run.metrics.
COLUMNS = (
    "loss",
    "max_loss",
    "grad_norm",
    "lr",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "data_seconds",
    "mfu",
    "memory_active_gib",
    "memory_reserved_gib",
)
# Columns of `ranks`: the shortest and the longest of the ranks' times.
SPREADS = ("step_seconds", "data_seconds", "optimizer_seconds")


@dataclass
class Series:
    """The logged training steps in the order of logging, one row each; what a line lacks is NaN."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[float]" = field(default_factory=lambda: array("d"))
    attempts: "array[int]" = field(default_factory=lambda: array("q"))
    columns: dict[str, "array[float]"] = field(default_factory=dict)
    validations: dict[int, float] = field(default_factory=dict)
    """Validation losses by step, of each what the newest attempt logged."""
    replayed: int = 0
    """Lines of steps that an earlier attempt had done already."""
    slowest: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many lines of an attempt name a rank as the one whose optimizer took longest."""

    def __len__(self) -> int:
        return len(self.steps)

    def of_attempts(self) -> dict[int, list[int]]:
        """The rows of each attempt."""
        rows: dict[int, list[int]] = {}
        for row, attempt in enumerate(self.attempts):
            rows.setdefault(attempt, []).append(row)
        return rows

    def curve(self) -> list[int]:
        """The rows of the run as one curve, by step: of a step that was done more than once, the newest attempt's. It
        ends where the newest attempt has come to: what one before it had logged beyond that is lost."""
        newest: dict[int, int] = {}
        for row, step in enumerate(self.steps):
            before = newest.get(step)
            if before is None or self.attempts[row] >= self.attempts[before]:
                newest[step] = row
        last = max(self.attempts, default=0)
        end = max((step for step, attempt in zip(self.steps, self.attempts, strict=True) if attempt == last), default=0)
        return [newest[step] for step in sorted(newest) if step <= end]

    def without_first(self, rows: Sequence[int]) -> list[int]:
        """These rows without the first two of each attempt: the first step compiles and warms up, and how far apart the
        ranks were in it is said in the line after."""
        first = {row for of_attempt in self.of_attempts().values() for row in of_attempt[:2]}
        return [row for row in rows if row not in first]

    def has(self, name: str) -> bool:
        """Whether any line has that column."""
        return any(map(math.isfinite, self.columns[name]))

    def values(self, name: str, rows: Sequence[int]) -> tuple[list[int], list[float]]:
        """Steps and values of a column at these rows, where it has one that is finite."""
        column = self.columns[name]
        kept = [row for row in rows if math.isfinite(column[row])]
        return [self.steps[row] for row in kept], [column[row] for row in kept]

    def median(self, name: str, rows: Sequence[int]) -> float | None:
        """The median of a column over these rows; None where there is no value."""
        values = self.values(name, rows)[1]
        return statistics.median(values) if values else None


def read(path: Path) -> Series:
    """Read a `metrics.jsonl`; lines that are cut short or not of this kind are passed over."""
    series = Series(columns={name: array("d") for name in (*COLUMNS, *_spread_columns())})
    for line in read_json_lines(path):
        if not isinstance(line, dict) or not _is_placed(line):
            continue
        if "validation_loss" in line:
            series.validations[line["step"]] = _number(line["validation_loss"])
        elif "loss" in line:
            _add(series, line)
    return series


def thinned(xs: Sequence[int], ys: Sequence[float], buckets: int = 400) -> tuple[list[int], list[float]]:
    """Not more than twice as many points as buckets: the lowest and the highest of each, so that no spike is lost."""
    if len(xs) <= 2 * buckets:
        return list(xs), list(ys)
    kept: list[int] = []
    for bucket in range(buckets):
        rows = range(bucket * len(xs) // buckets, (bucket + 1) * len(xs) // buckets)
        kept += sorted({min(rows, key=lambda row: _low(ys[row])), max(rows, key=lambda row: _high(ys[row]))})
    # A curve ends where the run does.
    kept = sorted({0, *kept, len(xs) - 1})
    return [xs[row] for row in kept], [ys[row] for row in kept]


def smoothed(xs: Sequence[int], ys: Sequence[float], points: int = 120) -> tuple[list[float], list[float]]:
    """The mean of ever so many neighbours: that many points which show where a noisy curve goes."""
    size = max(1, -(-len(xs) // points))
    out_x, out_y = [], []
    for start in range(0, len(xs) - size + 1, size):
        values = [value for value in ys[start : start + size] if math.isfinite(value)]
        if values:
            out_x.append((xs[start] + xs[start + size - 1]) / 2)
            out_y.append(statistics.fmean(values))
    return out_x, out_y


def _add(series: Series, line: Mapping[str, Any]) -> None:
    series.steps.append(line["step"])
    series.times.append(line["time"])
    series.attempts.append(line["attempt"])
    series.replayed += line.get("replayed") is True
    for name in COLUMNS:
        series.columns[name].append(_number(line.get(name)))
    ranks = line.get("ranks") or {}
    for name in SPREADS:
        apart = ranks.get(name) or {}
        for end in ("min", "max"):
            series.columns[f"{name}_{end}"].append(_number(apart.get(end)))
    if "optimizer_seconds" in ranks:
        series.slowest[line["attempt"], ranks["optimizer_seconds"]["max_rank"]] += 1


def _spread_columns() -> Iterator[str]:
    return (f"{name}_{end}" for name in SPREADS for end in ("min", "max"))


def _is_placed(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("time"), int | float) and all(isinstance(line.get(n), int) for n in ("step", "attempt"))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _key(worst: float) -> Callable[[float], float]:
    return lambda value: worst if math.isnan(value) else value


_low, _high = _key(math.inf), _key(-math.inf)
