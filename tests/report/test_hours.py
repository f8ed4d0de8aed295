"""Hours add up, whatever was written down and whatever the clocks said."""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.report.conftest import WALL_SECONDS
from titan_slurm.report.hours import PARTS, Interval, flatten
from titan_slurm.report.report import Report, State, build
from titan_slurm.run import events
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import append_json_line, write_json

MakeRun = Callable[..., RunDirectory]
ENDED = State("failed", "", 10_000.0, active=False)


def seconds(report: Report) -> dict[str, float]:
    """The parts that have any, rounded."""
    return {part.name: round(part.seconds, 3) for part in report.parts if part.seconds}


def check_partition(report: Report) -> None:
    """Each second of the wall time is in one part, of one attempt or of none."""
    assert all(part.seconds >= 0 for part in report.parts)
    assert math.fsum(part.seconds for part in report.parts) == pytest.approx(report.wall_seconds)
    assert all(each.seconds > 0 for each in report.timeline)
    assert all(one.end == other.begin for one, other in itertools.pairwise(report.timeline))
    of_attempts = math.fsum(each.seconds for each in report.timeline if each.attempt is not None)
    assert math.fsum(row.seconds for row in report.attempts) == pytest.approx(of_attempts)
    for row in report.attempts:
        assert math.fsum(row.parts.values()) == pytest.approx(row.seconds)
        assert all(value >= 0 for value in row.start_up.values())
        assert row.steps_lost >= 0
    for share in (report.goodput.scheduling, report.goodput.runtime, report.goodput.total):
        assert share is None or 0 <= share <= 1


def test_the_hours_of_an_interrupted_run_are_its_wall_time(interrupted: RunDirectory, ended: State) -> None:
    report = build(interrupted, ended)
    check_partition(report)
    assert sum(part.seconds for part in report.parts) == pytest.approx(WALL_SECONDS, rel=0.01)
    assert [(row.verdict, row.first_step, row.last_step, row.steps_lost) for row in report.attempts] == [
        ("preempted", 1, 57, 0),
        ("crashed", 58, 110, 30),
        ("hung", 81, 150, 30),
        ("cancelled", 121, 207, 0),
        ("completed", 208, 240, 0),
    ]
    # What the metrics have twice is what was lost.
    assert (report.steps_lost, report.steps_replayed, report.step) == (60, 60, 240)
    found = seconds(report)
    assert set(found) == set(PARTS) - {"validation"}
    # The watchdog gave up after 15 s, the ranks were given as long to go; between cancel and resume there were 20 s.
    assert 15 < found["hang"] < 35
    assert 20 < found["idle"] < 21
    # The delay after the crash was 4 s.
    assert 4 < found["queue"] < 5
    assert found["training"] == pytest.approx(240 * 0.6, rel=0.1)


@pytest.mark.parametrize("state", ["running", "requeued", "failed"])
def test_an_event_file_that_ends_anywhere(interrupted: RunDirectory, state: str) -> None:
    lines = interrupted.events_file.read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])["time"]
    for count in range(len(lines) + 1):
        interrupted.events_file.write_text("".join(lines[:count]))
        check_partition(build(interrupted, State(state, "", last + 60.0, active=state != "failed")))


def test_a_run_that_was_killed_at_any_moment(interrupted: RunDirectory) -> None:
    lines = interrupted.events_file.read_text().splitlines(keepends=True)
    logged = interrupted.metrics_file.read_text().splitlines(keepends=True)
    verdicts = {attempt.number: attempt.verdict() or {} for attempt in interrupted.attempts()}
    for line in (json.loads(each) for each in lines):
        now = line["time"]
        interrupted.events_file.write_text("".join(each for each in lines if json.loads(each)["time"] <= now))
        interrupted.metrics_file.write_text("".join(each for each in logged if json.loads(each)["time"] <= now))
        for attempt in interrupted.attempts():
            if verdicts[attempt.number]["time"] > now:
                (attempt.path / "verdict.json").unlink(missing_ok=True)
            else:
                write_json(attempt.path / "verdict.json", verdicts[attempt.number])
            # Nor had it begun.
            folder = attempt.path / "attempt.json"
            if folder.exists() and attempt.facts()["started"] > now:
                folder.rename(folder.with_suffix(".later"))
        for later in interrupted.attempts_folder.glob("*/attempt.later"):
            if json.loads(later.read_text())["started"] <= now:
                later.rename(later.with_suffix(".json"))
        for state in (State("running", "", now, active=True), State("failed", "", now, active=False)):
            check_partition(build(interrupted, state))


def test_hosts_with_other_clocks(interrupted: RunDirectory, ended: State) -> None:
    lines = [json.loads(line) for line in interrupted.events_file.read_text().splitlines()]
    for ahead in (-3600.0, -5.0, 5.0, 3600.0):
        for other in (2, None):
            shifted = [line | {"time": line["time"] + ahead * (line["attempt"] == other)} for line in lines]
            interrupted.events_file.write_text("".join(json.dumps(line) + "\n" for line in shifted))
            check_partition(build(interrupted, ended))


