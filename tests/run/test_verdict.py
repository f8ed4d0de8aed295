"""Why an attempt ended and whether the run comes back: the table of what Slurm does, row by row, and the budgets."""

import dataclasses
from typing import Any

import pytest

from titan_slurm.run.job import JobFacts
from titan_slurm.run.verdict import (
    CANCELLED,
    COMPLETED,
    CRASHED,
    HUNG,
    NODE_FAILURE,
    PREEMPTED,
    TIME_LIMIT,
    Budgets,
    Evidence,
    Next,
    Past,
    after,
    judge,
    judge_lost,
)

NOTHING = Evidence(
    exit_code=0,
    finished=None,
    stopped=None,
    error=None,
    silent_ranks=[],
    cancel_wish=None,
    job=None,
    restart_count=0,
)
RUNNING = JobFacts("RUNNING", restarts=0, end_time=2000.0, preempt_time=None)
IN_GRACE = dataclasses.replace(RUNNING, preempt_time=1000.0)
COMPLETING = dataclasses.replace(RUNNING, state="COMPLETING")
SAVED = {"signal": "SIGTERM", "step": 7, "saved": True, "why": "", "time": 1.0}
NOT_SAVED = SAVED | {"saved": False, "why": "a save takes 60 s, and 20 s are left"}
WARNED = SAVED | {"signal": "SIGUSR2"}
FINISHED = {"step": 60, "time": 1.0}
WISH = {"user": "ada", "job_id": "1", "time": 1.0}


def error(text: str, *, step: int | None = 3, kind: str = CRASHED) -> dict[str, Any]:
    """What a rank reports."""
    return {"rank": 1, "host": "n2", "error": text, "traceback": "", "step": step, "kind": kind, "time": 1.0}


