"""What Slurm says of jobs, by its own commands. What it means for a run is decided in `state`."""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 60
# For what is good to know and no more.
_PATIENCE_S = 20
# Linux lets no argument be longer than 128 KiB.
_MOST_IDS = 5000
_TIME = "%Y-%m-%dT%H:%M:%S"
_UNENDED = frozenset({"PENDING", "RUNNING", "SUSPENDED", "REQUEUED", "RESIZING"})


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue or sacct shows it. `state` in Slurm's words: PENDING, RUNNING, COMPLETING, TIMEOUT …"""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""


@dataclass(frozen=True)
class Submitted:
    """A job, when it was submitted (Unix time) and what it was called."""

    job_id: str
    time: float
    comment: str
    name: str


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
    return Answer("", text) if is_answering() else None


def is_available() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def ask(*command: str) -> str | None:
    """What a command of Slurm's prints; None where it fails, or is not here."""
    done = _run(list(command))
    return done.stdout if done is not None and done.returncode == 0 else None


def cluster_name() -> str:
    """What the cluster is called whose jobs these commands show, by their own configuration, or if that is not to be
    found by the controller; empty where nobody answers."""
    return _configured_name() or _told_name()


def is_other_cluster(name: str) -> bool:
    """Whether that is surely another cluster than the one whose jobs these commands show."""
    return name != _configured_name() and _told_name() not in ("", name)


def _configured_name() -> str:
    # A file is read in no time; a question to the controller takes as long as a submission.
    if "SLURM_CLUSTERS" not in os.environ:
        with contextlib.suppress(OSError):
            file = Path(os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf"))
            found = re.search(r"(?im)^\s*ClusterName\s*=\s*(\S+)", file.read_text(errors="replace"))
            return found[1] if found else ""
    return ""


def _told_name() -> str:
    try:
        return _ask_name(os.environ.get("SLURM_CONF"), os.environ.get("SLURM_CLUSTERS"))
    except LookupError:
        return ""


@functools.cache
def _ask_name(*_: str | None) -> str:
    found = re.search(r"^ClusterName\s*=\s*(\S+)", ask("scontrol", "show", "config") or "", re.MULTILINE)
    if found is None:
        # No answer for now is none to keep.
        raise LookupError
    return found[1]


def jobs(job_ids: Iterable[str]) -> dict[str, SlurmJob] | None:
    """What Slurm knows of these jobs, by id: one call to squeue, and one to sacct for those that it has forgotten.
    A task of an array is called ARRAY_TASK.

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


def submitted(users: Iterable[str], names: Iterable[str], since: float) -> list[Submitted] | None:
    """The jobs of these users (by name or id) that Slurm has now, and those with these names that it has had `since`
    (Unix time), as far as accounting knows: one call to squeue and one to sacct. None when the controller does not
    answer."""
    of_users, called = f"--user={','.join(sorted(set(users)))}", f"--name={','.join(sorted(set(names)))}"
    done = _run(["squeue", "--noheader", "--array", "--states=all", of_users, "--format=%i|%V|%k|%j"])
    if done is None or done.returncode != 0:
        return None
    past = _run(
        [
            *("sacct", "--noheader", "--parsable2", "--allocations", of_users, called),
            *("--starttime", time.strftime(_TIME, time.localtime(since)), "--format=JobID,Submit,Comment,JobName"),
        ]
    )
    lines = [*done.stdout.splitlines(), *(past.stdout.splitlines() if past and past.returncode == 0 else [])]
    return [found for line in lines if (found := _read_submitted(line))]


def _read_submitted(line: str) -> Submitted | None:
    try:
        # A comment with a bar in it, or a line break, is none of ours.
        job_id, submitted, comment, name = line.split("|", 3)
        when = time.mktime(time.strptime(submitted, _TIME))
    except ValueError:
        return None
    return Submitted(job_id, when, "" if comment == "(null)" else comment, name)


def is_answering() -> bool:
    """Whether Slurm's controller is there."""
    return " is UP" in (ask("scontrol", "ping") or "")


def scancel(job_ids: Sequence[str], *options: str) -> dict[str, str]:
    """Have Slurm end jobs, or with `--signal=NAME` signal their ranks, all in one call. Returns what it complained of,
    by job."""
    complaints: dict[str, str] = {}
    for some in _batches(job_ids):
        done = _run(["scancel", *options, *some])
        if done is None:
            complaints |= dict.fromkeys(some, "scancel is not here, or does not answer")
        elif done.returncode != 0:
            named = dict(re.findall(r"on job id (\S+): (.+)", done.stderr))
            # It names the jobs that it could not help, unless it is something else that is wrong.
            complaints |= named if named and named.keys() <= set(some) else dict.fromkeys(some, _last_line(done.stderr))
    return complaints


def release(job_id: str) -> str:
    """Have Slurm start a job that was submitted held. Returns what scontrol complained of, or nothing."""
    done = _run(["scontrol", "release", job_id])
    return "" if done and done.returncode == 0 else (done.stderr.strip() if done else "scontrol is not here")


def _squeue(job_ids: list[str]) -> dict[str, SlurmJob] | None:
    # Asked for more than one, squeue has the controller send all jobs in any case, and chooses itself.
    chosen = [f"--jobs={','.join(job_ids)}"] if len(job_ids) <= _MOST_IDS else []
    # Without --array the waiting tasks of an array are one line.
    done = _run(["squeue", "--noheader", "--array", "--states=all", *chosen, "--format=%i|%T|%r|%N"])
    if done is None:
        return None
    # Slurm forgets jobs minutes after their end; asked for a single one that it has forgotten, squeue fails.
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        return None
    found = {}
    for line in done.stdout.splitlines():
        job_id, state, reason, nodes = line.split("|")
        found[job_id] = SlurmJob(job_id, state, "" if reason == "None" else reason, nodes)
    return found if chosen else {job_id: found[job_id] for job_id in job_ids if job_id in found}


def _sacct(job_ids: list[str]) -> dict[str, SlurmJob]:
    if not job_ids:
        return {}
    columns = "--format=JobID,State,NodeList"
    found = {}
    for some in _batches(job_ids):
        done = _run(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(some)}", columns])
        if done is None or done.returncode != 0:
            break  # Many sites have no accounting.
        for line in done.stdout.splitlines():
            job_id, state, nodes = line.split("|")
            # Of a controller that has lost its state accounting never hears how its jobs ended, and takes them for
            # alive for ever («runaway jobs»). «CANCELLED by 0» names who did it.
            if (word := state.split()[0]) not in _UNENDED:
                found[job_id] = SlurmJob(job_id, word, state, nodes)
    return found


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _batches(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (job_ids[start : start + _MOST_IDS] for start in range(0, len(job_ids), _MOST_IDS))


def _variable(option: str) -> str:
    return f"SBATCH_{option.upper().replace('-', '_')}"


def _run(command: list[str], text: str = "", timeout_s: int = _TIMEOUT_S) -> subprocess.CompletedProcess[str] | None:
    # A filter that the user has set for squeue would make the other jobs look as if they were gone.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    environment["SLURM_TIME_FORMAT"] = "standard"
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, input=text, check=False, env=environment
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
