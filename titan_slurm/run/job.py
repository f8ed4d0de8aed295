"""The Slurm job seen from inside, by its ranks and its batch script: what Slurm is doing with it, until when, and how
to start it again. Standard library only. What to make of it is decided in `verdict`."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

_TIMEOUT_S = 20
_TURN_S = 5.0
# For a controller that is too busy to answer, or that is being started again.
_PATIENCE_S = 60.0
# What scontrol says to a job that may not be requeued, by whom, or that there is not (slurm_errno.c).
_REFUSALS = ("disabled", "denied", "Invalid")
# Slurm's own default.
_KILL_WAIT_S = 30.0


@dataclass(frozen=True)
class JobFacts:
    """What `scontrol show job` says. Times are Unix times; None where Slurm has none."""

    state: str
    """RUNNING: Slurm will not bring the job back by itself. Anything else: it has decided already."""
    restarts: int
    end_time: float | None
    """When the job is killed: the time limit, or the end of the grace time of a preemption."""
    preempt_time: float | None
    reason: str = ""
    """Why the job ends, for some states: TimeLimit, say."""


def ask(patience_s: float = 0.0) -> JobFacts | None:
    """What Slurm says of this job; None outside a job, where scontrol is not to be had (in a container, say), and if
    the controller has not answered for `patience_s`."""
    job_id = own_id()
    if job_id is None or shutil.which("scontrol") is None:
        return None
    give_up = time.monotonic() + patience_s
    while True:
        done = _run("scontrol", "show", "job", "--oneliner", job_id)
        if done is not None and done.returncode == 0:
            with contextlib.suppress(ValueError):
                return parse(done.stdout)
        if time.monotonic() >= give_up:
            return None
        time.sleep(_TURN_S)


def spare_nodes() -> int | None:
    """How many nodes of its partition this job can do without; None where Slurm cannot be asked."""
    job_id = own_id()
    shown = _run("scontrol", "show", "job", "--oneliner", job_id) if job_id else None
    fields = dict(re.findall(r"(?:^| )(Partition|NumNodes)=(\S+)", shown.stdout)) if shown else {}
    if len(fields) < 2 or not fields["NumNodes"].isdigit():
        return None
    usable = "idle,alloc,mixed,completing,planned,reserved,maint"
    listing = ("--noheader", "--Node", "--format=%N", f"--partition={fields['Partition']}", f"--states={usable}")
    done = _run("sinfo", *listing)
    if done is None or done.returncode != 0:
        return None
    # A node stands there once for each of its partitions.
    return max(len(set(done.stdout.split())) - int(fields["NumNodes"]), 0)


def own_nodes() -> list[str]:
    """The names of this job's nodes; empty where Slurm cannot be asked."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    done = _run("scontrol", "show", "hostnames", nodes) if nodes else None
    return done.stdout.split() if done is not None and done.returncode == 0 else []


def past_state(job_id: str, restart_count: int) -> str:
    """How an earlier start of a job ended, by Slurm's accounting: PREEMPTED, REQUEUED (by a user), NODE_FAIL … Empty
    where there is no accounting, or where it does not know."""
    if not job_id:
        return ""
    columns = ("--noheader", "--parsable2", "--allocations", "--format=State")
    # One line for each start, oldest first.
    done = _run("sacct", *columns, "--duplicates", f"--jobs={job_id}")
    lines = done.stdout.splitlines() if done is not None and done.returncode == 0 else []
    # «CANCELLED by 0» names who did it.
    return lines[restart_count].split()[0] if restart_count < len(lines) else ""


def parse(text: str) -> JobFacts:
    """Read the line of `scontrol show job --oneliner`. Raises ValueError if it is none."""
    fields = dict(re.findall(r"(?:^| )(JobState|Reason|Restarts|EndTime|PreemptTime)=(\S+)", text))
    if "JobState" not in fields:
        raise ValueError(f"not a job's description: {text!r}")
    return JobFacts(
        state=fields["JobState"],
        restarts=int(fields.get("Restarts", 0)),
        end_time=_time(fields.get("EndTime", "")),
        preempt_time=_time(fields.get("PreemptTime", "")),
        reason=fields.get("Reason", "None").removeprefix("None"),
    )