@pytest.mark.parametrize(
    ("found", "verdict", "reason"),
    [
        pytest.param(
            {"exit_code": 85, "stopped": SAVED, "job": IN_GRACE},
            PREEMPTED,
            "preempted by Slurm; stopped and saved at step 7",
            id="grace_saved",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": NOT_SAVED, "job": IN_GRACE},
            PREEMPTED,
            "preempted by Slurm; left at step 7 without saving: a save takes 60 s, and 20 s are left",
            id="grace_not_saved",
        ),
        pytest.param(
            {"exit_code": 1, "error": error("RuntimeError: x"), "job": IN_GRACE},
            PREEMPTED,
            "preempted by Slurm; the ranks could not stop at a step",
            id="grace_not_stopped",
        ),
        pytest.param(
            {"exit_code": 0, "job": IN_GRACE},
            PREEMPTED,
            "preempted by Slurm; the ranks could not stop at a step",
            id="grace_start_up",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": SAVED, "job": dataclasses.replace(COMPLETING, restarts=3), "restart_count": 2},
            PREEMPTED,
            "Slurm requeued the job (COMPLETING); stopped and saved at step 7",
            id="no_grace",
        ),
        pytest.param(
            {"exit_code": 143, "job": dataclasses.replace(COMPLETING, state="PENDING", restarts=1)},
            PREEMPTED,
            "Slurm requeued the job (PENDING); the ranks could not stop at a step",
            id="requeued_by_the_user_or_node_down",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": SAVED, "job": COMPLETING}, CANCELLED, "by scancel (COMPLETING)", id="scancel"
        ),
        pytest.param(
            {"exit_code": 143, "job": dataclasses.replace(COMPLETING, restarts=2), "restart_count": 2},
            CANCELLED,
            "by scancel (COMPLETING)",
            id="scancel_of_a_job_that_came_back_before",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": SAVED, "job": dataclasses.replace(COMPLETING, preempt_time=1000.0)},
            CANCELLED,
            "by scancel (COMPLETING)",
            id="scancel_in_grace",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": SAVED, "job": IN_GRACE, "cancel_wish": WISH}, CANCELLED, "by ada", id="wish"
        ),
        pytest.param(
            {"exit_code": 0, "finished": FINISHED, "cancel_wish": WISH},
            COMPLETED,
            "all 60 steps done",
            id="wish_too_late",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": WARNED, "job": RUNNING, "requeue_wish": WISH},
            PREEMPTED,
            "requeued by ada; stopped and saved at step 7",
            id="requeue_wish",
        ),
        pytest.param(
            {"exit_code": 140, "requeue_wish": WISH},
            PREEMPTED,
            "requeued by ada; the ranks could not stop at a step",
            id="requeue_wish_before_the_ranks_could_hear_it",
        ),
        pytest.param(
            {"exit_code": 137, "requeue_wish": WISH},
            CRASHED,
            "a rank was killed by SIGKILL (out of memory, perhaps) before it could say why",
            id="requeue_wish_and_a_kill",
        ),
        pytest.param(
            {"exit_code": 139, "finished": FINISHED}, COMPLETED, "all 60 steps done", id="finished_and_fell_over"
        ),
        pytest.param(
            {"exit_code": 1, "error": error("RuntimeError: x"), "requeue_wish": WISH},
            CRASHED,
            "rank 1 on n2: RuntimeError: x",
            id="requeue_wish_and_a_crash",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": WARNED, "job": RUNNING},
            TIME_LIMIT,
            "the time limit is near; stopped and saved at step 7",
            id="time_limit",
        ),
        pytest.param(
            {"exit_code": 137, "job": dataclasses.replace(COMPLETING, reason="TimeLimit")},
            TIME_LIMIT,
            "the time limit is over; the ranks could not stop at a step",
            id="time_limit_over",
        ),
        pytest.param(
            {"exit_code": 0, "finished": FINISHED, "job": RUNNING}, COMPLETED, "all 60 steps done", id="finished"
        ),
        pytest.param(
            {"exit_code": 0, "finished": FINISHED, "job": IN_GRACE},
            COMPLETED,
            "all 60 steps done",
            id="finished_in_grace",
        ),
        pytest.param(
            {"exit_code": 0, "finished": FINISHED, "job": COMPLETING},
            COMPLETED,
            "all 60 steps done",
            id="finished_and_scancel",
        ),
        pytest.param(
            {"exit_code": 1, "error": error("ValueError: bad"), "job": RUNNING},
            CRASHED,
            "rank 1 on n2: ValueError: bad",
            id="crash",
        ),
        pytest.param(
            {"exit_code": 137, "error": error("RuntimeError: lost"), "silent_ranks": [3], "job": RUNNING},
            CRASHED,
            "rank 1 on n2: RuntimeError: lost; without a word: rank 3",
            id="killed_rank",
        ),
        pytest.param(
            {"exit_code": 137, "error": error("RuntimeError: lost"), "silent_ranks": [*range(2, 12)], "job": RUNNING},
            CRASHED,
            "rank 1 on n2: RuntimeError: lost; without a word: ranks 2, 3, 4, 5, 6, 7, 8, 9, …",
            id="killed_node",
        ),
        pytest.param(
            {"exit_code": 137, "job": RUNNING},
            CRASHED,
            "a rank was killed by SIGKILL (out of memory, perhaps) before it could say why",
            id="all_killed",
        ),
        pytest.param({"exit_code": 139, "job": RUNNING}, CRASHED, "a rank was killed by signal 11", id="segfault"),
        pytest.param(
            {"exit_code": 86, "error": error("no step ended for 300 s", kind=HUNG), "silent_ranks": [0]},
            HUNG,
            "rank 1 on n2: no step ended for 300 s; without a word: rank 0",
            id="hung",
        ),
        pytest.param(
            {"exit_code": 0, "job": RUNNING},
            CRASHED,
            "the ranks left without an error before the last step",
            id="exit_0_without_finish",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": SAVED, "job": RUNNING},
            PREEMPTED,
            "asked to stop by SIGTERM; stopped and saved at step 7",
            id="sigterm_without_preempt_time",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": SAVED},
            PREEMPTED,
            "asked to stop by SIGTERM; stopped and saved at step 7",
            id="no_slurm_sigterm",
        ),
        pytest.param(
            {"exit_code": 85, "stopped": WARNED},
            TIME_LIMIT,
            "the time limit is near; stopped and saved at step 7",
            id="no_slurm_sigusr2",
        ),
        pytest.param({"exit_code": 3}, CRASHED, "a rank left with exit code 3 and without an error", id="no_slurm"),
    ],
)
def test_the_verdict_on_what_an_attempt_left(found: dict[str, Any], verdict: str, reason: str) -> None:
    judged = judge(dataclasses.replace(NOTHING, **found))
    assert (judged.verdict, judged.reason) == (verdict, reason)


