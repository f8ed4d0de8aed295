"""Plan a run from a recipe, make its directory, and submit its job.

\b
Examples:
  titan-slurm submit recipes/llama3_debug.toml --cluster local --follow
  titan-slurm submit recipes/llama3_8b.toml --nodes 2 --set slurm.partition=gpu
  titan-slurm submit recipes/llama3_8b.toml --nodes 2 --cluster hpc
  titan-slurm submit recipes/llama3_8b.toml --dry-run
  titan-slurm submit recipes/llama3_debug.toml --name mine --resume --set training.max_steps=120
"""

from typing import Annotated

import typer

from titan_slurm.cli import options

NAME = "submit"


def command(
    recipe: options.Recipe = None,
    nodes: options.Nodes = None,
    cluster: options.Cluster = None,
    settings: options.Set = None,
    name: options.Name = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of that --name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the script; make nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the run ends.")] = False,
    runs_dir: options.RunsDir = None,
) -> None:
    from titan_slurm.cli import cost, show
    from titan_slurm.launch.submit import submit, would_start

    prepared = options.prepare(recipe, nodes, settings, cluster, name, runs_dir, resume=resume, only_show=dry_run)
    show.prepared_notes(prepared)
    show.note(show.plan_line(prepared.plan))
    if misfit := cost.misfit(cost.estimated(prepared.resolved)):
        show.note(misfit)
    # What it would refuse it may still take and let wait, for a node that is down now, say: sbatch decides.
    show.start(would_start(prepared))
    if dry_run:
        show.note(f"dry run: nothing is made; the run would be {prepared.run.path}")
        typer.echo(prepared.script, nl=False)
        return

    job = submit(prepared)
    run = prepared.run
    show.submitted(run, job, "resumed" if resume else "submitted")
    if follow:
        from titan_slurm.cli.follow import follow_to_the_end

        raise typer.Exit(follow_to_the_end(run))
