"""Check a recipe against everything that can be known without a GPU, and say how it would run and what it would cost.

\b
Examples:
  titan-slurm validate recipes/llama3_8b.toml --nodes 2
  titan-slurm validate my_recipe.toml --set parallelism.tensor_parallel=4
  titan-slurm validate llama3_70b --gpu H200 --mfu 0.45
  titan-slurm validate llama3_405b --deep
"""

from typing import Annotated, Any

import typer

from titan_slurm.cli import options

NAME = "validate"


def command(
    recipe: options.Recipe = None,
    nodes: options.Nodes = None,
    cluster: options.Cluster = None,
    settings: options.Set = None,
    runs_dir: options.RunsDir = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Whether it fits one, and how fast: H100, A100-80 …", show_default=False),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            "--mfu",
            min=0.01,
            max=1.0,
            help="The part of the GPU's peak to assume for speed and time; 0.4 if left out.",
            show_default=False,
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="Also have torchtitan build it for all its ranks, without GPUs, tokenizer and data: seconds."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    import dataclasses
    import json

    from titan_slurm.cli import cost, show
    from titan_slurm.launch.submit import would_start

    # What is built is the run on its cluster, whatever this machine has.
    how: dict[str, Any] = {"only_show": True, "without_slurm": "slurm"} if deep else {"quick": True}
    prepared = options.prepare(recipe, nodes, settings, cluster, None, runs_dir, **how)
    path, estimate = prepared.resolved.found.path, cost.estimated(prepared.resolved, gpu, mfu)
    show.prepared_notes(prepared)
    show.start(would_start(prepared), must_be_accepted=True)
    built = None
    if deep:
        from titan_slurm.launch.deep import check

        built = check(prepared)
    if as_json:
        layout = dataclasses.asdict(prepared.plan.layout)
        values = {"recipe": str(path), "layout": layout, "estimate": cost.values(estimate)}
        typer.echo(json.dumps(values | ({"built": built} if built else {}), indent=2))
    else:
        typer.echo(f"{path}: valid: {show.plan_line(prepared.plan)}")
        if built:
            typer.echo(show.built_line(built))
        typer.echo("\n".join(cost.lines(estimate)))
    if misfit := cost.misfit(estimate):
        typer.echo(f"warning: {misfit}", err=True)
