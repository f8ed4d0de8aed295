"""Ending a run: the user's wish is written down first, so that it holds whatever the scheduler makes of it."""

import os
import time

from titan_slurm.cluster import local, slurm
from titan_slurm.cluster.state import status
from titan_slurm.errors import bad_input
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.verdict import CANCELLED


def cancel(run: RunDirectory) -> str:
    """End the run's job. Returns what was done, in a line. Raises BadInputError if the scheduler refuses."""
    now = status(run)
    if not now.is_active:
        return f"run {run.name} is {now.state}; there is nothing to cancel"
    job = run.jobs()[-1]
    user = os.environ.get("USER") or str(os.getuid())
    run.cancel({"time": time.time(), "job_id": job["job_id"], "user": user})
    if job["cluster"] == "local":
        local.cancel(int(job["job_id"]), job["process_started"])
        for attempt in run.attempts()[-1:]:
            attempt.give_verdict(CANCELLED, f"by {user}")
    elif complaint := slurm.cancel(job["job_id"]):
        raise bad_input(f"scancel {job['job_id']}", complaint)
    return f"cancelled run {run.name} (job {job['job_id']}) at step {now.step}"
