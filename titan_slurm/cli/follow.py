"""Following a run: its log as it grows, over all its attempts, until the scheduler has no more work with it. On a
terminal the newest loss, speed and progress stay below it."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from titan_slurm.cli.merge import merge

if TYPE_CHECKING:
    from titan_slurm.cluster.state import RunStatus
    from titan_slurm.run.attempt import Attempt
    from titan_slurm.run.directory import RunDirectory

_TURN_S = 0.5
# Slurm is asked more rarely than files are read: its controller serves everybody.
_TURNS_PER_QUESTION = 10


def follow_to_the_end(
    run: "RunDirectory", rank: int | None = None, *, all_ranks: bool = False, attempt: int | None = None
) -> int:
    """Print the log of a rank, by default the one that knows the loss, or of all. Returns 0 if the run completed,
    otherwise 1. `attempt`: the first one, by default the newest of the job that was submitted last.

    Ctrl-C stops following, not the run.
    """
    from titan_slurm.cli import show
    from titan_slurm.cluster.state import status

    chosen = None if all_ranks else run.plan().metrics_rank if rank is None else rank
    now = status(run)
    try:
        with _display(now) as (write, update):
            tail = _Tail(chosen, write, _newest_of_last_job(run) if attempt is None else attempt)
            while now.is_active:
                for _ in range(_TURNS_PER_QUESTION):
                    tail.print_new(run)
                    update(run.last_metrics())
                    time.sleep(_TURN_S)
                    if now.cluster == "local" or _has_ended(run):
                        break
                now = status(run)
            tail.print_new(run)
            tail.close()
    except KeyboardInterrupt:
        show.note(f"no longer following; the run goes on: titan-slurm logs {show.arguments(run)} -f")
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


def _newest_of_last_job(run: "RunDirectory") -> int:
    """The number of the newest attempt, or of the next one, if that one is of an earlier job."""
    attempts, jobs = run.attempts(), run.jobs()
    if not attempts:
        return 1
    newest = attempts[-1]
    is_of_last = jobs and newest.facts().get("job_id") in run.chain(jobs[-1]["job_id"])
    return newest.number + (0 if is_of_last else 1)


class _Tail:
    """What has been printed of a rank's log, or of all ranks'."""

    def __init__(self, rank: int | None, write: Callable[[str], None], first: int) -> None:
        self.rank = rank
        self.write = write
        self.first = first
        self.attempt: Attempt | None = None
        self.files: dict[int, TextIO] = {}
        # The beginning of each rank's last line, whose end is not written yet.
        self.begun: dict[int, str] = {}

    def print_new(self, run: "RunDirectory") -> None:
        """Print what has been written since the last call, of later attempts too."""
        self._copy()
        for attempt in run.attempts():
            known = self.attempt.number if self.attempt else self.first - 1
            if attempt.number > known and self._logs(attempt):
                self._open(attempt)
                self._copy()

    def close(self) -> None:
        """Print what ended without the end of its line."""
        for rank, text in self.begun.items():
            if text:
                self.write(f"{rank}: {text}\n")
        for file in self.files.values():
            file.close()
        self.files, self.begun = {}, {}

    def _logs(self, attempt: "Attempt") -> "list[int]":
        logs = attempt.log_files()
        return [rank for rank in logs if self.rank in (None, rank)]

    def _open(self, attempt: "Attempt") -> None:
        self.close()
        if attempt.number > 1:
            self.write(f"=== attempt {attempt.number}\n")
        self.attempt = attempt

    def _copy(self) -> None:
        if self.attempt is None:
            return
        for rank in self._logs(self.attempt):
            if rank not in self.files:
                self.files[rank] = self.attempt.log_file(rank).open(encoding="utf-8", errors="replace")
        if self.rank is not None:
            while self.files and (text := self.files[self.rank].read(65536)):
                self.write(text)
            return
        for line in merge({rank: self._new_lines(rank) for rank in self.files}):
            self.write(line)

    def _new_lines(self, rank: int) -> list[str]:
        *lines, rest = (self.begun.get(rank, "") + self.files[rank].read()).split("\n")
        self.begun[rank] = rest
        return [f"{line}\n" for line in lines]
