"""What happened to a run, put together per attempt from its events, its attempts' folders and its logged steps. Any of
these may be missing: whoever wrote them can have been killed at any moment."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from titan_slurm.report.series import Series
from titan_slurm.run import events
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.verdict import COMPLETED

# The steps of a start-up, in their order, and the event that ends each.
START_UP_STEPS = (
    ("launch", events.RANK_STARTED),
    ("imports", events.IMPORTS_DONE),
    ("rendezvous", events.RENDEZVOUS),
    ("data", events.DATA_READY),
    ("model", events.MODEL_BUILT),
    ("checkpoint", events.CHECKPOINT_LOADED),
)
_SAVES = (events.SAVE_STAGED, events.SAVE_COMMITTED)


@dataclass(frozen=True)
class Pause:
    """Seconds of an attempt in which training stood still, for a save or a validation."""

    begin: float
    end: float
    event: str


@dataclass
class AttemptHistory:
    """One attempt. Times are those of its own hosts' clocks."""

    number: int
    facts: Mapping[str, Any]
    verdict: Mapping[str, Any]
    """Empty while there is none."""
    hosts: list[str]
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    """Its events from its start to its ranks' last, which are signs of life."""
    submissions_before: list[Mapping[str, Any]] = field(default_factory=list)
    """What whoever submits wrote since the attempt before."""
    points: list[tuple[float, int]] = field(default_factory=list)
    """When which step had ended: as logged, and as its saves say. In order; neither time nor step ever falls."""
    step_seconds: float = 0.0
    """What one of its steps takes, without the first; of the whole run where it has none, 0 where nobody knows."""

    @property
    def times(self) -> list[float]:
        """Each instant at which it is known to have lived."""
        return [line["time"] for line in self.lines] + [time for time, _ in self.points]

    @property
    def begin(self) -> float:
        """When the scheduler started it."""
        started = self.facts.get("started")
        return float(started) if started else min(self.times, default=self.verdict.get("time", 0.0))

    @property
    def last_sign(self) -> float:
        """Its last sign of life before a verdict."""
        return max((time for time in self.times), default=self.begin)

    @property
    def given_late(self) -> bool:
        """Whether its verdict was found out later, and so says nothing of when it ended."""
        return bool(self.verdict.get("late"))

    @property
    def completed(self) -> bool:
        """Whether the run's last step was done."""
        return self.verdict.get("verdict") == COMPLETED or self.time_of(events.FINISHED) is not None

    def time_of(self, event: str) -> float | None:
        """When that happened first."""
        return next((line["time"] for line in self.lines if line["event"] == event), None)

    @property
    def loaded_step(self) -> int | None:
        """The step that it went on from; None if it did not come so far."""
        said = [line.get("step", 0) for line in self.lines if line["event"] == events.CHECKPOINT_LOADED]
        if said:
            return int(said[0])
        return int(self.facts.get("saved_step") or 0) if self.points else None

    @property
    def last_step(self) -> int | None:
        """The last step that it is known to have ended."""
        return self.points[-1][1] if self.points else None

    @property
    def saved_step(self) -> int:
        """The newest committed step when it ended, or by now."""
        if "saved_step" in self.verdict:
            return int(self.verdict["saved_step"])
        committed = [int(line["step"]) for line in self.lines if line["event"] == events.SAVE_COMMITTED]
        return max([*committed, self.loaded_step or 0, int(self.facts.get("saved_step") or 0)])

    def first_step_end(self) -> float | None:
        """When its first step had ended."""
        times = [time for time in (self.time_of(events.FIRST_STEP), *(time for time, _ in self.points[:1])) if time]
        return min(times, default=None)

    def pauses(self, end: float) -> Iterator[Pause]:
        """Saves and validations. One that was cut short lasted until the next step, or to the end."""
        for line in self.lines:
            if line["event"] == events.VALIDATED:
                yield Pause(line["time"] - line.get("seconds", 0.0), line["time"], events.VALIDATED)
            elif line["event"] == events.SAVE_BEGIN:
                begin = line["time"] - line.get("waited", 0.0)
                yield Pause(begin, self._save_end(line, begin, end), events.SAVE_BEGIN)

    def _save_end(self, begun: Mapping[str, Any], begin: float, end: float) -> float:
        of_step = [line for line in self.lines if line.get("step") == begun["step"] and line["time"] >= begun["time"]]
        for line in of_step:
            if line["event"] in _SAVES and "seconds_blocked" in line:
                return float(begin + line["seconds_blocked"])
        failed = [line["time"] for line in of_step if line["event"] == events.SAVE_FAILED]
        went_on = [time for time, step in self.points if step > begun["step"] and time > begun["time"]]
        return float(min([*failed, *went_on, end]))


