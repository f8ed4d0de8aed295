"""Why an attempt ended, and whether the run comes back: pure decisions over facts that others gathered.

The table of what Slurm does and what is right to answer is in the README, under "When a run comes back".
"""

import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_slurm.run.job import JobFacts

COMPLETED = "completed"
CANCELLED = "cancelled"
CRASHED = "crashed"
HUNG = "hung"
STALLED = "stalled"
PREEMPTED = "preempted"
TIME_LIMIT = "time_limit"
NODE_FAILURE = "node_failure"

# What Slurm's last word on a start of a job means. Any other word is an error of the job's own.
BY_SLURM_STATE = {
    "CANCELLED": CANCELLED,
    "TIMEOUT": TIME_LIMIT,
    "DEADLINE": TIME_LIMIT,
    "PREEMPTED": PREEMPTED,
    "REQUEUED": PREEMPTED,
    "NODE_FAIL": NODE_FAILURE,
    "BOOT_FAIL": NODE_FAILURE,
}

# The ranks leave with this code when they have stopped at a step because they were asked to.
STOPPED_EXIT_CODE = 85
HUNG_EXIT_CODE = 86
# The ranks were not started: the nodes are not fit for them.
BAD_NODES_EXIT_CODE = 87
_ASKED_TOO_EARLY = 128 + signal.SIGUSR2

# An error of these kinds before the attempt's first step comes again at every start, in a run that has never trained.
_SURE_TO_REPEAT = frozenset(
    {
        "AssertionError",
        "AttributeError",
        "BadInputError",
        "FileNotFoundError",
        "ImportError",
        "IsADirectoryError",
        "KeyError",
        "ModuleNotFoundError",
        "NoUsableCheckpointError",
        "NotImplementedError",
        "OtherVersionsError",
        "OutOfMemoryError",
        "PermissionError",
        "TypeError",
        "ValueError",
        "WrongArgumentsError",
    }
)
# And these also where the run has trained before, with which no node and no moment has to do.
_FINAL = frozenset({"NoUsableCheckpointError", "OtherVersionsError"})
# And this one after a step as well.
_ALWAYS_FINAL = frozenset({"EndedEarlyError"})
_LONGEST_DELAY_S = 1800.0


@dataclass(frozen=True)
class Evidence:
    """What an attempt left behind."""

    exit_code: int
    finished: dict[str, Any] | None
    stopped: dict[str, Any] | None
    """{"signal", "step", "saved", "time"} if the ranks stopped because they were asked to."""
    error: dict[str, Any] | None
    """The first error of any rank."""
    silent_ranks: list[int]
    """Ranks that left neither an error nor any other word, where some rank left one."""
    cancel_wish: dict[str, Any] | None
    job: JobFacts | None
    """None where Slurm could not be asked, and on a single machine."""
    restart_count: int
    """How often Slurm had started the job again when the attempt began."""
    has_advanced: bool = False
    """An earlier attempt trained by the same plan, and left a newer checkpoint than it found."""
    requeue_wish: dict[str, Any] | None = None
    """{"user"} if a user has the ranks stop for the run to start again."""
    bad_nodes: dict[str, str] = field(default_factory=dict)
    """Nodes that were found to be bad before the ranks started, and why."""


@dataclass(frozen=True)
class Verdict:
    """Why an attempt ended, in a word and in a line."""

    verdict: str
    reason: str
    repeats: bool = False
    """A crash that is sure to come again at the next start."""


def judge(evidence: Evidence) -> Verdict:
    """The verdict on an attempt whose ranks have all left."""
    # However a rank leaves when all is trained, saved and said.
    if evidence.finished:
        return Verdict(COMPLETED, f"all {evidence.finished['step']} steps done")
    if evidence.cancel_wish:
        return Verdict(CANCELLED, f"by {evidence.cancel_wish['user']}")
    job = evidence.job
    if job and job.state != "RUNNING":
        if job.restarts > evidence.restart_count:
            return Verdict(PREEMPTED, _stop_text(evidence.stopped, f"Slurm requeued the job ({job.state})"))
        if job.reason == "TimeLimit":
            return Verdict(TIME_LIMIT, _stop_text(evidence.stopped, "the time limit is over"))
        return Verdict(CANCELLED, f"by scancel ({job.state})")
    if job and job.preempt_time:
        return Verdict(PREEMPTED, _stop_text(evidence.stopped, "preempted by Slurm"))
    # A rank that has just been started dies of the signal that asks it to stop.
    if evidence.requeue_wish and (evidence.stopped or evidence.exit_code == _ASKED_TOO_EARLY):
        return Verdict(PREEMPTED, _stop_text(evidence.stopped, f"requeued by {evidence.requeue_wish['user']}"))
    if evidence.stopped:
        if evidence.stopped["signal"] == "SIGTERM":
            return Verdict(PREEMPTED, _stop_text(evidence.stopped, "asked to stop by SIGTERM"))
        return Verdict(TIME_LIMIT, _stop_text(evidence.stopped, "the time limit is near"))
    if evidence.exit_code == BAD_NODES_EXIT_CODE and evidence.bad_nodes:
        said = "; ".join(f"{node}: {why}" for node, why in evidence.bad_nodes.items())
        return Verdict(NODE_FAILURE, f"before the ranks started: {said}")
    return _judge_failure(evidence)


