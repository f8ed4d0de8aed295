"""What a report says of a run: made of the run directory alone, at any moment of the run's life.

Goodput is Google's ML Productivity Goodput, a product of three parts of one (Singh and Herrington, "Introducing ML
Productivity Goodput", Google Cloud blog, April 2024; Wongpanich et al., "ML Fleet Efficiency", MLSys 2026):

    scheduling  of the wall time, the part in which the run had all its nodes
    runtime     of that time, the part that went into steps that count: neither start-up nor saves nor lost work
    program     of the GPUs' peak, the part that those steps used: their MFU; unknown on a CPU
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from titan_slurm.report import history as histories
from titan_slurm.report import hours, series
from titan_slurm.report.history import START_UP_STEPS, AttemptHistory, History
from titan_slurm.report.hours import IDLE, PARTS, QUEUE, TRAINING, Interval
from titan_slurm.report.series import Series
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import finite
from titan_slurm.run.plan import Plan

FIRST_STEP = "first_step"
# Lines of which a slowest node is told.
_ENOUGH_LINES = 10
START_UP = (*(name for name, _ in START_UP_STEPS), FIRST_STEP)


@dataclass(frozen=True)
class State:
    """How a run stands, by the scheduler: what `titan-slurm status` says of it. Times are seconds since 1970."""

    state: str
    reason: str
    now: float
    active: bool
    """Whether the scheduler still has work with it."""

    @property
    def running(self) -> bool:
        """Whether its ranks are at work."""
        return self.state in ("running", "stopping")


@dataclass(frozen=True)
class Part:
    """One part of the wall time. `share` of one; `gpu_hours` None where there are no GPUs."""

    name: str
    seconds: float
    share: float
    gpu_hours: float | None
    meaning: str


@dataclass(frozen=True)
class Goodput:
    """Parts of one; None where it cannot be known."""

    scheduling: float | None
    runtime: float | None
    program: float | None
    total: float | None
    """The product; without `program` where that is unknown."""


@dataclass(frozen=True)
class AttemptRow:
    """One attempt. Steps are None where it came to none; `end` is None while it runs."""

    number: int
    verdict: str | None
    reason: str
    nodes: str
    ranks: int
    job_id: str
    begin: float
    end: float | None
    seconds: float
    first_step: int | None
    last_step: int | None
    steps_lost: int
    start_up: dict[str, float]
    """Seconds of each step of its start-up that it came to, in their order. `first_step` is what that step took beyond
    the others: compiling, warming up."""
    parts: dict[str, float]
    """Seconds of each part of its time."""


@dataclass(frozen=True)
class Report:
    """A run's report."""

    name: str
    path: str
    recipe: str
    state: str
    reason: str
    made: float
    begin: float | None
    end: float | None
    wall_seconds: float
    step: int
    """As far as it has come with what still counts; tokens and losses are those of the last logged step up to it."""
    max_steps: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    """The median over the logged steps."""
    mfu: float | None
    """Percent: the median over the logged steps."""
    step_seconds: float | None
    memory_reserved_gib: float | None
    """The most that any line says."""
    ranks: int
    device: str
    gpu_hours: float | None
    goodput: Goodput
    parts: list[Part]
    steps_lost: int
    steps_replayed: int
    slowest: dict[str, Any] | None
    """{"host", "rank", "share"}: the node, or of a single node the rank, whose optimizer took longest in that part of
    the logged steps; the other is None. None in all where it is one as often as another."""
    attempts: list[AttemptRow]
    timeline: list[Interval]
    series: Series
    curve: Sequence[int]
    """The rows of `series` that are the run's one curve."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: the fields above, without the logged steps, which are in `metrics.jsonl`; `goodput`, `parts`,
        `attempts` and `timeline` as tables of theirs. What is no number is null."""
        kept = {name: value for name, value in vars(self).items() if name not in ("series", "curve")}
        tables = {name: [asdict(each) for each in kept[name]] for name in ("parts", "attempts", "timeline")}
        plain: dict[str, Any] = finite(kept | tables | {"goodput": asdict(self.goodput)})
        return plain


def build(run: RunDirectory, state: State) -> Report:
    """The report of a run that stands like this."""
    plan = run.plan()
    logged = series.read(run.metrics_file)
    history = histories.read(run, logged)
    timeline = hours.partition(history, state.now if state.active else None, running=state.running)
    curve = logged.curve()
    rows = _attempts(history, timeline, plan, state)
    parts = _parts(timeline, rows, plan)
    step = _step(history, state)
    last = max((row for row in curve if logged.steps[row] <= step), key=lambda row: logged.steps[row], default=None)
    mfu = logged.median("mfu", curve)
    gpu_hours = [part.gpu_hours for part in parts if part.gpu_hours is not None]
    return Report(
        name=run.name,
        path=str(run.path),
        recipe=f"{plan.recipe} {plan.recipe_version}",
        state=state.state,
        reason=state.reason,
        made=state.now,
        begin=timeline[0].begin if timeline else None,
        end=timeline[-1].end if timeline else None,
        wall_seconds=timeline[-1].end - timeline[0].begin if timeline else 0.0,
        step=step,
        max_steps=plan.max_steps,
        tokens=int(_at(logged, "tokens", last) or 0),
        loss=_at(logged, "loss", last),
        validation_loss=_last_validation(logged, step),
        tokens_per_second=logged.median("tokens_per_second", curve),
        mfu=mfu,
        step_seconds=logged.median("step_seconds", curve),
        memory_reserved_gib=max(logged.values("memory_reserved_gib", curve)[1], default=None),
        ranks=plan.layout.world_size,
        device=plan.device,
        gpu_hours=sum(gpu_hours) if gpu_hours else None,
        goodput=_goodput(parts, mfu),
        parts=parts,
        steps_lost=sum(row.steps_lost for row in rows),
        steps_replayed=logged.replayed,
        slowest=_slowest(logged, history),
        attempts=rows,
        timeline=timeline,
        series=logged,
        curve=curve,
    )