def deadline(facts: JobFacts | None) -> float | None:
    """When the job is killed, from Slurm or, where it cannot be asked, from the environment; None if nobody knows.

    To be called as soon as the job has had its signal: Slurm does not say when that was."""
    if facts is not None and facts.state == "RUNNING":
        return facts.end_time
    if facts is not None:
        # The job is ending already. EndTime is then the instant of SIGTERM, unknown, or the limit of the next start.
        return time.time() + _kill_wait()
    # Set since Slurm 22.05; it does not know of a preemption.
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None


def requeue(delay_s: float, excluded_nodes: list[str] | None) -> str:
    """Have Slurm start this job again, not before `delay_s` from now and not on these nodes (None: as
    it was submitted).

    Returns what scontrol complained of, or nothing; also where Slurm has come to end the job in the meantime, which
    another requeue would raise again. Slurm ends the job's processes at once: call it last.
    """
    job_id = own_id()
    if job_id is None:
        return "this is not a Slurm job"
    # Slurm sends SIGTERM to this very process, and to the commands that it runs, as soon as it has understood. Where it
    # is blocked, too, one that has come can be seen.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    complaint = _requeue(job_id)
    if complaint is None:
        return ""
    if complaint:
        return complaint
    # A job's start and nodes can be set only while it waits, which is from now on.
    if excluded_nodes is not None:
        _run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(excluded_nodes)}")
    if delay_s and time.time() + delay_s > _start_time(job_id):
        _run("scontrol", "update", f"JobId={job_id}", f"StartTime=now+{round(delay_s)}")
    return ""


def _requeue(job_id: str) -> str | None:
    """What scontrol complains of, again and again; empty once the job is requeued, None if Slurm has ended it."""
    give_up = time.monotonic() + _PATIENCE_S
    while True:
        facts = ask()
        if facts and facts.state != "RUNNING":
            # One that was not answered in time may have been carried out.
            return "" if facts.restarts > int(os.environ.get("SLURM_RESTART_COUNT", "0")) else None
        if signal.SIGTERM in signal.sigpending():
            return None
        done = _run("scontrol", "requeue", job_id)
        if done is not None and done.returncode == 0:
            return ""
        complaint = done.stderr.strip() if done else "scontrol is not to be had here"
        is_refused = any(word in complaint for word in _REFUSALS) or shutil.which("scontrol") is None
        if is_refused or time.monotonic() >= give_up:
            return complaint
        time.sleep(_TURN_S)


def _start_time(job_id: str) -> float:
    """When Slurm itself means to start a requeued job again. Never sooner: until then it refuses the job's credentials
    on its nodes (`cred_expire` in slurm.conf(5), two minutes), and such a start ends the job as FAILED."""
    done = _run("scontrol", "show", "job", "--oneliner", job_id)
    found = re.search(r"(?:^| )StartTime=(\S+)", done.stdout) if done is not None else None
    return (_time(found[1]) if found else None) or 0.0


def own_id() -> str | None:
    """What Slurm's commands, and the run's list of jobs, call this job; None outside of one. Of a task of an array
    ARRAY_TASK: its SLURM_JOB_ID is a number of its own, or for the last task that of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _kill_wait() -> float:
    """Seconds from SIGTERM to SIGKILL."""
    done = _run("scontrol", "show", "config")
    found = re.search(r"^KillWait\s*=\s*(\d+)", done.stdout, re.MULTILINE) if done is not None else None
    return float(found[1]) if found else _KILL_WAIT_S


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    # sbatch hands on what its user has set for people to read.
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, env=environment
        )
    return None


def _time(text: str) -> float | None:
    """Slurm's local time, to the second."""
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    return None