@pytest.mark.parametrize(
    ("text", "sure"),
    [
        ("ValueError: bad", True),
        ("FileNotFoundError: no such file", True),
        ("BadInputError: Accelerator.prepare: a second model: a checkpoint holds one", True),
        ("WrongArgumentsError: the script left with 2", True),
        ("OutOfMemoryError: CUDA out of memory", True),
        ("NoUsableCheckpointError: only bad ones are left", True),
        # A file system or a network may be better next time.
        ("RuntimeError: connection refused", False),
        ("OSError: stale file handle", False),
        ("DistNetworkError: timed out: ValueError", False),
    ],
)
def test_an_error_is_sure_to_repeat_only_before_the_first_step(text: str, sure: bool) -> None:
    for step in (None, 0, 1, 100):
        evidence = dataclasses.replace(NOTHING, exit_code=1, error=error(text, step=step), job=RUNNING)
        judged = judge(evidence)
        assert (judged.verdict, judged.repeats) == (CRASHED, sure and step is None)
        # A preemption that comes on top of it is none of the run's faults.
        assert not judge(dataclasses.replace(evidence, job=IN_GRACE)).repeats
        # What has trained before may have met a bad node, unless it is its own folder that says so.
        later = judge(dataclasses.replace(evidence, has_advanced=True))
        assert later.repeats == (judged.repeats and "NoUsableCheckpoint" in text)


@pytest.mark.parametrize(
    ("finished", "stopped", "slurm_state", "verdict"),
    [
        (None, None, "PREEMPTED", PREEMPTED),
        (None, None, "REQUEUED", PREEMPTED),
        (None, SAVED, "NODE_FAIL", NODE_FAILURE),
        (None, WARNED, "TIMEOUT", TIME_LIMIT),
        (None, SAVED, "CANCELLED", CANCELLED),
        (None, SAVED, "", PREEMPTED),
        (None, WARNED, "", TIME_LIMIT),
        (None, None, "", PREEMPTED),
        (None, None, "RUNNING", PREEMPTED),
        (FINISHED, SAVED, "CANCELLED", COMPLETED),
    ],
)
def test_the_verdict_on_an_attempt_that_was_ended_with_its_script(
    finished: dict[str, Any] | None, stopped: dict[str, Any] | None, slurm_state: str, verdict: str
) -> None:
    assert judge_lost(finished, stopped, slurm_state).verdict == verdict


BUDGETS = Budgets(enabled=True, crashed=3, hung=2, node_failure=5, stalled=4, crash_delay=30.0)
# Budgets for one thing only are easier to see without the one for everything.
PATIENT = dataclasses.replace(BUDGETS, stalled=1000)


def past(*verdicts: str, advanced: bool = False) -> list[Past]:
    return [Past(verdict, advanced) for verdict in verdicts]


@pytest.mark.parametrize("verdict", [COMPLETED, CANCELLED])
@pytest.mark.parametrize("advanced", [True, False])
def test_a_run_that_has_ended_does_not_come_back_and_needs_no_reason(verdict: str, advanced: bool) -> None:
    assert after(past(verdict, advanced=advanced), BUDGETS) == Next(again=False)


@pytest.mark.parametrize("verdict", [PREEMPTED, TIME_LIMIT])
def test_preemptions_and_time_limits_are_free_while_the_run_advances(verdict: str) -> None:
    for count in (1, 10, 1000):
        assert after(past(*[verdict] * count, advanced=True), BUDGETS) == Next(again=True)


