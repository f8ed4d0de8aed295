"""`titan-slurm nodes`: the nodes that a run's next attempts do not use."""

from typing import Annotated

import typer

from titan_slurm.cli import options

app = typer.Typer(
    help="Nodes that have failed a run: one that failed twice is excluded from its next attempts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_nodes(run: options.Run, as_json: options.Json = False, runs_dir: options.RunsDir = None) -> None:
    """The nodes that have failed the run, and which of them are excluded."""
    import json

    from titan_slurm.run.find import find_run, runs_folder
    from titan_slurm.run.nodes import excluded, failures

    found = find_run(run, runs_folder(runs_dir))
    known, out = failures(found), excluded(found)
    if as_json:
        rows = {node: {"excluded": node in out, "failures": history} for node, history in known.items()}
        typer.echo(json.dumps(rows, indent=2))
        return
    for node, history in sorted(known.items()):
        attempts = ", ".join(f"{each['verdict']} in attempt {each['attempt']}" for each in history)
        typer.echo(f"{node}  {'excluded' if node in out else 'in use'}  {attempts}")
    if not known:
        typer.echo(f"no node has failed run {found.name}")


@app.command("allow")
def allow_node(
    run: options.Run,
    node: Annotated[str, typer.Argument(help="The node's name in Slurm.", show_default=False)],
    runs_dir: options.RunsDir = None,
) -> None:
    """Let a node back: its failures are forgotten, and the run's next attempts may use it."""
    from titan_slurm.errors import bad_input, did_you_mean
    from titan_slurm.run.find import find_run, runs_folder
    from titan_slurm.run.nodes import failures, let_back

    found = find_run(run, runs_folder(runs_dir))
    if not let_back(found, node):
        raise bad_input("", f"no node {node!r} has failed run {found.name}", did_you_mean(node, failures(found)))
    typer.echo(f"node {node} may be used again by run {found.name}")
