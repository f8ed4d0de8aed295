"""Where a run's time went: each second from its first submission to its end is in exactly one part.

What happened is painted onto the time line in layers: waiting and attempts first, what attempts did over that. A second
belongs to what was painted last, so that the parts add up to the wall time whatever was written down, and none is
negative whatever the clocks of the hosts said."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_slurm.report.history import AttemptHistory, History
from titan_slurm.run import events
from titan_slurm.run.verdict import HUNG

QUEUE = "queue"
START_UP = "start_up"
TRAINING = "training"
VALIDATION = "validation"
SAVING = "saving"
LOST = "lost"
HANG = "hang"
SHUT_DOWN = "shut_down"
IDLE = "idle"

PARTS = {
    TRAINING: "steps that count",
    VALIDATION: "training stands still for it",
    SAVING: "training stands still for a checkpoint",
    START_UP: "from the scheduler's start to the first step, and what that takes beyond the others",
    LOST: "steps that were done again, or have to be: no checkpoint had them",
    HANG: "no step ended, until the watchdog",
    SHUT_DOWN: "from the last step, or its save, to the verdict",
    QUEUE: "waiting for nodes, and the delay after a crash",
    IDLE: "ended, and not yet submitted again",
}
_PAUSES = {events.SAVE_BEGIN: SAVING, events.VALIDATED: VALIDATION}


@dataclass(frozen=True)
class Interval:
    """Some seconds, the part that they belong to, and the attempt if they are one's."""

    begin: float
    end: float
    part: str
    attempt: int | None = None

    @property
    def seconds(self) -> float:
        """How many."""
        return self.end - self.begin


def partition(history: History, now: float | None, *, running: bool) -> list[Interval]:
    """The time line, in order and without gaps. `now`: for a run that is still the scheduler's; None for one that has
    ended, whose last sign of life is then its end. `running`: whether its ranks are at work."""
    return flatten(list(_paint(history, now, running)))


def kept_steps(history: History, *, running: bool) -> dict[int, float]:
    """Of each attempt, the step up to which its work still counts; infinity where all of it does."""
    kept, limit, went_on = {}, math.inf, False
    for attempt in reversed(history.attempts):
        at_work = running and attempt is history.attempts[-1] and not attempt.verdict
        # Until a later attempt has loaded a checkpoint, it is the newest one that will be loaded.
        if not went_on and not at_work and not attempt.completed:
            limit = min(limit, attempt.saved_step)
        kept[attempt.number] = limit
        if attempt.loaded_step is not None:
            limit, went_on = min(limit, attempt.loaded_step), True
    return kept


def flatten(layers: list[Interval]) -> list[Interval]:
    """Intervals that do not overlap; where some did, the last of them stands."""
    layers = [layer for layer in layers if layer.end > layer.begin]
    turns = sorted(
        [(layer.begin, 1, i) for i, layer in enumerate(layers)] + [(v.end, 0, i) for i, v in enumerate(layers)]
    )
    flat: list[Interval] = []
    current: set[int] = set()
    since = 0.0
    for time, begins, index in turns:
        if current and time > since:
            top = layers[max(current)]
            if flat and flat[-1].end == since and (flat[-1].part, flat[-1].attempt) == (top.part, top.attempt):
                since = flat.pop().begin
            flat.append(Interval(since, time, top.part, top.attempt))
        since = time
        (current.add if begins else current.remove)(index)
    return flat


def _paint(history: History, now: float | None, running: bool) -> Iterator[Interval]:
    kept = kept_steps(history, running=running)
    clock: float | None = None
    before: AttemptHistory | None = None
    for attempt in history.attempts:
        at_work = running and attempt is history.attempts[-1] and not attempt.verdict
        first = min((line["time"] for line in attempt.submissions_before), default=attempt.begin)
        clock = first if clock is None else clock
        # Another host's clock may say that it began before the one before it had ended.
        begin = max(clock, attempt.begin)
        yield from _gap(clock, begin, before, attempt.submissions_before, history.cancelled)
        end = max(begin, now if at_work and now is not None else _end(attempt))
        for interval in _attempt(attempt, begin, end, kept[attempt.number], running=at_work):
            yield _clipped(interval, begin, end)
        clock, before = end, attempt
    later = history.submissions_after
    if clock is None and not later:
        return
    clock = min(line["time"] for line in later) if clock is None else clock
    signs = [line["time"] for line in later] + ([history.cancelled] if history.cancelled else [])
    end = max([clock, *signs]) if now is None else max(clock, now)
    yield from _gap(clock, end, before, later, history.cancelled)


