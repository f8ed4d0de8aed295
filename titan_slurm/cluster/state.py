"""What a run is doing now: the run directory's word and the scheduler's, put together. Works without accounting."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_slurm.cluster import local, lost, slurm
from titan_slurm.cluster.elsewhere import elsewhere
from titan_slurm.run import metrics
from titan_slurm.run import verdict as verdicts
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import excluded
from titan_slurm.run.plan import Plan

QUEUED_IN_SLURM = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
ALIVE_IN_SLURM = QUEUED_IN_SLURM | {
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
}
ACTIVE = frozenset({"queued", "running", "stopping", "requeued"})
STATES = ("created", "queued", "running", "stopping", "requeued", "completed", "cancelled", "failed")
NO_ANSWER = "Slurm's controller does not answer; this is the last known state"


@dataclass(frozen=True)
class RunStatus:
    """A run at a glance. `state`: one of STATES. Times in seconds since 1970."""

    name: str
    path: str
    state: str
    verdict: str | None
    reason: str
    job_id: str | None
    cluster: str
    step: int
    max_steps: int
    loss: float | None
    tokens_per_second: float | None
    attempts: int
    nodes: str
    excluded_nodes: list[str]
    recipe: str
    submitted: float | None
    """When the newest job was."""
    updated: float | None
    """When the newest step was logged."""
    seconds_left: float | None

    @property
    def is_active(self) -> bool:
        """Whether the scheduler still has work with it."""
        return self.state in ACTIVE

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def status(run: RunDirectory) -> RunStatus:
    """The status of one run."""
    return statuses([run])[0]


def statuses(runs: Iterable[RunDirectory]) -> list[RunStatus]:
    """The status of many runs, with one question to Slurm for all of them."""
    runs = list(runs)
    lost.look(runs)
    return _statuses([_read(run) for run in runs])


def survey(runs: Iterable[RunDirectory]) -> tuple[list[RunStatus], dict[Path, str]]:
    """The same of those that can be read, and why the others cannot, by their plan's file. A run that is removed
    meanwhile is in neither."""
    found, unreadable = [], {}
    runs = list(runs)
    lost.look(runs)
    for run in runs:
        try:
            found.append(_read(run))
        except (OSError, ValueError) as error:
            if run.exists():
                unreadable[run.plan_file] = str(error)
    return _statuses(found), unreadable


@dataclass(frozen=True)
class _OnDisk:
    """What a run's directory says. `job`: the newest submission; `last`: the newest attempt, if it is of that job or of
    another in its chain, and `verdict` what became of it."""

    run: RunDirectory
    plan: Plan
    job: dict[str, Any] | None
    attempts: int
    last: Attempt | None
    verdict: dict[str, Any] | None
    facts: dict[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether its last job has had its last word: then no scheduler is needed to tell."""
        return self.verdict is not None and not self.verdict.get("again")


def _read(run: RunDirectory) -> _OnDisk:
    plan, jobs, tries = run.plan(), run.jobs(), run.attempts()
    job = jobs[-1] if jobs else None
    # Attempts of an earlier job come before those of a later one.
    facts = tries[-1].facts() if job and tries else {}
    last = tries[-1] if job and facts.get("job_id") in _chain(job) else None
    return _OnDisk(run, plan, job, len(tries), last, last.verdict() if last else None, facts if last else {})


def _statuses(found: list[_OnDisk]) -> list[RunStatus]:
    jobs = (each.job for each in found if not each.has_ended)
    asked = [job_id for job in jobs if job and job["cluster"] == "slurm" for job_id in _chain(job)]
    known = slurm.jobs(asked) if asked else {}
    return [_status(each, known) for each in found]


def _status(found: _OnDisk, known: dict[str, slurm.SlurmJob] | None) -> RunStatus:
    run, plan, last = found.run, found.plan, found.last
    job = _in_turn(found, known or {})
    now = _state(found, job, known) if job else _Now("created")
    verdict = (last.verdict() if last else None) or {}
    newest, reached = run.last_metrics(), run.last_step()
    in_slurm = (known or {}).get(job["job_id"]) if job else None
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=now.state,
        verdict=now.verdict or verdict.get("verdict"),
        reason=now.reason or "; ".join(text for text in (verdict.get("reason"), verdict.get("why")) if text),
        job_id=job["job_id"] if job else None,
        cluster=plan.cluster,
        step=reached.get("step", 0),
        max_steps=plan.max_steps,
        loss=newest.get("loss"),
        tokens_per_second=newest.get("tokens_per_second"),
        attempts=found.attempts,
        nodes=(in_slurm.nodes if in_slurm else "") or found.facts.get("nodes", ""),
        excluded_nodes=excluded(run),
        recipe=plan.recipe,
        submitted=job["time"] if job else None,
        updated=reached.get("time"),
        seconds_left=_seconds_left(run, last.number, plan.max_steps) if now.state == "running" and last else None,
    )


