"""Following a run: its log as it grows, over all its attempts, until the scheduler has no more work with it. On a
terminal the newest loss, speed and progress stay below it."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from titan_slurm.cluster.state import RunStatus
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
    now = status(run)
    try:
        with _display(now) as (write, update):
            tail = _Tail(chosen, write)
            while now.is_active:
                for _ in range(_TURNS_PER_QUESTION):
                    tail.print_new(run)
                    update(run.last_metrics())
                    time.sleep(_TURN_S)
                    if now.cluster == "local" or _has_ended(run):
                        break
                now = status(run)
            tail.print_new(run)
    except KeyboardInterrupt:
        show.note(f"no longer following; the run goes on: titan-slurm logs {run.name} -f")
        return 130
    print()
    for name, text in (*show.status_lines(now), ("next", show.next_command(run, now))):
        print(f"{name:>9}  {text}")
    return 0 if now.state == "completed" else 1


def _has_ended(run: "RunDirectory") -> bool:
    attempts = run.attempts()
    return bool(attempts and attempts[-1].verdict())


@contextlib.contextmanager
def _display(now: "RunStatus") -> Iterator[tuple[Callable[[str], None], Callable[[dict[str, Any]], None]]]:
    """How to write log text, and how to show a newly logged step."""
    if not sys.stdout.isatty():
        yield _write_plainly, lambda _: None
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[cyan]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(now.name, total=now.max_steps, completed=now.step, loss="-", speed="-")

        def update(metrics: dict[str, Any]) -> None:
            if metrics:
                speed, loss = f"{metrics['tokens_per_second']:,.0f}", f"{metrics['loss']:.4f}"
                progress.update(task, completed=metrics["step"], loss=loss, speed=speed)

        yield lambda text: progress.console.print(text, end="", markup=False, highlight=False), update


def _write_plainly(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Tail:
    """What has been printed of a rank's log."""

    def __init__(self, rank: int, write: Callable[[str], None]) -> None:
        self.rank = rank
        self.write = write
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
            self.write(f"=== attempt {attempt.number}\n")
        self.attempt = attempt.number
        self.file = attempt.log_file(self.rank).open(encoding="utf-8", errors="replace")

    def _copy(self) -> None:
        while self.file and (text := self.file.read(65536)):
            self.write(text)
