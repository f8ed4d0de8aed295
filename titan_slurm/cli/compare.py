"""Put two runs side by side: recipe, environment, and losses step by step, with the first step that differs.

\b
Examples:
  titan-slurm compare mine mine-again
  titan-slurm compare mine other --json
"""

from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.run.compare import Comparison, Pair

NAME = "compare"

# Rows of the table of losses; of more steps, evenly spread ones are shown.
_ROWS = 20


def command(
    one: options.Run,
    other: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    import json

    from titan_slurm.run.compare import compare
    from titan_slurm.run.find import find_run, runs_folder

    folder = runs_folder(runs_dir)
    runs = [find_run(text, folder) for text in (one, other)]
    found = compare(*runs)
    if as_json:
        typer.echo(json.dumps({"runs": [str(run.path) for run in runs]} | found.to_dict(), indent=2))
        return
    names = [run.name for run in runs]
    _differences("recipe", found.recipe, names)
    _differences("environment", found.environment, names)
    _losses(found, names)


def _differences(what: str, pairs: "dict[str, Pair]", names: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from titan_slurm.cli import show

    typer.echo(f"{what}: " + ("the same" if not pairs else f"{len(pairs)} differences"))
    if not pairs:
        return
    table = Table(box=None, header_style="dim")
    for heading in ("", *names):
        table.add_column(escape(heading), no_wrap=True)
    for name, pair in pairs.items():
        table.add_row(escape(name), *(escape("-" if value is None else str(value)) for value in pair))
    show.console().print(table)


def _losses(found: "Comparison", names: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from titan_slurm.cli import show
    from titan_slurm.run.compare import equal

    first = found.first_difference
    if not found.steps:
        typer.echo("losses: no step that both have logged")
        return
    last = found.steps[-1].step
    if first is None:
        typer.echo(f"losses: the same to the last bit in all {len(found.steps)} steps that both have logged, to {last}")
    else:
        what, pair = ("grad_norm", first.grad_norm) if equal(*first.loss) else ("loss", first.loss)
        typer.echo(f"losses: step {first.step} is the first that differs, in {what}: {pair[0]} and {pair[1]}")
    for name, count in zip(names, found.only, strict=True):
        if count:
            typer.echo(f"  {count} more steps only in {name}")
    table = Table(box=None, header_style="dim")
    for heading in ("STEP", *names, "DIFFERENCE"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    stride = -(-len(found.steps) // _ROWS)
    for index, step in enumerate(found.steps):
        if index % stride == 0 or step in (first, found.steps[-1]):
            one, other = step.loss
            shown = "-" if equal(one, other) else f"{other - one:+.3e}"
            table.add_row(str(step.step), f"{one:.6f}", f"{other:.6f}", shown)
    show.console().print(table)
