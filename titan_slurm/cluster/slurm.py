"""What Slurm says of jobs, by its own commands. What it means for a run is decided in `state`."""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_TIMEOUT_S = 60


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue or sacct shows it. `state` in Slurm's words: PENDING, RUNNING, COMPLETING, TIMEOUT …"""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""


def is_available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def jobs(job_ids: Iterable[str]) -> dict[str, SlurmJob] | None:
    """What Slurm knows of these jobs, by id: one call to squeue, and one to sacct for those that it has forgotten.

    Works without accounting. Returns None when the controller does not answer, which says nothing about the jobs.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    queued = _squeue(wanted)
    if queued is None:
        return None
    forgotten = [job_id for job_id in wanted if job_id not in queued]
    return queued | _sacct(forgotten)


def cancel(job_id: str) -> str:
    """Ask Slurm to end a job. Returns what scancel complained of, or nothing."""
    done = _run(["scancel", job_id])
    return "" if done and done.returncode == 0 else (done.stderr.strip() if done else "scancel is not here")


def _squeue(job_ids: list[str]) -> dict[str, SlurmJob] | None:
    done = _run(["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}", "--format=%i|%T|%r|%N"])
    if done is None:
        return None
    # Slurm forgets jobs minutes after their end; asked for a single one that it has forgotten, squeue fails.
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    found = {}
    for line in done.stdout.splitlines():
        job_id, state, reason, nodes = line.split("|")
        found[job_id] = SlurmJob(job_id, state, "" if reason == "None" else reason, nodes)
    return found


def _sacct(job_ids: list[str]) -> dict[str, SlurmJob]:
    if not job_ids:
        return {}
    columns = "--format=JobID,State,NodeList"
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(job_ids)}", columns])
    if done is None or done.returncode != 0:
        return {}  # Many sites have no accounting.
    found = {}
    for line in done.stdout.splitlines():
        job_id, state, nodes = line.split("|")
        # «CANCELLED by 0» names who did it.
        found[job_id] = SlurmJob(job_id, state.split()[0], state, nodes)
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