def judge_lost(finished: dict[str, Any] | None, stopped: dict[str, Any] | None, slurm_state: str) -> Verdict:
    """The verdict on an attempt whose batch script was ended before it could find one. `slurm_state`: how that start of
    the job ended, by Slurm's accounting; empty where it does not know."""
    if finished:
        return Verdict(COMPLETED, f"all {finished['step']} steps done")
    if found := BY_SLURM_STATE.get(slurm_state):
        cause = f"Slurm says {slurm_state}"
    elif stopped and stopped["signal"] != "SIGTERM":
        found, cause = TIME_LIMIT, "the time limit was near"
    else:
        found = PREEMPTED
        cause = "Slurm started the job again: preempted, or requeued by the user or after a node failure"
    return Verdict(found, _stop_text(stopped, cause) if stopped else cause)


def _judge_failure(evidence: Evidence) -> Verdict:
    error = evidence.error
    if error:
        where = f"rank {error['rank']} on {error['host']}"
        if error["kind"] == HUNG:
            silent = _silent_text(evidence.silent_ranks)
            return Verdict(HUNG, f"{where}: {error['error']}{silent}")
        kind = error["error"].split(":")[0]
        sure = _FINAL if evidence.has_advanced else _SURE_TO_REPEAT
        repeats = kind in _ALWAYS_FINAL or (error["step"] is None and kind in sure)
        # A rank that lost its peer names the loss; the cause is the peer that said nothing.
        silent = "" if repeats else _silent_text(evidence.silent_ranks)
        return Verdict(CRASHED, f"{where}: {error['error']}{silent}", repeats)
    if evidence.exit_code == 0:
        return Verdict(CRASHED, "the ranks left without an error before the last step")
    return Verdict(CRASHED, describe_exit(evidence.exit_code))


def describe_exit(exit_code: int) -> str:
    """An exit code in words. A shell reports a process that died by signal N as 128 + N."""
    if exit_code == 137:
        return "a rank was killed by SIGKILL (out of memory, perhaps) before it could say why"
    if exit_code > 128:
        return f"a rank was killed by signal {exit_code - 128}"
    return f"a rank left with exit code {exit_code} and without an error"


def _stop_text(stopped: dict[str, Any] | None, cause: str) -> str:
    if not stopped:
        return f"{cause}; the ranks could not stop at a step"
    if stopped["saved"]:
        return f"{cause}; stopped and saved at step {stopped['step']}"
    return f"{cause}; left at step {stopped['step']} without saving: {stopped['why']}"


def _silent_text(ranks: list[int]) -> str:
    if not ranks:
        return ""
    named = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"; without a word: rank {named}" if len(ranks) == 1 else f"; without a word: ranks {named}"


@dataclass(frozen=True)
class Budgets:
    """How often an attempt may end so, one after another without progress, before the run stops (`[requeue]`)."""

    enabled: bool
    crashed: int
    hung: int
    node_failure: int
    stalled: int
    crash_delay: float
    """Seconds to wait before the first restart after a crash; doubled each time."""


@dataclass(frozen=True)
class Past:
    """An ended attempt, for the counting: its verdict, and whether it left a newer checkpoint than it found."""

    verdict: str
    advanced: bool
    repeats: bool = False


@dataclass(frozen=True)
class Next:
    """What happens after an attempt: the run comes back, or `why` it does not."""

    again: bool
    delay_s: float = 0.0
    why: str = ""


def after(attempts: Sequence[Past], budgets: Budgets) -> Next:
    """What happens after the newest of these attempts (oldest first, none still running)."""
    last = attempts[-1]
    if last.verdict in (COMPLETED, CANCELLED):
        return Next(False)
    if not budgets.enabled:
        return Next(False, why="[requeue] enabled = false")
    if last.repeats:
        return Next(False, why="this error comes again at every start; mend it and go on by `titan-slurm resume`")
    in_a_row = _in_a_row(attempts)
    counted = Counter(attempt.verdict for attempt in in_a_row)
    counted[STALLED] += sum(not attempt.advanced for attempt in in_a_row)
    limits = {
        CRASHED: budgets.crashed,
        HUNG: budgets.hung,
        NODE_FAILURE: budgets.node_failure,
        STALLED: budgets.stalled,
    }
    for verdict, limit in limits.items():
        if counted[verdict] > limit:
            return Next(False, why=_spent(verdict, limit))
    # Capped before it is a number that no float can hold.
    doublings = min(counted[CRASHED] - 1, 60)
    delay = budgets.crash_delay * 2**doublings if last.verdict == CRASHED else 0.0
    return Next(True, min(delay, _LONGEST_DELAY_S))


def _in_a_row(attempts: Sequence[Past]) -> list[Past]:
    """The newest attempt, and those before it since the run last advanced."""
    found = [attempts[-1]]
    for attempt in reversed(attempts[:-1]):
        if found[-1].advanced or attempt.advanced:
            break
        found.append(attempt)
    return found


def _spent(verdict: str, limit: int) -> str:
    what = "attempts without a new checkpoint" if verdict == STALLED else f"attempts that ended as {verdict}"
    spent = f"more than {limit} {what} in a row ([requeue] {verdict} = {limit})"
    return f"{spent}; look at the logs, then `titan-slurm resume`"


def seconds_left(deadline: float | None) -> float | None:
    """Until the job is killed; None if nobody knows when."""
    return None if deadline is None else deadline - time.time()
