"""Say where a run's hours went: goodput, attempts, start-up, curves. Also of a run that is still running.

\b
Examples:
  titan-slurm report mine
  titan-slurm report mine --html mine.html --png pictures
  titan-slurm report mine --json
  titan-slurm report --compare mine other another --html beside.html
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.report.report import Report
    from titan_slurm.run.directory import RunDirectory

NAME = "report"


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="A run's name, path or job id.")],
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page in one file.", show_default=False)
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="DIR", help="Write each picture as a PNG file.", show_default=False),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Several runs: one table, and their curves over one another.")
    ] = False,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    import json

    from titan_slurm.cli import show

    _check_outputs(html, png)
    reports = [_build(run) for run in _find(runs, compare, runs_dir)]
    if html or png:
        _write(reports, html, png)
    if as_json:
        values = [report.to_dict() for report in reports]
        typer.echo(json.dumps({"runs": values} if compare else values[0], indent=2))
    elif not (html or png):
        from titan_slurm.report import terminal

        terminal.show(reports, show.console())


def _find(names: list[str], compare: bool, runs_dir: Path | None) -> "list[RunDirectory]":
    """The runs of these names. Raises BadInputError with each that there is not."""
    from titan_slurm.errors import BadInputError, Problem
    from titan_slurm.run.find import find_run, runs_folder

    problems, found = [], []
    if compare and len(names) == 1:
        problems.append(Problem("--compare", "one run has nothing to be compared with", "name another"))
    if not compare and len(names) > 1:
        problems.append(Problem("report", f"{len(names)} runs were named", "--compare puts them beside one another"))
    for name in names:
        try:
            found.append(find_run(name, runs_folder(runs_dir)))
        except BadInputError as error:
            problems += error.problems
    if problems:
        raise BadInputError(problems)
    return found


def _build(run: "RunDirectory") -> "Report":
    import time

    from titan_slurm.cluster.state import status
    from titan_slurm.report.report import State, build

    now = status(run)
    return build(run, State(now.state, now.reason, time.time(), now.is_active))


def _check_outputs(html: Path | None, png: Path | None) -> None:
    """Raises BadInputError for what cannot be written, before anything is."""
    from titan_slurm.errors import BadInputError, Problem

    problems = []
    if html is not None and html.is_dir():
        problems.append(Problem("--html", f"{html} is a folder", "name a file"))
    elif html is not None and not html.parent.is_dir():
        problems.append(Problem("--html", f"there is no folder {html.parent}"))
    if png is not None and png.exists() and not png.is_dir():
        problems.append(Problem("--png", f"{png} is no folder"))
    if problems:
        raise BadInputError(problems)


def _write(reports: "list[Report]", html: Path | None, png: Path | None) -> None:
    from titan_slurm.cli import show
    from titan_slurm.errors import bad_input
    from titan_slurm.run.files import write_atomic

    try:
        if html is not None:
            from titan_slurm.report.html import render

            write_atomic(html, render(reports))
            show.note(f"wrote {html}")
        if png is not None:
            from titan_slurm.report import plots

            png.mkdir(parents=True, exist_ok=True)
            for plot in plots.plots(reports):
                show.note(f"wrote {plots.write_png(plot, png)}")
    except OSError as error:
        raise bad_input(str(error.filename or html or png), f"cannot be written: {error.strerror}") from None
