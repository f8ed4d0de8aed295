"""What a run is doing now: the run directory's word and the scheduler's, put together. Works without accounting."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from titan_slurm.cluster import local, slurm
from titan_slurm.run import attempt as attempts
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory

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

# What a job's last state in Slurm means for the attempt, where the attempt could not say so itself.
_VERDICTS = {
    "COMPLETED": attempts.CRASHED,
    "CANCELLED": attempts.CANCELLED,
    "TIMEOUT": attempts.TIME_LIMIT,
    "DEADLINE": attempts.TIME_LIMIT,
    "PREEMPTED": attempts.PREEMPTED,
    "NODE_FAIL": attempts.NODE_FAILURE,
    "BOOT_FAIL": attempts.NODE_FAILURE,
}


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
    state, reason, nodes = "created", "", ""
    if job:
        state, reason, nodes = _state(run, job, of_job, known)
    verdict = of_job[-1].verdict() if of_job else None
    metrics = run.last_metrics()
    return RunStatus(
        name=run.name,
        path=str(run.path),
        state=state,
        verdict=verdict["verdict"] if verdict else "cancelled" if state == "cancelled" else None,
        reason=reason or (verdict["reason"] if verdict else ""),
        job_id=job["job_id"] if job else None,
        cluster=plan.cluster,
        step=metrics.get("step", 0),
        max_steps=plan.max_steps,
        loss=metrics.get("loss"),
        tokens_per_second=metrics.get("tokens_per_second"),
        attempts=len(tries),
        nodes=nodes,
        recipe=plan.recipe,
        updated=metrics.get("time"),
        seconds_left=_seconds_left(run, tries[-1].number, plan.max_steps) if state == "running" and tries else None,
    )


def _state(
    run: RunDirectory, job: dict[str, Any], tries: list[Attempt], known: dict[str, slurm.SlurmJob] | None
) -> tuple[str, str, str]:
    """State, its reason, and the nodes."""
    last = tries[-1] if tries else None
    nodes = last.facts().get("nodes", "") if last else ""
    in_slurm = (known or {}).get(job["job_id"])
    if in_slurm and in_slurm.state in QUEUED_IN_SLURM:
        return ("requeued" if last else "queued"), in_slurm.reason, in_slurm.nodes
    if last and last.verdict():
        return _ended(last), "", nodes
    if job["cluster"] == "local":
        if local.is_alive(int(job["job_id"]), job["process_started"]):
            return ("running" if last else "queued"), "", nodes
        _settle(run, job, last, attempts.CRASHED, "the job's process is gone and left no word")
        return (_ended(last) if last else "failed"), "the job's process is gone and left no word", nodes
    if known is None:
        return (
            ("running" if last else "queued"),
            "Slurm's controller does not answer; this is its last known state",
            nodes,
        )
    if in_slurm is None or in_slurm.state not in ALIVE_IN_SLURM:
        return _gone(run, job, last, in_slurm), (in_slurm.reason if in_slurm else ""), nodes
    return ("stopping" if in_slurm.state == "COMPLETING" else "running"), "", in_slurm.nodes


def _gone(run: RunDirectory, job: dict[str, Any], last: Attempt | None, in_slurm: slurm.SlurmJob | None) -> str:
    """The state of a run whose job is no longer in the queue and left no verdict; leaves one."""
    slurm_state = in_slurm.state if in_slurm else "nothing any more"
    verdict = _VERDICTS.get(slurm_state, attempts.CRASHED)
    _settle(run, job, last, verdict, f"Slurm says {slurm_state}")
    if last:
        return _ended(last)
    cancelled = run.cancelled() is not None or verdict == attempts.CANCELLED
    return "cancelled" if cancelled else "failed"


def _settle(run: RunDirectory, job: dict[str, Any], last: Attempt | None, verdict: str, reason: str) -> None:
    """Write the verdict that the attempt could not write: Slurm forgets what it knows after some minutes."""
    wish = run.cancelled()
    if wish and wish["job_id"] == job["job_id"]:
        verdict, reason = attempts.CANCELLED, f"by {wish['user']}"
    if last:
        last.give_verdict(verdict, reason)


def _ended(attempt: Attempt) -> str:
    verdict = (attempt.verdict() or {}).get("verdict")
    return {attempts.COMPLETED: "completed", attempts.CANCELLED: "cancelled"}.get(str(verdict), "failed")


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
