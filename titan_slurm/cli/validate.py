"""Check a recipe against everything that can be known without a GPU, and say how it would run.

\b
Examples:
  titan-slurm validate recipes/llama3_8b.toml --nodes 2
  titan-slurm validate my_recipe.toml --set parallelism.tensor_parallel=4
"""

import typer

from titan_slurm.cli import options

NAME = "validate"


def command(
    recipe: options.Recipe = None,
    nodes: options.Nodes = None,
    cluster: options.Cluster = None,
    settings: options.Set = None,
    runs_dir: options.RunsDir = None,
) -> None:
    from titan_slurm.cli import show

    prepared = options.prepare(recipe, nodes, settings, cluster, None, runs_dir)
    show.prepared_notes(prepared)
    typer.echo(f"{prepared.resolved.found.path}: valid: {show.plan_line(prepared.plan)}")
