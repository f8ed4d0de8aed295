"""Show what a run is doing, or all runs: oldest submission first, as sacct does.

\b
Examples:
  titan-slurm status
  titan-slurm status --state running,queued --sort -step
  titan-slurm status --name 'sweep-*' --watch
  titan-slurm status llama3_debug-20261122-145600
  titan-slurm status 4711 --json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType
    from rich.table import Table

    from titan_slurm.cluster.state import RunStatus
    from titan_slurm.run.directory import RunDirectory

NAME = "status"
# Slurm's controller serves everybody.
_EVERY_S = 10.0
_SORT_KEYS = {
    "submitted": "submitted",
    "updated": "updated",
    "name": "name",
    "state": "state",
    "step": "step",
    "left": "seconds_left",
}


def command(
    run: Annotated[
        str | None, typer.Argument(help="A run's name, path or job id; all runs if left out.", show_default=False)
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="STATE,...", help="Only runs in these states, or: active.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="GLOB", help="Only runs whose name matches: 'sweep-*'.", show_default=False),
    ] = None,
    sort: Annotated[
        str, typer.Option("--sort", metavar="KEY", help=f"One of {', '.join(_SORT_KEYS)}; -KEY for the reverse.")
    ] = "submitted",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again, until Ctrl-C.")] = False,
    every: Annotated[
        float | None, typer.Option("--every", help="Seconds between two looks of --watch; 10 if left out.", min=1)
    ] = None,
    as_json: options.Json = False,
    runs_dir: options.RunsDir = None,
) -> None:
    import json

    from titan_slurm.cli import show
    from titan_slurm.errors import bad_input
    from titan_slurm.run.find import find_run, runs_folder

    folder = runs_folder(runs_dir)
    if run is not None and (state or name):
        raise bad_input("", "a run by its name goes with neither --state nor --name")
    view = _View(folder, find_run(run, folder) if run else None, _states(state or []), name, *_order(sort))
    if every is not None and not watch:
        raise bad_input("--every", "is of use with --watch alone")
    if watch:
        if as_json:
            raise bad_input("--watch", "does not go with --json")
        if not sys.stdout.isatty():
            raise bad_input("--watch", "this is no terminal", "`titan-slurm status --json` is for programs")
        raise typer.Exit(_watch(view, every or _EVERY_S))
    found = view.look()
    if as_json:
        values = [each.to_dict() for each in found]
        typer.echo(json.dumps(values if run is None else values[0], indent=2))
    elif found:
        show.console().print(_table(found) if run is None else _one(found[0]))
    else:
        which = " like that" if state or name else ""
        typer.echo(f"no runs{which} in {folder}")


@dataclass(frozen=True)
class _View:
    """What is asked for: one run, or the runs of a folder in these states (none: any), in this order."""

    folder: Path
    run: "RunDirectory | None"
    states: frozenset[str]
    glob: str | None
    key: str
    reverse: bool

    def look(self) -> "list[RunStatus]":
        """The status of each, by one question to Slurm."""
        from titan_slurm.cluster.state import STATES, status, survey
        from titan_slurm.run.find import all_runs

        if self.run is not None:
            return [status(self.run)]
        found, unreadable = survey(select.matching(all_runs(self.folder), self.glob))
        select.note_unreadable(unreadable)

        def value(each: "RunStatus") -> float | str | None:
            return STATES.index(each.state) if self.key == "state" else getattr(each, self.key)

        wanted = [each for each in found if not self.states or each.state in self.states]
        # What has no value has none yet, and is the newest.
        known = [each for each in wanted if value(each) is not None]
        return [
            *sorted(known, key=value, reverse=self.reverse),  # type: ignore[arg-type]
            *(each for each in wanted if value(each) is None),
        ]


def _states(given: list[str]) -> frozenset[str]:
    from titan_slurm.cluster.state import ACTIVE, STATES
    from titan_slurm.errors import BadInputError, Problem, did_you_mean

    words = [word.strip() for text in given for word in text.split(",")]
    known = (*STATES, "active")
    problems = [
        Problem("--state", f"there is no state {word!r}", did_you_mean(word, known))
        for word in words
        if word not in known
    ]
    if problems:
        raise BadInputError(problems)
    return frozenset(words) | (ACTIVE if "active" in words else frozenset())


def _order(sort: str) -> tuple[str, bool]:
    from titan_slurm.errors import bad_input, did_you_mean

    key = sort.removeprefix("-")
    if key not in _SORT_KEYS:
        raise bad_input("--sort", f"there is no key {key!r}", did_you_mean(key, _SORT_KEYS))
    return _SORT_KEYS[key], sort.startswith("-")


def _watch(view: _View, every: float) -> int:
    """Show the view until Ctrl-C. What cannot be read at one look is shown as it was at the last."""
    import time

    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from titan_slurm.cli import show
    from titan_slurm.cluster.state import NO_ANSWER

    console = show.console()
    found, failed = [], ""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while True:
                try:
                    found, failed = view.look(), ""
                except OSError as error:
                    failed = f"; cannot look: {error}"
                if any(each.reason == NO_ANSWER for each in found):
                    failed = "; Slurm's controller does not answer, these are the last known states"
                about = f"{time.strftime('%H:%M:%S')}  {select.states_of(found) or 'no runs'}{failed}"
                shown = found if view.run else _most_interesting(found, max(console.height - 4, 1))
                if len(shown) < len(found):
                    about += f"; {len(found) - len(shown)} not shown"
                body: RenderableType = _one(found[0]) if view.run and found else _table(shown)
                live.update(Group(Text(about, "dim"), body), refresh=True)
                time.sleep(every)
        except KeyboardInterrupt:
            return 0


def _most_interesting(found: "list[RunStatus]", count: int) -> "list[RunStatus]":
    """As many as fit on the screen, in their order: active ones before others, then the newest."""
    ranked = sorted(found, key=lambda each: (not each.is_active, -(each.submitted or float("inf"))))
    chosen = {each.path for each in ranked[:count]}
    return [each for each in found if each.path in chosen]


def _one(status: "RunStatus") -> "RenderableType":
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    from titan_slurm.cli import show

    lines: list[RenderableType] = []
    if sys.stdout.isatty() and status.max_steps:
        lines.append(ProgressBar(total=status.max_steps, completed=status.step, width=60))
    for name, text in show.status_lines(status):
        state = show.styled_state(status.state) if name == "state" else Text()
        lines.append(Text.assemble((f"{name:>9}", "dim"), "  ", state, text.removeprefix(state.plain)))
    return Group(*lines)


def _table(found: "Sequence[RunStatus]") -> "Table":
    from titan_slurm.cli import show

    rows = [
        (
            each.name,
            show.styled_state(each.state),
            f"{each.step}/{each.max_steps}",
            "-" if each.loss is None else f"{each.loss:.4f}",
            "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            "-" if each.seconds_left is None else show.duration(each.seconds_left),
            each.job_id or "-",
            each.attempts,
            each.verdict or "-",
        )
        for each in found
    ]
    headings = ("RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "JOB", "ATTEMPTS", "VERDICT")
    return show.make_table(headings, rows, right=("LOSS", "TOKENS/S", "LEFT"), wrap=())
