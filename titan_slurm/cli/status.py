"""Show what a run is doing, or all runs.

\b
Examples:
  titan-slurm status
  titan-slurm status llama3_debug-20261122-145600
  titan-slurm status 4711 --json
"""

from typing import Annotated

import typer

from titan_slurm.cli import options

NAME = "status"


def command(
    run: Annotated[
        str | None, typer.Argument(help="A run's name, path or job id; all runs if left out.", show_default=False)
    ] = None,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    import json

    from titan_slurm.cli import show
    from titan_slurm.cluster.state import status, statuses
    from titan_slurm.run.find import all_runs, find_run, runs_folder, unreadable

    folder = runs_folder(runs_dir)
    if run is None:
        runs = []
        for each in all_runs(folder):
            if why := unreadable(each):
                show.note(f"{each.plan_file}: {why}")
            else:
                runs.append(each)
        found = statuses(runs)
        if as_json:
            typer.echo(json.dumps([each.to_dict() for each in found], indent=2))
        else:
            _table(found, str(folder))
        return
    one = status(find_run(run, folder))
    if as_json:
        typer.echo(json.dumps(one.to_dict(), indent=2))
    else:
        _one(one)


def _one(status: object) -> None:
    from rich.markup import escape

    from titan_slurm.cli import show
    from titan_slurm.cluster.state import RunStatus

    assert isinstance(status, RunStatus)
    console = show.console()
    if console.is_terminal and status.max_steps:
        from rich.progress_bar import ProgressBar

        console.print(ProgressBar(total=status.max_steps, completed=status.step, width=60))
    for name, text in show.status_lines(status):
        shown = escape(text)
        if name == "state":
            shown = show.styled_state(status.state) + escape(text.removeprefix(status.state))
        console.print(f"[dim]{name:>9}[/]  {shown}")


def _table(found: object, folder: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from titan_slurm.cli import show

    assert isinstance(found, list)
    if not found:
        typer.echo(f"no runs in {folder}")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "JOB", "ATTEMPTS", "VERDICT"):
        table.add_column(heading, justify="right" if heading in ("LOSS", "TOKENS/S", "LEFT") else "left", no_wrap=True)
    for each in found:
        table.add_row(
            escape(each.name),
            show.styled_state(each.state),
            f"{each.step}/{each.max_steps}",
            "-" if each.loss is None else f"{each.loss:.4f}",
            "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            "-" if each.seconds_left is None else show.duration(each.seconds_left),
            each.job_id or "-",
            str(each.attempts),
            each.verdict or "-",
        )
    show.console().print(table)
