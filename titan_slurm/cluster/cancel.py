"""Ending runs: the user's wish is written down first, so that it holds whatever the scheduler makes of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from titan_slurm.cluster import local, slurm
from titan_slurm.cluster.elsewhere import elsewhere
from titan_slurm.cluster.state import RunStatus, statuses
from titan_slurm.run.attempt import user
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.verdict import CANCELLED


@dataclass(frozen=True)
class Outcome:
    """What was done to a run: `text` in a line, or `error`, why it could not be; `changed`: whether anything was."""

    name: str
    job_id: str | None
    changed: bool
    text: str = ""
    error: str = ""


def cancel(runs: Sequence[RunDirectory]) -> list[Outcome]:
    """End the runs' jobs, with one question to Slurm and one order for all of them."""
    found = list(zip(runs, statuses(runs), strict=True))
    errors = {run.path: _why_not(run) or _write_wish(run) for run, now in found if now.is_active}
    meant = [(run, now) for run, now in found if errors.get(run.path) == ""]
    jobs = {run.path: _left(run, str(now.job_id)) for run, now in meant if now.cluster == "slurm"}
    complaints = slurm.scancel([job_id for each in jobs.values() for job_id in each])
    for run, now in meant:
        if now.cluster == "local":
            _end_here(run)
        elif refused := [job_id for job_id in jobs[run.path] if job_id in complaints]:
            errors[run.path] = f"scancel {' '.join(refused)}: {complaints[refused[0]]}"
    return [_outcome(now, errors.get(run.path, "")) for run, now in found]


def _outcome(now: RunStatus, error: str) -> Outcome:
    if error:
        return Outcome(now.name, now.job_id, changed=False, error=error)
    if not now.is_active:
        text = f"run {now.name} is {now.state}; there is nothing to cancel"
        return Outcome(now.name, now.job_id, changed=False, text=text)
    text = f"cancelled run {now.name} (job {now.job_id}) at step {now.step}"
    return Outcome(now.name, now.job_id, changed=True, text=text)


def _why_not(run: RunDirectory) -> str:
    there = elsewhere(run.jobs()[-1])
    return f"its job is one of {there}; cancel it there" if there else ""


def _write_wish(run: RunDirectory) -> str:
    """Returns why that was not possible, or nothing."""
    try:
        run.cancel({"time": time.time(), "job_id": run.jobs()[-1]["job_id"], "user": user()})
    except OSError as error:
        return f"cannot write {run.cancel_file}: {error.strerror}"
    return ""


def _end_here(run: RunDirectory) -> None:
    job = run.jobs()[-1]
    local.cancel(int(job["job_id"]), job["process_started"])
    for attempt in run.attempts()[-1:]:
        run.give_verdict(attempt, CANCELLED, f"by {user()}")


def _left(run: RunDirectory, job_id: str) -> list[str]:
    """The job, and those of its chain that were to follow it."""
    chain = run.chain(job_id)
    return chain[chain.index(job_id) :]