def _chain(job: dict[str, Any]) -> list[str]:
    """The ids of the jobs that were submitted together, to follow each other; of most jobs its own."""
    return list(job.get("chain", [job["job_id"]]))


def _in_turn(found: _OnDisk, known: dict[str, slurm.SlurmJob]) -> dict[str, Any] | None:
    """Of a chain the job whose turn it is: the first that has not ended, unless the run has; or else that of the newest
    attempt."""
    if found.job is None or "chain" not in found.job:
        return found.job
    alive = [each for each in _chain(found.job) if each in known and known[each].state in ALIVE_IN_SLURM]
    newest = found.facts.get("job_id", found.job["job_id"])
    return found.job | {"job_id": alive[0] if alive and not found.has_ended else newest}


@dataclass(frozen=True)
class _Now:
    state: str
    reason: str = ""
    """Where the newest attempt's verdict does not give it."""
    verdict: str | None = None
    """Likewise: a job that ends while it waits has no attempt that could say so."""


def _state(found: _OnDisk, job: dict[str, Any], known: dict[str, slurm.SlurmJob] | None) -> _Now:
    run, last, verdict = found.run, found.last, found.verdict
    if verdict and found.has_ended:
        return _Now(_ended(verdict["verdict"]))
    between = "requeued" if verdict else "running" if last else "queued"
    if job["cluster"] == "local":
        if local.is_alive(int(job["job_id"]), job["process_started"]):
            return _Now(between)
        if there := elsewhere(job):
            return _Now(between, _only(there))
        return _gone(run, job, last, verdicts.CRASHED, "the job's process is gone and left no word")
    if known is None:
        return _Now(between, NO_ANSWER)
    in_slurm = known.get(job["job_id"])
    if in_slurm is None or in_slurm.state not in ALIVE_IN_SLURM:
        # Asked this late, so that a look at runs that are alive costs a single question.
        if there := elsewhere(job):
            return _Now(between, _only(there))
        slurm_state = in_slurm.state if in_slurm else "nothing any more"
        verdict_of_slurm = verdicts.BY_SLURM_STATE.get(slurm_state, verdicts.CRASHED)
        return _gone(run, job, last, verdict_of_slurm, f"Slurm says {slurm_state}")
    if in_slurm.state in QUEUED_IN_SLURM:
        return _Now("requeued" if last else "queued", in_slurm.reason)
    return _Now("stopping" if in_slurm.state == "COMPLETING" and not verdict else between)


def _only(there: str) -> str:
    return f"its job is one of {there}, and only there can be known whether it lives; this is the last known state"


def _gone(run: RunDirectory, job: dict[str, Any], last: Attempt | None, verdict: str, reason: str) -> _Now:
    """The state of a run whose job has ended without a last word. Gives the verdict that the attempt could not give:
    Slurm forgets what it knows after some minutes."""
    wish, finished = run.cancelled(), last.finished() if last else None
    if finished:
        verdict, reason = verdicts.COMPLETED, f"all {finished['step']} steps done"
    elif wish and wish["job_id"] in _chain(job):
        verdict, reason = verdicts.CANCELLED, f"by {wish['user']}"
    elif failures := run.setup_failures(job["job_id"]):
        node, what = failures[-1]
        reason = f"before the attempt began: {what} failed on {node}; {run.path / 'job.log'} says why"
    if last:
        # Whoever looks at somebody else's run need not be allowed to write there.
        with contextlib.suppress(OSError):
            run.give_verdict(last, verdict, reason, late=True)
        # Whatever was written in the meantime counts more.
        written = last.verdict()
        if written and not written.get("again"):
            return _Now(_ended(written["verdict"]))
    return _Now(_ended(verdict), reason, verdict)


def _ended(verdict: str) -> str:
    return {verdicts.COMPLETED: "completed", verdicts.CANCELLED: "cancelled"}.get(verdict, "failed")


def _seconds_left(run: RunDirectory, attempt: int, max_steps: int) -> float | None:
    """Time to the last step at the speed of this attempt's newest logged steps; None before there are two."""
    first = next(metrics.recent(run.metrics_file, attempt), None)
    newest = run.last_metrics()
    if first is None or newest["step"] <= first["step"]:
        return None
    steps, seconds = newest["step"] - first["step"], newest["time"] - first["time"]
    left: float = (max_steps - newest["step"]) * seconds / steps - (time.time() - newest["time"])
    return max(0.0, left)