@dataclass(frozen=True)
class History:
    """A run's attempts, oldest first, and the submissions after the newest."""

    attempts: list[AttemptHistory]
    submissions_after: list[Mapping[str, Any]]
    cancelled: float | None
    """When its user last ended it."""


def read(run: RunDirectory, series: Series) -> History:
    """The history of a run whose metrics are `series`."""
    lines = [line for line in run.events() if _is_event(line)]
    folders = {attempt.number: attempt for attempt in run.attempts()}
    numbers = sorted({*folders, *series.attempts, *(line["attempt"] for line in lines if line["attempt"])})
    said = {line["attempt"]: line for line in lines if line["event"] == events.VERDICT}
    attempts = {number: _attempt(number, folders.get(number), said.get(number, {})) for number in numbers}
    waiting = _deal(lines, attempts)
    rows = series.of_attempts()
    median = series.median("step_seconds", range(len(series)))
    for attempt in attempts.values():
        own = rows.get(attempt.number, [])
        attempt.points = _points(attempt, ((series.times[row], series.steps[row]) for row in own))
        attempt.step_seconds = series.median("step_seconds", own[1:]) or median or 0.0
    wish = run.cancelled()
    return History(list(attempts.values()), waiting, wish["time"] if wish else None)


def _attempt(number: int, folder: Attempt | None, said: Mapping[str, Any]) -> AttemptHistory:
    if folder is None:
        return AttemptHistory(number, {}, said, [])
    return AttemptHistory(number, folder.facts(), folder.verdict() or said, folder.hosts())


def _deal(lines: Iterable[Mapping[str, Any]], attempts: Mapping[int, AttemptHistory]) -> list[Mapping[str, Any]]:
    """Give each attempt its events. Returns the submissions that no attempt has followed."""
    waiting: list[Mapping[str, Any]] = []
    for line in lines:
        if line["attempt"] is None:
            waiting.append(line)
        elif line.get("by") == events.RANK_0 or line["event"] == events.STARTED:
            attempt = attempts[line["attempt"]]
            # The order of the lines counts, not the submitting host's clock.
            if not attempt.lines:
                attempt.submissions_before, waiting = waiting, []
            attempt.lines.append(line)
    return waiting


def _points(attempt: AttemptHistory, logged: Iterable[tuple[float, int]]) -> list[tuple[float, int]]:
    said = [(time, step) for time, step in logged if math.isfinite(time)]
    # What is stopped while it starts up says a step as well, which none of its own is.
    ended = (events.FIRST_STEP, events.SAVE_BEGIN, *([events.STOPPED] if attempt.time_of(events.FIRST_STEP) else []))
    for line in attempt.lines:
        if line["event"] in ended and "step" in line:
            said.append((line["time"] - line.get("waited", 0.0), line["step"]))
    points: list[tuple[float, int]] = []
    for time, step in sorted(said):
        # The rank that logs steps and the one that writes events may have different clocks.
        if not points or step > points[-1][1]:
            points.append((time, step))
    return points


def _is_event(line: object) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("time"), int | float)
        and isinstance(line.get("event"), str)
        and isinstance(line.get("attempt"), int | None)
    )