def _end(attempt: AttemptHistory) -> float:
    """When it ended: at its verdict, or at its last sign of life where that was found out later."""
    time = attempt.verdict.get("time")
    if time is None or attempt.given_late:
        return attempt.last_sign
    return max(attempt.last_sign, float(time))


def _gap(
    begin: float,
    end: float,
    before: AttemptHistory | None,
    submissions: Iterable[Mapping[str, Any]],
    cancelled: float | None,
) -> Iterator[Interval]:
    """Between two attempts: it waits where the scheduler has it, and is idle where nobody has submitted it."""
    submissions = list(submissions)
    turns = [(line["time"], QUEUE if line["event"] == events.QUEUED else IDLE) for line in submissions]
    if cancelled is not None and begin <= cancelled <= end:
        turns.append((cancelled, IDLE))
    # Where nothing is said, it came back by itself unless somebody has submitted it.
    came_back = before is None or before.verdict.get("again", not submissions)
    state = QUEUE if came_back else IDLE
    for time, then in sorted(turns):
        time = min(max(time, begin), end)
        yield Interval(begin, time, state)
        begin, state = time, then
    yield Interval(begin, end, state)


def _attempt(attempt: AttemptHistory, begin: float, end: float, kept: float, *, running: bool) -> Iterator[Interval]:
    """What an attempt did, in layers."""
    number, trained = attempt.number, training_begin(attempt)
    hung = attempt.verdict.get("verdict") == HUNG
    if trained is None:
        yield Interval(begin, end, START_UP, number)
        if hung:
            yield Interval(attempt.last_sign, end, HANG, number)
        return
    yield Interval(begin, trained, START_UP, number)
    yield Interval(trained, end, SHUT_DOWN, number)
    yield from _steps(attempt, trained, kept)
    last = attempt.points[-1][0] if attempt.points else trained
    under_way = [line["event"] for line in attempt.lines if line["event"] in (events.STOPPED, events.FINISHED)]
    if running and not under_way:
        yield Interval(last, end, TRAINING, number)
    elif not under_way:
        # The step in which it ended; what is beyond the usual time of one is the way to the verdict.
        yield Interval(last, min(end, last + _turn(attempt)), LOST, number)
    for pause in attempt.pauses(end):
        yield Interval(pause.begin, pause.end, _PAUSES[pause.event], number)
    if hung:
        yield Interval(attempt.last_sign, end, HANG, number)


def _steps(attempt: AttemptHistory, trained: float, kept: float) -> Iterator[Interval]:
    """Its steps up to the last that is known to have ended; from where they no longer count, they are lost."""
    points = [(trained, attempt.loaded_step or 0), *attempt.points]
    lost_from = points[-1][0]
    for (time, step), (next_time, next_step) in itertools.pairwise(points):
        if next_step > kept:
            part = max(0.0, kept - step) / max(1, next_step - step)
            lost_from = time + part * (next_time - time)
            break
    yield Interval(trained, lost_from, TRAINING, attempt.number)
    yield Interval(lost_from, points[-1][0], LOST, attempt.number)


def training_begin(attempt: AttemptHistory) -> float | None:
    """When its first step began, had it taken as long as the others; None if it came to none."""
    end = attempt.first_step_end()
    if end is None:
        return None
    loaded = attempt.time_of(events.CHECKPOINT_LOADED)
    return max(end - attempt.step_seconds, attempt.begin if loaded is None else loaded)


def _turn(attempt: AttemptHistory) -> float:
    """The usual time between two of its signs of life."""
    times = [time for time, _ in attempt.points]
    turns = sorted(later - time for time, later in itertools.pairwise(times))
    return turns[len(turns) // 2] if turns else attempt.step_seconds


def _clipped(interval: Interval, begin: float, end: float) -> Interval:
    return Interval(max(interval.begin, begin), min(interval.end, end), interval.part, interval.attempt)