def _step(history: History, state: State) -> int:
    """As far as the run has come with what still counts."""
    kept = hours.kept_steps(history, running=state.running)
    reached = [min(each.last_step, kept[each.number]) for each in history.attempts if each.last_step is not None]
    return int(max(reached, default=0))


def _parts(timeline: Sequence[Interval], rows: Sequence[AttemptRow], plan: Plan) -> list[Part]:
    ranks = {row.number: row.ranks for row in rows}
    wall = sum(interval.seconds for interval in timeline)
    found = []
    for name, meaning in PARTS.items():
        of_part = [interval for interval in timeline if interval.part == name]
        seconds = math.fsum(interval.seconds for interval in of_part)
        taken = math.fsum(each.seconds * ranks[each.attempt] for each in of_part if each.attempt is not None)
        gpu_hours = taken / 3600 if plan.device == "cuda" else None
        found.append(Part(name, seconds, seconds / wall if wall else 0.0, gpu_hours, meaning))
    return found


def _goodput(parts: Sequence[Part], mfu: float | None) -> Goodput:
    seconds = {part.name: part.seconds for part in parts}
    wall = sum(seconds.values())
    with_nodes = wall - seconds[QUEUE] - seconds[IDLE]
    program = mfu / 100 if mfu is not None else None
    if not wall or with_nodes <= 0:
        return Goodput(0.0 if wall else None, None, program, 0.0 if wall else None)
    scheduling, runtime = with_nodes / wall, seconds[TRAINING] / with_nodes
    return Goodput(scheduling, runtime, program, scheduling * runtime * (1.0 if program is None else program))


def _attempts(history: History, timeline: Sequence[Interval], plan: Plan, state: State) -> list[AttemptRow]:
    kept = hours.kept_steps(history, running=state.running)
    own: dict[int | None, list[Interval]] = {}
    for interval in timeline:
        own.setdefault(interval.attempt, []).append(interval)
    newest = history.attempts[-1:]
    return [
        _row(each, own.get(each.number, []), kept[each.number], plan, running=state.running and each in newest)
        for each in history.attempts
    ]


def _row(attempt: AttemptHistory, own: Sequence[Interval], kept: float, plan: Plan, *, running: bool) -> AttemptRow:
    """`own`: its part of the timeline. `running`: whether it is the one that runs, if it has no verdict."""
    parts: dict[str, float] = {}
    for interval in own:
        parts[interval.part] = parts.get(interval.part, 0.0) + interval.seconds
    begin, end = (own[0].begin, own[-1].end) if own else (attempt.begin, attempt.begin)
    loaded, last = attempt.loaded_step or 0, attempt.last_step
    return AttemptRow(
        number=attempt.number,
        verdict=attempt.verdict.get("verdict"),
        reason=str(attempt.verdict.get("reason", "")),
        nodes=str(attempt.facts.get("nodes", "")),
        ranks=len(attempt.hosts) or plan.layout.world_size,
        job_id=str(attempt.facts.get("job_id", "")),
        begin=begin,
        end=None if running and not attempt.verdict else end,
        seconds=end - begin,
        first_step=None if last is None else loaded + 1,
        last_step=last,
        steps_lost=0 if last is None else max(0, last - int(min(last, max(kept, loaded)))),
        start_up=_start_up(attempt, end),
        parts=parts,
    )


def _start_up(attempt: AttemptHistory, end: float) -> dict[str, float]:
    """How long each step of a start-up took; one that was cut short lasted to the end."""
    clock, found = attempt.begin, {}
    trained = hours.training_begin(attempt)
    if not attempt.lines:
        return {}
    for name, event in START_UP_STEPS:
        time = attempt.time_of(event)
        if time is None and trained is None:
            found[name] = max(0.0, end - clock)
            return found
        if time is not None:
            found[name] = max(0.0, time - clock)
            clock = max(clock, time)
    found[FIRST_STEP] = max(0.0, (end if trained is None else trained) - clock)
    return found


def _slowest(logged: Series, history: History) -> dict[str, Any] | None:
    """Who holds the others up: a node, or on a single one a rank."""
    hosts = {attempt.number: attempt.hosts for attempt in history.attempts}
    by_node = len({host for each in hosts.values() for host in each}) > 1
    named: Counter[str | int] = Counter()
    everybody: set[str | int] = set()
    for (attempt, rank), count in logged.slowest.items():
        of_attempt = hosts.get(attempt, [])
        if rank < len(of_attempt):
            named[of_attempt[rank] if by_node else rank] += count
            everybody |= set(of_attempt if by_node else range(len(of_attempt)))
    if named.total() < _ENOUGH_LINES or len(everybody) < 2:
        return None
    who, count = named.most_common(1)[0]
    share = count / named.total()
    # By chance, each would be it as often as the others.
    if share < (1 + 1 / len(everybody)) / 2:
        return None
    return {"host": who if by_node else None, "rank": None if by_node else who, "share": share}


def _last_validation(logged: Series, step: int) -> float | None:
    """The newest up to a step."""
    return logged.validations.get(max((each for each in logged.validations if each <= step), default=-1))


def _at(logged: Series, name: str, row: int | None) -> float | None:
    return None if row is None or not math.isfinite(logged.columns[name][row]) else logged.columns[name][row]