@pytest.mark.parametrize(
    ("verdict", "limit"), [(CRASHED, 3), (HUNG, 2), (NODE_FAILURE, 5), (PREEMPTED, None), (TIME_LIMIT, None)]
)
def test_a_failure_has_its_own_budget(verdict: str, limit: int | None) -> None:
    for count in range(1, 10):
        then = after(past(*[verdict] * count), PATIENT)
        assert then.again == (limit is None or count <= limit)
        assert bool(then.why) != then.again
        if limit is not None and not then.again:
            assert f"[requeue] {verdict} = {limit}" in then.why


@pytest.mark.parametrize("verdict", [CRASHED, HUNG, NODE_FAILURE])
def test_failures_are_counted_anew_after_an_advance(verdict: str) -> None:
    limit = getattr(PATIENT, verdict)
    row = past(*[verdict] * limit)
    for between in (PREEMPTED, verdict):
        attempts = [*row, *past(between, advanced=True), *row]
        assert after(attempts, PATIENT).again
        assert not after([*attempts, *past(verdict)], PATIENT).again
    # What did not advance does not begin a new row.
    assert not after([*row, *past(PREEMPTED), *past(verdict)], PATIENT).again


def test_a_crash_in_an_attempt_that_advanced_counts_as_one() -> None:
    for count in (1, 5, 50):
        crashes = past(*[CRASHED] * count, advanced=True)
        assert after(crashes, BUDGETS) == Next(again=True, delay_s=30.0)
    assert not after(past(CRASHED, advanced=True), dataclasses.replace(BUDGETS, crashed=0)).again


def test_attempts_without_progress_count_whatever_their_end() -> None:
    endings = (PREEMPTED, CRASHED, TIME_LIMIT, HUNG, NODE_FAILURE, PREEMPTED)
    for count in range(1, len(endings) + 1):
        then = after(past(*endings[:count]), BUDGETS)
        assert then.again == (count <= BUDGETS.stalled)
        assert ("[requeue] stalled = 4" in then.why) == (count > BUDGETS.stalled)
        assert after([*past(*endings[:count]), *past(PREEMPTED, advanced=True)], BUDGETS).again


def test_it_does_not_matter_that_two_attempts_ended_alike() -> None:
    same = Past(CRASHED, advanced=False)
    assert after([same] * 3, BUDGETS).again
    assert not after([same] * 4, BUDGETS).again
    advanced = Past(CRASHED, advanced=True)
    assert after([advanced] * 9, BUDGETS) == after([advanced], BUDGETS)


def test_the_delay_after_a_crash_doubles_and_is_capped() -> None:
    many = dataclasses.replace(PATIENT, crashed=10_000, stalled=10_000)
    delays = [after(past(*[CRASHED] * count), many).delay_s for count in (1, 2, 3, 4, 7, 8, 2000)]
    assert delays == [30.0, 60.0, 120.0, 240.0, 1800.0, 1800.0, 1800.0]
    assert after(past(CRASHED), dataclasses.replace(many, crash_delay=0.0)).delay_s == 0.0
    # Only an error may go away by waiting.
    for verdict in (PREEMPTED, TIME_LIMIT, HUNG, NODE_FAILURE):
        assert after(past(CRASHED, CRASHED, verdict), PATIENT) == Next(again=True)


def test_what_is_sure_to_repeat_is_not_retried() -> None:
    then = after([Past(CRASHED, advanced=False, repeats=True)], BUDGETS)
    assert not then.again
    assert "this error comes again at every start" in then.why
    # Somebody mended it.
    assert after([Past(CRASHED, advanced=False, repeats=True), *past(PREEMPTED)], BUDGETS).again


@pytest.mark.parametrize("verdict", [PREEMPTED, TIME_LIMIT, CRASHED, HUNG, NODE_FAILURE])
def test_a_run_that_must_not_come_back(verdict: str) -> None:
    then = after(past(verdict, advanced=True), dataclasses.replace(BUDGETS, enabled=False))
    assert then == Next(again=False, why="[requeue] enabled = false")
