"""Make sure that a run exists, and is queued, running or finished; submit it if not. For cron and scrontab.

The run of a RECIPE is called like the recipe, or by --name. Once there is one it goes by its own plan, whatever becomes
of the recipe. It prints one line.

\b
Exit codes:
  0   the run is queued, running or finished, or has been submitted
  2   an error: nothing is made that was not there
  3   its user has cancelled it; it is left alone
  4   it has failed for good, or spent a budget; it is left alone
  75  nobody can know now whether it lives (Slurm's controller does not answer, say); nothing is changed

\b
Examples:
  titan-slurm ensure llama3_8b --cluster hpc --nodes 2
  titan-slurm ensure recipes/llama3_8b.toml --name my-8b --quiet
  titan-slurm ensure llama3_8b --name my-8b --print-cron
  titan-slurm ensure my-8b
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable

    from titan_slurm.launch.submit import Prepared
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.run.plan import Plan

NAME = "ensure"


def command(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="A recipe's file or name, or a run's name or path; TORCHTITAN_CONFIG_PATH if left out.",
            show_default=False,
        ),
    ] = None,
    nodes: options.Nodes = None,
    cluster: options.Cluster = None,
    settings: options.Set = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The run's name; the recipe's if left out.", show_default=False)
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Where it is submitted again, go by the recipe as it is now.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing if the exit code is 0.")] = False,
    print_cron: Annotated[
        bool, typer.Option("--print-cron", help="Print lines for crontab or scrontab that call this; do nothing.")
    ] = False,
    runs_dir: options.RunsDir = None,
) -> None:
    from titan_slurm.launch import cron
    from titan_slurm.launch.ensure import ensure
    from titan_slurm.run.find import runs_folder

    cron.complete_environment()
    folder = runs_folder(runs_dir)
    if (own := _named_run(what, folder)) is not None:
        _refuse_what_needs_a_recipe(nodes, settings, cluster, name, update)
        target, words = _Target(own, own.plan().cluster), [str(own.path)]
    else:
        target = _of_recipe(what, nodes, settings, cluster, name, folder, update=update)
        given = [*([what] if what else []), *(["--nodes", str(nodes)] if nodes else [])]
        given += [*(["--cluster", cluster] if cluster else []), *(["--update"] if update else [])]
        given += [word for setting in settings or [] for word in ("--set", setting)]
        words = [*given, "--name", target.run.name, "--runs-dir", str(folder)]
    if print_cron:
        typer.echo(cron.crontab(target.run, target.plan(), words))
        return
    if target.cluster == "slurm":
        cron.check_slurm()
    outcome = ensure(target.run, target.new, target.update)
    if outcome.code or not quiet:
        typer.echo(outcome.text + target.note, err=outcome.code != 0)
    raise typer.Exit(outcome.code)


@dataclass(frozen=True)
class _Target:
    """The run, and how it is planned by its recipe, if it was named by one."""

    run: "RunDirectory"
    cluster: str
    new: "Callable[[], Prepared] | None" = None
    update: "Callable[[], Prepared] | None" = None
    note: str = ""

    def plan(self) -> "Plan":
        if self.run.exists():
            return self.run.plan()
        assert self.new is not None
        return self.new().plan


def _named_run(what: str | None, folder: Path) -> "RunDirectory | None":
    """The run that is meant, if it is no recipe: where both have the name, the run is the recipe's, most likely."""
    from titan_slurm.errors import BadInputError, bad_input
    from titan_slurm.recipe.find import recipe_file
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.run.find import find_run

    if what is None:
        return None
    if RunDirectory(Path(what)).exists():
        return find_run(what, folder)
    try:
        recipe_file(what)
    except BadInputError as error:
        if RunDirectory(folder / what).exists():
            return find_run(what, folder)
        if "/" in what or what.endswith(".toml"):
            # Perhaps it is gone, and its run is not.
            return None
        raise bad_input(what, f"is neither a recipe nor a run in {folder}", error.problems[0].hint) from None
    return None


def _refuse_what_needs_a_recipe(
    nodes: int | None, settings: list[str] | None, cluster: str | None, name: str | None, update: bool
) -> None:
    from titan_slurm.errors import BadInputError, Problem

    given = {"--nodes": nodes, "--set": settings, "--cluster": cluster, "--name": name, "--update": update}
    what, hint = "a run that is named goes by its own plan", "name its recipe, or leave this out"
    if problems := [Problem(option, what, hint) for option, value in given.items() if value]:
        raise BadInputError(problems)


def _of_recipe(
    recipe: str | None,
    nodes: int | None,
    settings: list[str] | None,
    cluster: str | None,
    name: str | None,
    runs: Path,
    *,
    update: bool,
) -> _Target:
    from titan_slurm.errors import BadInputError
    from titan_slurm.launch import create
    from titan_slurm.launch.ensure import changes
    from titan_slurm.launch.place import choose
    from titan_slurm.launch.submit import prepare
    from titan_slurm.run.directory import RunDirectory

    if name is not None:
        create.check_name(name)
    known = _plan_of(runs / name, runs) if name is not None else None
    try:
        # Where there is no Slurm, this is not a machine to train on because of that: cron runs anywhere.
        place = choose(cluster, resumed=known, without_slurm="slurm")
        resolved = options.resolve(recipe, nodes, settings, place)
    except BadInputError as error:
        if known is None:
            raise
        what = f"; its recipe cannot be used ({error.problems[0]}), and the run keeps its plan"
        return _Target(RunDirectory(runs / str(name)), known.cluster, note=what)
    run = RunDirectory(runs / (name or create.stable_name(resolved.name)))
    if name is None and (known := _plan_of(run.path, runs)) is not None:
        # It goes on where it was.
        place = choose(cluster, resumed=known, without_slurm="slurm")
        resolved = options.resolve(recipe, nodes, settings, place)
    changed = changes(known, resolved) if known else []
    note = f"; its recipe has changed: {', '.join(changed[:3])}{', …' if changed[3:] else ''}" if changed else ""
    if changed and not update:
        note += "; it keeps its plan without --update"

    def new() -> "Prepared":
        return prepare(resolved, place=place, runs=runs, name=run.name)

    def updated() -> "Prepared":
        return prepare(resolved, place=place, runs=runs, name=run.name, resume=True)

    return _Target(run, known.cluster if known else place.cluster, new, updated if changed and update else None, note)


def _plan_of(path: Path, runs: Path) -> "Plan | None":
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.run.find import find_run

    return find_run(str(path), runs).plan() if RunDirectory(path).exists() else None
