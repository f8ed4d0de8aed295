"""One start of a run by the scheduler: its folder, and what its ranks and its batch script write there."""

import contextlib
import os
import pwd
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.run.cause import cause_first
from titan_slurm.run.events import EVENTS_FILE, FINISHED, RANK_0, STOPPED, VERDICT, EventLog
from titan_slurm.run.files import read_json, write_json, write_json_once
from titan_slurm.run.verdict import CRASHED

# The rank's environment names its attempt's folder by this variable; the batch script sets it.
ATTEMPT_VARIABLE = "TITAN_SLURM_ATTEMPT"


@dataclass(frozen=True)
class Attempt:
    """An attempt's folder."""

    path: Path

    @property
    def number(self) -> int:
        """1 for the first attempt of a run."""
        return int(self.path.name)

    def facts(self) -> dict[str, Any]:
        """What was known at its start: {"started", "job_id", "nodes", "restart_count", "host", "saved_step"}."""
        return read_json(self.path / "attempt.json") or {}

    def events(self, by: str) -> EventLog:
        """The run's events, for one of those who write them during this attempt."""
        return EventLog(self.path.parents[1] / EVENTS_FILE, by, self.number)

    def environment(self) -> dict[str, Any]:
        """What it found where it trained, and how that differed from the run's lock; empty before it has looked."""
        return read_json(self.path / "environment.json") or {}

    def set_environment(self, environment: dict[str, Any]) -> None:
        """Rank 0 writes down what it found."""
        write_json(self.path / "environment.json", environment)

    def configuration(self) -> dict[str, Any]:
        """torchtitan's whole configuration; empty before the model is built."""
        return read_json(self.path / "torchtitan.json") or {}

    def set_configuration(self, configuration: dict[str, Any]) -> None:
        """The rank that knows the loss writes down what torchtitan was configured with."""
        write_json(self.path / "torchtitan.json", configuration)

    def log_file(self, rank: int) -> Path:
        """What a rank printed, standard output and error together."""
        return self.path / f"rank_{rank}.log"

    def log_files(self) -> dict[int, Path]:
        """The logs that exist, by rank."""
        found = {int(path.stem.removeprefix("rank_")): path for path in self.path.glob("rank_*.log")}
        return dict(sorted(found.items()))

    def hosts(self) -> list[str]:
        """The host of each rank, once they have met; before that an empty list."""
        return list((read_json(self.path / "hosts.json") or {}).get("hosts", []))

    def set_hosts(self, hosts: list[str]) -> None:
        """Rank 0 writes down where the ranks are, in their order."""
        write_json(self.path / "hosts.json", {"hosts": hosts})

    def verdict(self) -> dict[str, Any] | None:
        """Why the attempt ended: {"verdict", "reason", "time", "saved_step", "again", "why", "late"}; None while it
        runs, or if nobody has found out yet. `late`: somebody found out later, so that `time` is not its end's."""
        return read_json(self.path / "verdict.json")

    def give_verdict(self, verdict: str, reason: str, **more: Any) -> bool:
        """Write the verdict, once: the first one stands. Returns whether it is this one."""
        value = {"verdict": verdict, "reason": reason, "time": time.time()} | more
        return write_json_once(self.path / "verdict.json", value)

    def tell_verdict(self, by: str) -> None:
        """Put the verdict that stands among the run's events."""
        standing = {name: value for name, value in (self.verdict() or {}).items() if name != "time"}
        self.events(by).add(VERDICT, **standing)

    def amend_verdict(self, **more: Any) -> None:
        """Add to the verdict what became of it."""
        write_json(self.path / "verdict.json", (self.verdict() or {}) | more)

    def finish(self, step: int) -> None:
        """Rank 0 says that the run's last step is done and saved."""
        write_json(self.path / "finished.json", {"step": step, "time": time.time()})
        self.events(RANK_0).add(FINISHED, step=step)

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote."""
        return read_json(self.path / "finished.json")

    def stop(self, signal: str, step: int, *, saved: bool, why: str = "") -> None:
        """Rank 0 says that the ranks stop at this step because of a signal; `why` it is not saved, if it is not."""
        value = {"signal": signal, "step": step, "saved": saved, "why": why, "time": time.time()}
        write_json(self.path / "stopped.json", value)
        self.events(RANK_0).add(STOPPED, step=step, signal=signal, saved=saved, why=why)

    def stopped(self) -> dict[str, Any] | None:
        """What `stop` wrote."""
        return read_json(self.path / "stopped.json")

    def wish_requeue(self, wish: dict[str, Any]) -> None:
        """Write down that a user has the ranks stop, for the run to start again: {"time", "user"}."""
        write_json(self.path / "requeue.json", wish)

    def requeue_wish(self) -> dict[str, Any] | None:
        """What `wish_requeue` wrote."""
        return read_json(self.path / "requeue.json")

    def report_error(self, rank: int, error: str, traceback: str, *, step: int | None, kind: str = CRASHED) -> None:
        """A rank says why it leaves: `error` in one line, the whole traceback, and the last step that it ended in this
        attempt (None: none)."""
        value = {"rank": rank, "error": error, "traceback": traceback, "step": step, "kind": kind}
        write_json(self.path / f"error_rank_{rank}.json", value | {"time": time.time(), "host": host()})

    def errors(self) -> list[dict[str, Any]]:
        """What the ranks reported, the cause first: the earliest that is more than the loss of another rank."""
        return cause_first(error for path in self.path.glob("error_rank_*.json") if (error := read_json(path)))

    @property
    def wandb_log_file(self) -> Path:
        """What the process said that sends the run to wandb."""
        return self.path / "wandb.log"

    def stacks_file(self, rank: int) -> Path:
        """Where a rank's stacks go if it hangs."""
        return self.path / f"stacks_rank_{rank}.txt"


def new_attempt(folder: Path) -> Attempt:
    """Make the next attempt's folder in a run's `attempts`."""
    folder.mkdir(exist_ok=True)
    while True:
        taken = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        attempt = Attempt(folder / f"{max(taken, default=0) + 1:04d}")
        # Making a folder is atomic: of two that try the same number one fails, and takes the next.
        with contextlib.suppress(FileExistsError):
            attempt.path.mkdir()
            return attempt


def user() -> str:
    """Whose process this is."""
    if name := os.environ.get("USER"):
        return name
    # In a container, say, nobody may know the number.
    with contextlib.suppress(LookupError):
        return pwd.getpwuid(os.getuid()).pw_name
    return str(os.getuid())


def host() -> str:
    """This node, by Slurm's name for it if it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
