"""Following a run: its log as it grows, over all its attempts, until the scheduler has no more work with it."""

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from titan_slurm.run.attempt import Attempt
    from titan_slurm.run.directory import RunDirectory

_TURN_S = 0.5
# Slurm is asked more rarely than files are read: its controller serves everybody.
_TURNS_PER_QUESTION = 10


def follow_to_the_end(run: "RunDirectory", rank: int | None = None) -> int:
    """Print the log of a rank, by default the one that knows the loss. Returns 0 if the run completed, otherwise 1.

    Ctrl-C stops following, not the run.
    """
    from titan_slurm.cli import show
    from titan_slurm.cluster.state import status

    chosen = run.plan().metrics_rank if rank is None else rank
    tail = _Tail(chosen)
    try:
        now = status(run)
        while now.is_active:
            for _ in range(_TURNS_PER_QUESTION):
                tail.print_new(run)
                if now.cluster == "local" or _has_ended(run):
                    break
                time.sleep(_TURN_S)
            time.sleep(_TURN_S)
            now = status(run)
        tail.print_new(run)
    except KeyboardInterrupt:
        show.note(f"no longer following; the run goes on: titan-slurm logs {run.name} -f")
        return 130
    print()
    for name, text in show.status_lines(now):
        print(f"{name:>9}  {text}")
    return 0 if now.state == "completed" else 1


def _has_ended(run: "RunDirectory") -> bool:
    attempts = run.attempts()
    return bool(attempts and attempts[-1].verdict())


class _Tail:
    """What has been printed of a rank's log."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.attempt = 0
        self.file: TextIO | None = None

    def print_new(self, run: "RunDirectory") -> None:
        """Print what has been written since the last call, of later attempts too."""
        self._copy()
        for attempt in run.attempts():
            if attempt.number > self.attempt and attempt.log_file(self.rank).exists():
                self._open(attempt)
                self._copy()

    def _open(self, attempt: "Attempt") -> None:
        if self.file:
            self.file.close()
            print(f"=== attempt {attempt.number}")
        self.attempt = attempt.number
        self.file = attempt.log_file(self.rank).open(encoding="utf-8", errors="replace")

    def _copy(self) -> None:
        if self.file:
            for text in iter(lambda: self.file.read(65536) if self.file else "", ""):
                sys.stdout.write(text)
            sys.stdout.flush()