def log(run: RunDirectory, attempt: int | None, *happened: tuple[float, str, dict[str, Any]]) -> None:
    """Write down events."""
    by = {None: events.SUBMIT}.get(attempt, events.RANK_0)
    for time, event, more in happened:
        append_json_line(run.events_file, {"time": time, "event": event, "by": by, "attempt": attempt} | more)


def train(run: RunDirectory, attempt: int, begin: float, first: int, last: int, every: float = 10.0) -> None:
    """An attempt that starts up in 30 s, of which 10 s are the first step's, and logs its steps."""
    log(run, attempt, (begin, events.STARTED, {}), (begin + 5, events.RANK_STARTED, {}))
    log(run, attempt, (begin + 20, events.CHECKPOINT_LOADED, {"step": first - 1}))
    for step in range(first, last + 1):
        time = begin + 40 + (step - first) * every
        line = {"step": step, "time": time, "attempt": attempt, "loss": 1 / step, "tokens": 8 * step}
        line["step_seconds"] = every
        append_json_line(run.metrics_file, line)
        if step == first:
            log(run, attempt, (time, events.FIRST_STEP, {"step": step}))


def judge(run: RunDirectory, attempt: int, time: float, verdict: str, saved_step: int, **more: Any) -> None:
    """Give a verdict, as the batch script does."""
    folder = run.attempts_folder / f"{attempt:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {"verdict": verdict, "reason": "", "time": time, "saved_step": saved_step, "again": True} | more
    write_json(folder / "verdict.json", found)


def test_each_part(make_run: MakeRun) -> None:
    run = make_run()
    log(run, None, (1000.0, events.QUEUED, {"resumed": False}))
    train(run, 1, 1100.0, 1, 5)
    # A save that blocks for 3 s, one of them before it began; a validation of 4 s; both after step 4.
    log(run, 1, (1171.0, events.SAVE_BEGIN, {"step": 4, "waited": 1.0}))
    log(run, 1, (1173.0, events.SAVE_COMMITTED, {"step": 4, "seconds_blocked": 3.0, "bytes": 1, "seconds": 2.0}))
    log(run, 1, (1177.0, events.VALIDATED, {"step": 4, "seconds": 4.0}))
    judge(run, 1, 1200.0, "crashed", 4)
    report = build(run, ENDED)
    check_partition(report)
    assert seconds(report) == {
        "queue": 100.0,
        "start_up": 30.0,
        # Steps 1 to 4, without the step that is lost and what it waited for.
        "training": 40.0,
        "saving": 3.0,
        "validation": 4.0,
        # What is left of the interval of step 5, and the usual time of a step for the one in which it crashed.
        "lost": 13.0,
        "shut_down": 10.0,
    }
    assert report.goodput.scheduling == pytest.approx(0.5)
    assert report.goodput.runtime == pytest.approx(0.4)
    assert report.goodput.total == pytest.approx(0.2)
    row = report.attempts[0]
    assert row.start_up == {"launch": 5.0, "checkpoint": 15.0, "first_step": 10.0}
    assert (row.first_step, row.last_step, row.steps_lost) == (1, 5, 1)


def test_a_fall_back_over_two_attempts(make_run: MakeRun) -> None:
    run = make_run()
    log(run, None, (0.5, events.QUEUED, {"resumed": False}))
    train(run, 1, 1.0, 1, 10)
    judge(run, 1, 200.0, "preempted", 8)
    train(run, 2, 300.0, 9, 12)
    judge(run, 2, 400.0, "preempted", 12)
    # Both checkpoints were bad.
    train(run, 3, 500.0, 5, 6)
    report = build(run, State("running", "", 600.0, active=True))
    check_partition(report)
    assert [row.steps_lost for row in report.attempts] == [6, 4, 0]
    assert report.step == 6
    assert report.attempts[-1].end is None


def test_figures_are_those_of_the_step_that_is_kept(make_run: MakeRun) -> None:
    run = make_run()
    log(run, None, (0.5, events.QUEUED, {"resumed": False}))
    train(run, 1, 1.0, 1, 13)
    judge(run, 1, 200.0, "crashed", 10)
    report = build(run, ENDED)
    # Dead: of its three last steps nothing is left, but that they were.
    assert (report.step, report.tokens, report.loss) == (10, 80, 0.1)
    assert [report.series.steps[row] for row in report.curve] == list(range(1, 14))
    train(run, 2, 300.0, 11, 11)
    report = build(run, State("running", "", 400.0, active=True))
    # Fallen back: the rows of the steps that it has not done again are no part of the curve.
    assert (report.step, report.tokens, report.loss) == (11, 88, 1 / 11)
    assert [report.series.steps[row] for row in report.curve] == list(range(1, 12))


