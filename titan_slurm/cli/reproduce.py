"""Make a run again from its lock: the same recipe, code, seed and data, in a run of its own that begins at step 0.

Says first what cannot be the same here: other versions, data that is gone, another GPU. A checkpoint stands for its run
up to that step.

\b
Examples:
  titan-slurm reproduce mine --dry-run
  titan-slurm reproduce mine --name mine-checked --follow
  titan-slurm reproduce runs/mine/checkpoints/step-500
"""

from typing import Annotated

import typer

from titan_slurm.cli import options

NAME = "reproduce"


def command(
    run: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or the folder of a checkpoint.")],
    name: Annotated[
        str | None, typer.Option("--name", help="The new run's name; RUN-again if left out.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would differ; make nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the run ends.")] = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    import json

    from titan_slurm.cli import show
    from titan_slurm.launch.reproduce import find_source, prepare, submit
    from titan_slurm.run.find import runs_folder

    runs = runs_folder(runs_dir)
    source, step = find_source(run, runs)
    prepared = prepare(source, step, name, runs)
    for difference in prepared.differences:
        show.note(f"not the same here: {difference}")
    show.note(show.plan_line(prepared.plan))
    about = {"reproduces": str(source.path), "run": str(prepared.run.path), "differences": prepared.differences}
    if dry_run:
        show.note(f"dry run: nothing is made; the run would be {prepared.run.path}")
        typer.echo(json.dumps(about, indent=2) if as_json else prepared.script, nl=as_json)
        return
    job = submit(prepared)
    if as_json:
        typer.echo(json.dumps(about | {"job_id": job["job_id"], "cluster": job["cluster"]}, indent=2))
    else:
        show.submitted(prepared.run, job, "submitted")
        typer.echo(f"  compare titan-slurm compare {show.arguments(source)} {show.arguments(prepared.run)}")
    if follow:
        from titan_slurm.cli.follow import follow_to_the_end

        raise typer.Exit(follow_to_the_end(prepared.run))
