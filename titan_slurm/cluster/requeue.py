"""Having running runs start again, as their users mean it: the ranks stop at a step and save, however long that takes,
and then the job is requeued. `scontrol requeue` alone gives them no more than the site's KillWait."""

import signal
import time
from collections.abc import Sequence

from titan_slurm.cluster import local, slurm
from titan_slurm.cluster.cancel import Outcome
from titan_slurm.cluster.elsewhere import elsewhere
from titan_slurm.cluster.state import NO_ANSWER, RunStatus, statuses
from titan_slurm.run.attempt import user
from titan_slurm.run.directory import RunDirectory

# What the time limit, too, sends to the ranks alone: the batch script goes on when they have left.
_ASKING = signal.SIGUSR2


def requeue(runs: Sequence[RunDirectory]) -> list[Outcome]:
    """Ask the ranks of these runs to stop, with one question to Slurm and one order for all of them. The batch script
    of each has it started again. Does not wait for that."""
    found = list(zip(runs, statuses(runs), strict=True))
    errors = {run.path: _why_not(run, now) or _write_wish(run) for run, now in found}
    meant = [(run, now) for run, now in found if not errors[run.path]]
    job_ids = [str(now.job_id) for _, now in meant if now.cluster == "slurm"]
    complaints = slurm.scancel(job_ids, f"--signal={_ASKING.name.removeprefix('SIG')}")
    for run, now in meant:
        if now.cluster == "local":
            job = run.jobs()[-1]
            if not local.signal_ranks(int(job["job_id"]), job["process_started"], _ASKING):
                errors[run.path] = "its ranks have not started yet, or have left"
        elif now.job_id in complaints:
            errors[run.path] = f"scancel --signal: {complaints[now.job_id]}"
    return [_outcome(now, errors[run.path]) for run, now in found]


def _outcome(now: RunStatus, error: str) -> Outcome:
    if error:
        return Outcome(now.name, now.job_id, changed=False, error=error)
    text = f"run {now.name} (job {now.job_id}), at step {now.step}, is to stop, save, and start again"
    return Outcome(now.name, now.job_id, changed=True, text=text)


def _why_not(run: RunDirectory, now: RunStatus) -> str:
    if now.reason == NO_ANSWER:
        return NO_ANSWER
    if now.state in ("queued", "requeued", "stopping"):
        return f"is {now.state}; only a running one can be requeued"
    if now.state != "running":
        return f"is {now.state}; `titan-slurm resume {now.name}` goes on with it"
    if there := elsewhere(run.jobs()[-1]):
        return f"its job is one of {there}; requeue it there"
    if not run.attempts()[-1].hosts():
        return "its ranks have not started yet"
    chain = run.chain(str(now.job_id))
    if not run.plan().requeue["enabled"] and chain[-1] == now.job_id:
        return "does not come back ([requeue] enabled = false); cancel it and resume it"
    return ""


def _write_wish(run: RunDirectory) -> str:
    attempt = run.attempts()[-1]
    try:
        attempt.wish_requeue({"time": time.time(), "user": user()})
    except OSError as error:
        return f"cannot write into {attempt.path}: {error.strerror}"
    return ""
