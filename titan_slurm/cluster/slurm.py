"""What Slurm says of jobs, by its own commands. What it means for a run is decided in `state`."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

_TIMEOUT_S = 60
# For what is good to know and no more.
_PATIENCE_S = 20


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue or sacct shows it. `state` in Slurm's words: PENDING, RUNNING, COMPLETING, TIMEOUT …"""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""


@dataclass(frozen=True)
class Answer:
    """What `sbatch --test-only` says of a job: when it would start, in Slurm's local time, or why it would not."""

    start: str
    text: str


# sbatch lets its environment win over the options in a script (INPUT ENVIRONMENT VARIABLES in sbatch(1)). Most of these
# variables are called after their option.
_VARIABLES = {
    "time": ("SBATCH_TIMELIMIT",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "no-requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "gpus-per-node": ("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS", "SBATCH_GRES"),
}


def sbatch(options: Iterable[str]) -> list[str]:
    """The command `sbatch`, to which the options in a script are what the script says."""
    named = (variable for option in options for variable in _VARIABLES.get(option, (_variable(option),)))
    hidden = sorted({variable for variable in named if variable in os.environ})
    return [*(["env", *(word for name in hidden for word in ("-u", name))] if hidden else []), "sbatch"]


def test_only(script: str, options: Iterable[str]) -> Answer | None:
    """What sbatch says of a script with these options without submitting it; None where there is no Slurm to ask."""
    done = _run([*sbatch(options), "--test-only"], script, _PATIENCE_S)
    if done is None:
        return None
    text = "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())
    found = re.search(r"to start at (\S+)", text)
    if done.returncode == 0 and found:
        return Answer(found[1], text)
    # Refused, unless it is the controller that is not there.
    return Answer("", text) if " is UP" in (ask("scontrol", "ping") or "") else None


def is_available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None where it fails, or is not here."""
    done = _run(list(command))
    return done.stdout if done is not None and done.returncode == 0 else None


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


def _variable(option: str) -> str:
    return f"SBATCH_{option.upper().replace('-', '_')}"


def _run(command: list[str], text: str = "", timeout_s: int = _TIMEOUT_S) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, input=text, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
