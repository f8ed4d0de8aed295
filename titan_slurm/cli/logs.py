"""Print the log of a run's newest attempt: of the rank that knows the loss, or of any other.

If a rank failed, the first error of all ranks comes first: it is the cause, the others are its consequences.

\b
Examples:
  titan-slurm logs mine
  titan-slurm logs mine -f
  titan-slurm logs mine --rank 3
"""

from typing import Annotated

import typer

from titan_slurm.cli import options

NAME = "logs"


def command(
    run: options.Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Which rank.", min=0, show_default=False)] = None,
    runs_dir: options.RunsDir = None,
) -> None:
    import sys

    from titan_slurm.cli.follow import follow_to_the_end
    from titan_slurm.errors import bad_input
    from titan_slurm.run.find import find_run, runs_folder

    found = find_run(run, runs_folder(runs_dir))
    if follow:
        raise typer.Exit(follow_to_the_end(found, rank))
    attempts = found.attempts()
    if not attempts:
        typer.echo(f"run {found.name} has not started yet", err=True)
        return
    for error in attempts[-1].errors()[:1]:
        typer.echo(f"=== first error: rank {error['rank']} on {error['host']}\n{error['traceback']}===")
    chosen = found.plan().metrics_rank if rank is None else rank
    logs = attempts[-1].log_files()
    if chosen not in logs:
        ranks = f"ranks 0 to {max(logs)}" if logs else "no rank yet"
        raise bad_input(
            "--rank", f"attempt {attempts[-1].number} has no log of rank {chosen}", f"it has logs of {ranks}"
        )
    with logs[chosen].open(encoding="utf-8", errors="replace") as file:
        for line in file:
            sys.stdout.write(line)
