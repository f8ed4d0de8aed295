"""Which runs a verb is for: those that are named, all, or those whose name matches a pattern; and asking before it
touches runs that nobody named."""

import fnmatch
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from titan_slurm.cluster.state import RunStatus
    from titan_slurm.run.directory import RunDirectory

Runs = Annotated[
    list[str] | None, typer.Argument(metavar="RUN", help="Runs' names, paths or job ids.", show_default=False)
]
All = Annotated[bool, typer.Option("--all", help="All runs for which there is something to do.")]
Glob = Annotated[
    str | None,
    typer.Option("--name", metavar="GLOB", help="Those of all whose name matches: 'sweep-*'.", show_default=False),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

_MOST_SHOWN = 20


def choose(
    verb: str,
    states: Collection[str],
    names: list[str] | None,
    everything: bool,
    glob: str | None,
    yes: bool,
    runs_dir: Path | None,
) -> "list[RunDirectory]":
    """The runs that are meant: the named ones in any state, or of the others those in these states, after asking.

    Raises BadInputError for every name without a run, where nobody says which runs, and where nobody can be asked.
    """
    from titan_slurm.cluster.state import survey
    from titan_slurm.errors import bad_input
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.run.find import all_runs, runs_folder

    folder = runs_folder(runs_dir)
    if names and (everything or glob):
        raise bad_input("", "runs by their names go with neither --all nor --name")
    if names:
        return by_names(names, folder)
    if not everything and not glob:
        raise bad_input("", f"say which runs to {verb}", "RUN..., --all, or --name 'GLOB'")
    found, unreadable = survey(matching(all_runs(folder), glob))
    note_unreadable(unreadable)
    if glob and not found:
        raise bad_input("--name", f"no run in {folder} has a name like {glob!r}")
    meant = [each for each in found if each.state in states]
    if meant:
        ask(verb, [f"{each.name}  {each.state}" for each in meant], yes)
    return [RunDirectory(Path(each.path)) for each in meant]


def by_names(names: Iterable[str], folder: Path) -> "list[RunDirectory]":
    """The runs of these names, paths or job ids, each once. Raises BadInputError with every one that there is not."""
    from titan_slurm.errors import BadInputError, Problem
    from titan_slurm.run.find import find_run

    found: dict[Path, RunDirectory] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            run = find_run(name, folder)
            found.setdefault(run.path, run)
        except BadInputError as error:
            problems += error.problems
    if problems:
        raise BadInputError(problems)
    return list(found.values())


def matching(runs: "Iterable[RunDirectory]", glob: str | None) -> "list[RunDirectory]":
    """The runs whose name matches the pattern, or all without one."""
    return [run for run in runs if glob is None or fnmatch.fnmatchcase(run.name, glob)]


def note_unreadable(unreadable: dict[Path, str]) -> None:
    """Say which runs are left out, and why."""
    from titan_slurm.cli import show

    for file, why in unreadable.items():
        show.note(f"{file}: {why}")


def ask(verb: str, lines: list[str], yes: bool) -> None:
    """Have the user agree. Leaves with exit code 1 if they do not; raises BadInputError where nobody can be asked."""
    from titan_slurm.errors import bad_input

    if yes:
        return
    count = "this run" if len(lines) == 1 else f"these {len(lines)} runs"
    if not sys.stdin.isatty():
        what = f"{verb} {len(lines)} {'run' if len(lines) == 1 else 'runs'}: nobody can be asked, this is no terminal"
        raise bad_input("", what, "--yes says that it is meant")
    for line in lines[:_MOST_SHOWN]:
        typer.echo(f"  {line}", err=True)
    if len(lines) > _MOST_SHOWN:
        typer.echo(f"  … and {len(lines) - _MOST_SHOWN} more", err=True)
    typer.confirm(f"{verb} {count}?", abort=True, err=True)


def report(outcomes: "list[dict[str, object]]", nothing: str, as_json: bool) -> None:
    """Show what was done to each run: its `text`. Raises BadInputError with each `error`, after all is shown."""
    import json

    from titan_slurm.errors import BadInputError, Problem

    if as_json:
        typer.echo(json.dumps(outcomes, indent=2))
    else:
        for each in outcomes:
            if not each["error"]:
                typer.echo(each["text"])
        if not outcomes:
            typer.echo(nothing)
    problems = [Problem(str(each["name"]), str(each["error"])) for each in outcomes if each["error"]]
    if problems:
        raise BadInputError(problems)


def states_of(found: "Iterable[RunStatus]") -> str:
    """How many runs are in which state, in a line."""
    from collections import Counter

    from titan_slurm.cluster.state import STATES

    counted = Counter(each.state for each in found)
    return ", ".join(f"{counted[state]} {state}" for state in STATES if counted[state])
