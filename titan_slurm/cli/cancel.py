"""End a run for good: its job is cancelled and does not come back. Its checkpoints stay.

\b
Examples:
  titan-slurm cancel mine
  titan-slurm cancel 4711
"""

import typer

from titan_slurm.cli import options

NAME = "cancel"


def command(run: options.Run, runs_dir: options.RunsDir = None) -> None:
    from titan_slurm.cluster.cancel import cancel
    from titan_slurm.run.find import find_run, runs_folder

    typer.echo(cancel(find_run(run, runs_folder(runs_dir))))
