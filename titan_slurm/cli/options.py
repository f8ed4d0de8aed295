"""Options that several verbs share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from titan_slurm.launch.place import Place
    from titan_slurm.launch.submit import Prepared
    from titan_slurm.recipe.resolve import ResolvedRecipe

Recipe = Annotated[
    str | None,
    typer.Argument(help="A recipe's file or name; TORCHTITAN_CONFIG_PATH if left out.", show_default=False),
]
Run = Annotated[str, typer.Argument(help="A run's name, path or job id.", show_default=False)]
Nodes = Annotated[int | None, typer.Option("--nodes", "-N", help="Number of nodes.", show_default=False)]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="A cluster profile's name or file; slurm without one; local for this machine. TITAN_SLURM_CLUSTER, the "
        "profile called default, or slurm where it is found, if left out.",
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the recipe.", show_default=False),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="The run's name; made from recipe and time if left out.", show_default=False),
]
RunsDir = Annotated[
    Path | None,
    typer.Option("--runs-dir", help="Folder of runs; TITAN_SLURM_RUNS, or ./runs, if left out.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def resolve(
    recipe: str | None,
    nodes: int | None,
    settings: list[str] | None,
    place: "Place | None" = None,
    *,
    own_model: bool = False,
) -> "ResolvedRecipe":
    """The recipe with the command line's values over it, and the place's beneath; `own_model`: a script makes its model
    itself. Raises BadInputError with every problem."""
    from titan_slurm.errors import BadInputError
    from titan_slurm.launch.place import beneath
    from titan_slurm.recipe.resolve import Override, parse_set
    from titan_slurm.recipe.resolve import resolve as resolve_recipe

    overrides, problems = [], []
    for text in settings or []:
        try:
            overrides.append(parse_set(text))
        except BadInputError as error:
            problems += error.problems
    if nodes is not None:
        overrides.append(Override(("slurm", "nodes"), nodes, "--nodes"))
    try:
        lowest = beneath(place.profile) if place else {}
        resolved = resolve_recipe(recipe, overrides, beneath=lowest, own_model=own_model)
    except BadInputError as error:
        raise BadInputError([*problems, *error.problems]) from None
    if problems:
        raise BadInputError(problems)
    return resolved


def prepare(
    recipe: str | None,
    nodes: int | None,
    settings: list[str] | None,
    cluster: str | None,
    name: str | None,
    runs_dir: Path | None,
    *,
    resume: bool = False,
    only_show: bool = False,
    without_slurm: str = "local",
    script: Path | None = None,
    arguments: "Sequence[str]" = (),
    quick: bool = False,
) -> "Prepared":
    """Plan a run; its notes say what was chosen for the user. `without_slurm`: the cluster to take where there is none
    and the user names none. `script`: a user's, with its `arguments`, in the place of torchtitan's loop. `quick`: large
    files are not read."""
    from titan_slurm.errors import bad_input
    from titan_slurm.launch import user_script
    from titan_slurm.launch.place import choose
    from titan_slurm.launch.submit import prepare as prepare_run
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.run.find import find_run, runs_folder

    runs = runs_folder(runs_dir)
    # Where a run goes on, it does so where it was.
    goes_on = resume and name is not None and RunDirectory(runs / name).exists()
    resumed = find_run(str(runs / str(name)), runs).plan() if goes_on else None
    place = choose(cluster, resumed=resumed, without_slurm=without_slurm)
    own = user_script.named(script, arguments) if script else None
    if own is None and resumed is not None:
        own = user_script.of_run(RunDirectory(runs / str(name)), arguments)
    if arguments and own is None:
        raise bad_input(" ".join(arguments), "arguments without a script to take them", "--script my_script.py")
    resolved = resolve(recipe, nodes, settings, place, own_model=own is not None)
    return prepare_run(
        resolved, place=place, runs=runs, name=name, resume=resume, only_show=only_show, script=own, quick=quick
    )
