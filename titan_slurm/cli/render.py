"""Print the batch script of a run, without Slurm, and make nothing.

\b
Examples:
  titan-slurm render recipes/llama3_8b.toml --nodes 2
  titan-slurm render recipes/llama3_8b.toml --cluster slurm --set slurm.partition=gpu > job.sh
"""

import typer

from titan_slurm.cli import options

NAME = "render"


def command(
    recipe: options.Recipe = None,
    nodes: options.Nodes = None,
    cluster: options.Cluster = None,
    settings: options.Set = None,
    name: options.Name = None,
    runs_dir: options.RunsDir = None,
) -> None:
    from titan_slurm.cli import show

    prepared = options.prepare(recipe, nodes, settings, cluster, name, runs_dir, only_show=True, without_slurm="slurm")
    show.prepared_notes(prepared)
    typer.echo(prepared.script, nl=False)
