"""Print the log of a run's newest attempt: of the rank that knows the loss, of any other, or of all of them.

If ranks failed, the error that is the cause comes first, not those of the ranks that lost it.

\b
Examples:
  titan-slurm logs mine
  titan-slurm logs mine -f
  titan-slurm logs mine --rank 3 --attempt 2
  titan-slurm logs mine --all-ranks | grep -i nan
"""

from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.run.attempt import Attempt

NAME = "logs"


def command(
    run: options.Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, over restarts, until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Which rank.", min=0, show_default=False)] = None,
    all_ranks: Annotated[
        bool, typer.Option("--all-ranks", help="All ranks, each line with its rank, in the order of time.")
    ] = False,
    attempt: Annotated[
        int | None,
        typer.Option("--attempt", help="Which attempt, or the first to follow; the newest if left out.", min=1),
    ] = None,
    runs_dir: options.RunsDir = None,
) -> None:
    from titan_slurm.cli.follow import follow_to_the_end
    from titan_slurm.errors import bad_input
    from titan_slurm.run.find import find_run, runs_folder

    if all_ranks and rank is not None:
        raise bad_input("--rank", "does not go with --all-ranks")
    found = find_run(run, runs_folder(runs_dir))
    attempts = {each.number: each for each in found.attempts()}
    if attempt is not None and attempt not in attempts:
        known = f"it has {', '.join(map(str, attempts))}" if attempts else "it has not started yet"
        raise bad_input("--attempt", f"run {found.name} has no attempt {attempt}", known)
    if follow:
        raise typer.Exit(follow_to_the_end(found, rank, all_ranks=all_ranks, attempt=attempt))
    if not attempts:
        typer.echo(f"run {found.name} has not started yet", err=True)
        return
    chosen = found.plan().metrics_rank if rank is None else rank
    _print(attempts[attempt or max(attempts)], None if all_ranks else chosen)


def _print(attempt: "Attempt", rank: int | None) -> None:
    """The first error of an attempt, and a rank's log, or all of them."""
    import contextlib
    import sys

    from titan_slurm.cli.merge import merge
    from titan_slurm.errors import bad_input

    errors = attempt.errors()
    for error in errors[:1]:
        text = (error["traceback"] or error["error"]).rstrip("\n")
        typer.echo(f"=== first error: rank {error['rank']} on {error['host']}\n{text}\n===")
    if len(errors) > 1:
        others = ", ".join(str(error["rank"]) for error in errors[1:9]) + (", …" if len(errors) > 9 else "")
        typer.echo(f"=== then errors of {len(errors) - 1} more: {others}")
    logs = attempt.log_files()
    if (rank is None and not logs) or (rank is not None and rank not in logs):
        ranks = f"ranks 0 to {max(logs)}" if logs else "no rank yet"
        which = "" if rank is None else f" of rank {rank}"
        raise bad_input("--rank", f"attempt {attempt.number} has no log{which}", f"it has logs of {ranks}")
    with contextlib.ExitStack() as stack:
        files = {
            each: stack.enter_context(logs[each].open(encoding="utf-8", errors="replace"))
            for each in (logs if rank is None else [rank])
        }
        for line in merge(files) if rank is None else files[rank]:
            sys.stdout.write(line if line.endswith("\n") else f"{line}\n")
