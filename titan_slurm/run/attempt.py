"""One start of a run by the scheduler: its folder, how it begins, and the verdict it ends with."""

import contextlib
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.run.files import read_json, write_json

# The rank's environment names its attempt's folder by this variable; the batch script sets it.
ATTEMPT_VARIABLE = "TITAN_SLURM_ATTEMPT"

COMPLETED = "completed"
CANCELLED = "cancelled"
CRASHED = "crashed"
PREEMPTED = "preempted"
TIME_LIMIT = "time_limit"
NODE_FAILURE = "node_failure"


@dataclass(frozen=True)
class Attempt:
    """An attempt's folder."""

    path: Path

    @property
    def number(self) -> int:
        """1 for the first attempt of a run."""
        return int(self.path.name)

    def facts(self) -> dict[str, Any]:
        """What was known at its start: {"started", "job_id", "nodes", "restart_count", "host"}."""
        return read_json(self.path / "attempt.json") or {}

    def log_file(self, rank: int) -> Path:
        """What a rank printed, standard output and error together."""
        return self.path / f"rank_{rank}.log"

    def log_files(self) -> dict[int, Path]:
        """The logs that exist, by rank."""
        found = {int(path.stem.removeprefix("rank_")): path for path in self.path.glob("rank_*.log")}
        return dict(sorted(found.items()))

    def verdict(self) -> dict[str, Any] | None:
        """Why the attempt ended: {"verdict", "reason", "time"}; None while it runs or if nobody has found out yet."""
        return read_json(self.path / "verdict.json")

    def give_verdict(self, verdict: str, reason: str) -> None:
        """Write the verdict, once: the first one stands."""
        if self.verdict() is None:
            write_json(self.path / "verdict.json", {"verdict": verdict, "reason": reason, "time": time.time()})

    def finish(self, step: int) -> None:
        """Rank 0 says that the run's last step is done and saved."""
        write_json(self.path / "finished.json", {"step": step, "time": time.time()})

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote."""
        return read_json(self.path / "finished.json")

    def report_error(self, rank: int, error: str, traceback: str) -> None:
        """A rank says why it leaves: `error` in one line, and the whole traceback."""
        value = {"rank": rank, "error": error, "traceback": traceback, "time": time.time(), "host": _host()}
        write_json(self.path / f"error_rank_{rank}.json", value)

    def first_error(self) -> dict[str, Any] | None:
        """The earliest error of any rank: the cause, where the later ones are mostly its consequences."""
        errors = [error for path in self.path.glob("error_rank_*.json") if (error := read_json(path))]
        return min(errors, key=lambda error: float(error["time"]), default=None)


def begin(run: Path) -> Attempt:
    """Make the next attempt's folder. Raises FileNotFoundError if `run` is not there.

    Called once by the batch script, before any rank starts, and again when Slurm starts the script again.
    """
    folder = run / "attempts"
    folder.mkdir(exist_ok=True)
    while True:
        taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        attempt = Attempt(folder / f"{max(taken, default=0) + 1:04d}")
        # Making a folder is atomic: of two that try the same number one fails, and takes the next.
        with contextlib.suppress(FileExistsError):
            attempt.path.mkdir()
            break
    facts = {
        "started": time.time(),
        "job_id": os.environ.get("SLURM_JOB_ID") or os.environ.get("TITAN_SLURM_LOCAL_JOB_ID", ""),
        "nodes": os.environ.get("SLURM_JOB_NODELIST") or _host(),
        "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "host": _host(),
    }
    write_json(attempt.path / "attempt.json", facts)
    return attempt


def end(attempt: Attempt, exit_code: int) -> str:
    """Give the verdict of an attempt whose ranks have all left, and return it."""
    finished = attempt.finished()
    error = attempt.first_error()
    if finished and exit_code == 0:
        verdict, reason = COMPLETED, f"all {finished['step']} steps done"
    elif error:
        verdict, reason = CRASHED, f"rank {error['rank']} on {error['host']}: {error['error']}"
    elif exit_code == 0:
        verdict, reason = CRASHED, "the ranks left without an error before the last step"
    else:
        verdict, reason = CRASHED, _describe_exit(exit_code)
    attempt.give_verdict(verdict, reason)
    return verdict


def _describe_exit(exit_code: int) -> str:
    # A shell reports a process that died by signal N as 128 + N.
    if exit_code > 128:
        return f"a rank was killed by signal {exit_code - 128}, or left with exit code {exit_code}"
    return f"a rank left with exit code {exit_code}"


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
