"""`titan-slurm checkpoints`: list, verify, prune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.run.checkpoints import Checkpoint
    from titan_slurm.run.directory import RunDirectory

app = typer.Typer(
    help="A run's checkpoints: which there are, whether they are intact, and removing old ones.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_checkpoints(run: options.Run, as_json: options.Json = False, runs_dir: options.RunsDir = None) -> None:
    """All checkpoints, newest first, with what was set aside and why.

    \b
    Examples:
      titan-slurm checkpoints list mine
      titan-slurm checkpoints list mine --json
    """
    import json

    from titan_slurm.cli import show
    from titan_slurm.run import checkpoints

    folder = _find(run, runs_dir).checkpoints_folder
    rows = [describe(each) for each in checkpoints.list_checkpoints(folder)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo(f"no checkpoints in {folder}")
        return
    cells = [
        (
            row["step"],
            row["state"],
            show.moment(row["time"]),
            "-" if row["files"] is None else row["files"],
            "-" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.1f} MiB",
            "-" if row["seconds"] is None else f"{row['seconds']:.1f}",
            row["path"].rpartition("/")[2],
            "; ".join(row["problems"]),
        )
        for row in rows
    ]
    headings = ("STEP", "STATE", "COMMITTED", "FILES", "SIZE", "SECONDS", "FOLDER", "REASON")
    show.console().print(show.make_table(headings, cells, wrap=["REASON"]))


@app.command("verify")
def verify(run: options.Run, as_json: options.Json = False, runs_dir: options.RunsDir = None) -> None:
    """Read every committed checkpoint and compare it with what was committed. Exit code 1 if one is not intact.

    \b
    Examples:
      titan-slurm checkpoints verify mine
    """
    import json

    from titan_slurm.run import checkpoints

    found = {
        each.step: checkpoints.problems_with(each.path)
        for each in checkpoints.committed(_find(run, runs_dir).checkpoints_folder)
    }
    if as_json:
        typer.echo(json.dumps([{"step": step, "problems": problems} for step, problems in found.items()], indent=2))
    else:
        for step, problems in found.items():
            typer.echo(f"step-{step}: " + ("BAD" if problems else "good"))
            for problem in problems:
                typer.echo(f"  {problem}")
        if not found:
            typer.echo("no committed checkpoints")
    raise typer.Exit(int(any(found.values())))


@app.command("prune")
def prune(
    run: options.Run,
    keep: Annotated[
        int | None,
        typer.Option("--keep", min=1, help="How many to keep; the run's keep_latest if left out.", show_default=False),
    ] = None,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    """Remove all but the newest committed checkpoints that are intact, and what was never committed and is older.
    What was set aside as bad stays, for whoever wants to look at it.

    \b
    Examples:
      titan-slurm checkpoints prune mine --keep 1
    """
    import json

    from titan_slurm.cluster.state import status
    from titan_slurm.errors import bad_input
    from titan_slurm.run import checkpoints

    found = _find(run, runs_dir)
    now = status(found)
    if now.is_active:
        raise bad_input("", f"run {found.name} is {now.state} and may be saving", f"titan-slurm cancel {found.name}")
    keep = keep or found.plan().torchtitan.get("checkpoint.keep_latest_k")
    if not keep:
        raise bad_input("--keep", "the run keeps all of its checkpoints; say how many are to stay")
    gone = checkpoints.prune(found.checkpoints_folder, keep)
    if as_json:
        typer.echo(json.dumps([str(path) for path in gone], indent=2))
        return
    for path in gone:
        typer.echo(f"removed {path}")
    if not gone:
        typer.echo("nothing to remove")


def _find(run: str, runs_dir: Path | None) -> "RunDirectory":
    from titan_slurm.run.find import find_run, runs_folder

    return find_run(run, runs_folder(runs_dir))


def describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What is to be said of a checkpoint: its commit's time, size and duration, or what is wrong with it."""
    from titan_slurm.run import checkpoints

    problems, record = checkpoint.reason(), None
    if checkpoint.state == checkpoints.COMMITTED:
        found = checkpoints.read_commit_or_problem(checkpoint.path)
        if isinstance(found, str):
            problems = [found]
        else:
            record = found
    return {
        "step": checkpoint.step,
        "state": checkpoint.state,
        "time": record.time if record else None,
        "seconds": record.seconds if record else None,
        "files": len(record.files) if record else None,
        "bytes": record.bytes if record else None,
        "path": str(checkpoint.path),
        "problems": problems,
    }
