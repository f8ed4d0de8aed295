"""What a run is doing now: the run directory's word and the scheduler's, put together. Works without accounting."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from titan_slurm.cluster import local, slurm
from titan_slurm.run import verdict as verdicts
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import excluded

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


@dataclass(frozen=True)
class RunStatus:
    """A run at a glance. `state`: created, queued, running, stopping, requeued, completed, cancelled or failed."""

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
    updated: float | None
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
    last_jobs = [run.jobs()[-1] if run.jobs() else None for run in runs]
    # A run whose attempt has a verdict that ends it needs no scheduler to tell.
    asked = [job["job_id"] for job in last_jobs if job and job["cluster"] == "slurm"]
    known = slurm.jobs(asked) if asked else {}
    return [_status(run, job, known) for run, job in zip(runs, last_jobs, strict=True)]


def _status(run: RunDirectory, job: dict[str, Any] | None, known: dict[str, slurm.SlurmJob] | None) -> RunStatus:
    plan = run.plan()
    tries = run.attempts()
    of_job = [attempt for attempt in tries if job and attempt.facts().get("job_id") == job["job_id"]]
    last = of_job[-1] if of_job else None
    now = _state(run, job, last, known) if job else _Now("created")
    verdict = (last.verdict() if last else None) or {}
    metrics = run.last_metrics()
    in_slurm = (known or {}).get(job["job_id"]) if job else None
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=now.state,
        verdict=now.verdict or verdict.get("verdict"),
        reason=now.reason or "; ".join(text for text in (verdict.get("reason"), verdict.get("why")) if text),
        job_id=job["job_id"] if job else None,
        cluster=plan.cluster,
        step=metrics.get("step", 0),
        max_steps=plan.max_steps,
        loss=metrics.get("loss"),
        tokens_per_second=metrics.get("tokens_per_second"),
        attempts=len(tries),
        nodes=(in_slurm.nodes if in_slurm else "") or (last.facts().get("nodes", "") if last else ""),
        excluded_nodes=excluded(run),
        recipe=plan.recipe,
        updated=metrics.get("time"),
        seconds_left=_seconds_left(run, tries[-1].number, plan.max_steps) if now.state == "running" and tries else None,
    )


@dataclass(frozen=True)
class _Now:
    state: str
    reason: str = ""
    """Where the newest attempt's verdict does not give it."""
    verdict: str | None = None
    """Likewise: a job that ends while it waits has no attempt that could say so."""


def _state(
    run: RunDirectory, job: dict[str, Any], last: Attempt | None, known: dict[str, slurm.SlurmJob] | None
) -> _Now:
    """`last`: the newest attempt of this job."""
    verdict = last.verdict() if last else None
    if verdict and not verdict.get("again"):
        return _Now(_ended(verdict["verdict"]))
    between = "requeued" if verdict else "running" if last else "queued"
    if job["cluster"] == "local":
        if local.is_alive(int(job["job_id"]), job["process_started"]):
            return _Now(between)
        return _gone(run, job, last, verdicts.CRASHED, "the job's process is gone and left no word")
    if known is None:
        return _Now(between, "Slurm's controller does not answer; this is the last known state")
    in_slurm = known.get(job["job_id"])
    if in_slurm is None or in_slurm.state not in ALIVE_IN_SLURM:
        slurm_state = in_slurm.state if in_slurm else "nothing any more"
        verdict_of_slurm = verdicts.BY_SLURM_STATE.get(slurm_state, verdicts.CRASHED)
        return _gone(run, job, last, verdict_of_slurm, f"Slurm says {slurm_state}")
    if in_slurm.state in QUEUED_IN_SLURM:
        return _Now("requeued" if last else "queued", in_slurm.reason)
    return _Now("stopping" if in_slurm.state == "COMPLETING" and not verdict else between)


def _gone(run: RunDirectory, job: dict[str, Any], last: Attempt | None, verdict: str, reason: str) -> _Now:
    """The state of a run whose job has ended without a last word. Gives the verdict that the attempt could not give:
    Slurm forgets what it knows after some minutes."""
    wish, finished = run.cancelled(), last.finished() if last else None
    if finished:
        verdict, reason = verdicts.COMPLETED, f"all {finished['step']} steps done"
    elif wish and wish["job_id"] == job["job_id"]:
        verdict, reason = verdicts.CANCELLED, f"by {wish['user']}"
    if last:
        last.give_verdict(verdict, reason)
        # Whatever was written in the meantime counts more.
        written = last.verdict()
        if written and not written.get("again"):
            return _Now(_ended(written["verdict"]))
    return _Now(_ended(verdict), reason, verdict)


def _ended(verdict: str) -> str:
    return {verdicts.COMPLETED: "completed", verdicts.CANCELLED: "cancelled"}.get(verdict, "failed")


def _seconds_left(run: RunDirectory, attempt: int, max_steps: int) -> float | None:
    """Time to the last step at the speed of this attempt's logged steps; None before there are two."""
    newest = run.last_metrics()
    first = next((line for line in run.metrics() if line["attempt"] == attempt), None)
    if first is None:
        return None
    steps, seconds = newest["step"] - first["step"], newest["time"] - first["time"]
    if steps <= 0:
        return None
    left: float = (max_steps - newest["step"]) * seconds / steps - (time.time() - newest["time"])
    return max(0.0, left)
