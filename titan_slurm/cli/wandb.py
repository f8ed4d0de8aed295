"""`titan-slurm wandb`: sending what was logged offline."""

from typing import Annotated

import typer

from titan_slurm.cli import options, select

app = typer.Typer(
    help="A run's curve in wandb: sending what its server has not got yet.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("sync")
def sync(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Names, paths or job ids.", show_default=False)],
    runs_dir: options.RunsDir = None,
) -> None:
    """Send to wandb's server the steps that it has not got, each once and in order, whether they were logged offline or
    a network was down. May be repeated, and run from cron while the job is running.

    Exit code 0 where the server has everything, where the job sends it itself, and where the recipe has wandb disabled;
    1 where the server could not be reached or took less, 2 without a key.

    \b
    Examples:
      titan-slurm wandb sync mine
      titan-slurm wandb sync runs/*
    """
    import subprocess
    import sys

    from titan_slurm.run.find import runs_folder

    codes = [0]
    for each in select.by_names(runs, runs_folder(runs_dir)):
        # A process of its own: wandb is imported in no other verb, and may hang.
        command = [sys.executable, "-m", "titan_slurm.train.wandb_sender", "sync", str(each.path)]
        codes.append(subprocess.run(command, check=False).returncode)
        if codes[-1] == 2:
            # What is missing is missing for all of them.
            break
    raise typer.Exit(max(codes))