def test_a_verdict_that_was_given_late_does_not_say_when_it_ended(make_run: MakeRun) -> None:
    run = make_run()
    log(run, None, (0.0, events.QUEUED, {"resumed": False}))
    train(run, 1, 10.0, 1, 3)
    judge(run, 1, 5000.0, "preempted", 0, late=True)
    train(run, 2, 5000.0, 1, 3)
    report = build(run, ENDED)
    check_partition(report)
    assert [(row.begin, row.end) for row in report.attempts] == [(10.0, 70.0), (5000.0, 5060.0)]
    assert seconds(report)["queue"] == 10.0 + 4930.0


def test_a_run_that_has_not_begun(make_run: MakeRun) -> None:
    run = make_run()
    report = build(run, State("created", "", 5.0, active=False))
    assert (report.wall_seconds, report.attempts, report.begin, report.goodput.total) == (0.0, [], None, None)
    log(run, None, (10.0, events.QUEUED, {"resumed": False}))
    waiting = build(run, State("queued", "", 30.0, active=True))
    assert (seconds(waiting), waiting.goodput.total) == ({"queue": 20.0}, 0.0)


def test_start_up_that_was_cut_short(make_run: MakeRun) -> None:
    run = make_run()
    log(run, None, (0.0, events.QUEUED, {"resumed": False}))
    log(run, 1, (10.0, events.STARTED, {}), (12.0, events.RANK_STARTED, {}), (20.0, events.IMPORTS_DONE, {}))
    judge(run, 1, 50.0, "crashed", 0)
    report = build(run, ENDED)
    assert seconds(report) == {"queue": 10.0, "start_up": 40.0}
    assert report.attempts[0].start_up == {"launch": 2.0, "imports": 8.0, "rendezvous": 30.0}
    assert report.attempts[0].first_step is None


def test_start_up_that_was_stopped(make_run: MakeRun) -> None:
    run = make_run()
    log(run, None, (0.0, events.QUEUED, {"resumed": False}))
    log(run, 1, (10.0, events.STARTED, {}), (12.0, events.RANK_STARTED, {}), (20.0, events.IMPORTS_DONE, {}))
    log(run, 1, (30.0, events.STOPPED, {"step": 0, "saved": False}))
    judge(run, 1, 32.0, "preempted", 0)
    report = build(run, ENDED)
    check_partition(report)
    assert seconds(report) == {"queue": 10.0, "start_up": 22.0}
    row = report.attempts[0]
    assert row.start_up == {"launch": 2.0, "imports": 8.0, "rendezvous": 12.0}
    assert (row.first_step, row.last_step) == (None, None)


def test_gpu_hours(make_run: MakeRun) -> None:
    run = make_run()
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps(plan | {"device": "cuda"}))
    log(run, None, (0.0, events.QUEUED, {"resumed": False}))
    train(run, 1, 3600.0, 1, 2)
    judge(run, 1, 7200.0, "crashed", 2)
    report = build(run, ENDED)
    # Two ranks for an hour; none while it waits.
    assert report.gpu_hours == pytest.approx(2.0)
    assert {part.name: part.gpu_hours for part in report.parts}["queue"] == 0.0


def test_a_node_that_holds_the_others_up_is_named(make_run: MakeRun) -> None:
    run = make_run()
    hosts = {1: ["a", "a", "b", "b"], 2: ["c", "c", "b", "b"]}
    for attempt, slowest in ((1, (2, 3, 2, 3, 0, 2)), (2, (3, 2, 3, 3, 2, 1))):
        folder = run.attempts_folder / f"{attempt:04d}"
        folder.mkdir(parents=True)
        write_json(folder / "hosts.json", {"hosts": hosts[attempt]})
        for step, rank in enumerate(slowest, 1):
            ranks = {"optimizer_seconds": {"min": 0.1, "min_rank": 0, "max": 0.2, "max_rank": rank}}
            line = {"step": step, "time": 1.0 * step, "attempt": attempt, "loss": 1.0, "ranks": ranks}
            append_json_line(run.metrics_file, line)
    assert build(run, ENDED).slowest == {"host": "b", "rank": None, "share": 10 / 12}
    for attempt in (1, 2):
        write_json(run.attempts_folder / f"{attempt:04d}" / "hosts.json", {"hosts": ["a"] * 4})
    # Of one node's ranks none is it by far.
    assert build(run, ENDED).slowest is None


def test_intervals_over_one_another() -> None:
    layers = [Interval(0, 10, "queue"), Interval(2, 4, "saving"), Interval(3, 6, "hang"), Interval(8, 7, "lost")]
    found = [(each.begin, each.end, each.part) for each in flatten(layers)]
    assert found == [(0, 2, "queue"), (2, 3, "saving"), (3, 6, "hang"), (6, 10, "queue")]
