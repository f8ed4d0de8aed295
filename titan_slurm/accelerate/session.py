"""The run that this process is a rank of, if it is one: set by `titan_slurm.accelerate.rank` before the script runs,
asked by what the script imports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.events import EventLog
from titan_slurm.run.plan import Plan

if TYPE_CHECKING:
    from titan_slurm.train.stop import StopRequest
    from titan_slurm.train.watchdog import Watchdog


@dataclass
class Session:
    """A rank's part of a run, and how far the script has come in it."""

    run: RunDirectory
    attempt: Attempt
    plan: Plan
    rank: int
    stop: "StopRequest"
    watchdog: "Watchdog"
    events: EventLog
    step: int = 0
    """Optimizer steps of the run so far."""
    last_step: int | None = None
    """The last one that ended in this attempt."""
    stopped: bool = False
    """The ranks leave because they were asked to."""
    finish: Callable[[], None] | None = None
    """Saves the last step, if the script has not; set once there is something to save."""


_current: Session | None = None


def current() -> Session | None:
    """The run's session; None in a script that runs alone."""
    return _current


def begin(session: Session) -> None:
    """From here on this process is a rank of a run."""
    global _current
    _current = session
