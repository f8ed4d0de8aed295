"""A template tried with every recipe: it must render, bash must be able to read what comes out, and sbatch, where there
is one, is asked whether it would take it."""

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_slurm.cluster.profile import ContainerSection, Profile, Settings
from titan_slurm.errors import BadInputError, Problem
from titan_slurm.launch.place import Place, beneath
from titan_slurm.launch.submit import Prepared, prepare, would_start
from titan_slurm.recipe import find
from titan_slurm.recipe.find import Found
from titan_slurm.recipe.resolve import resolve

_LOCAL = "local"


@dataclass
class Trial:
    """What became of a template."""

    rendered: list[str] = field(default_factory=list)
    """The recipes with which it makes a script that bash can read."""
    accepted: list[str] = field(default_factory=list)
    """Those whose script sbatch would take."""
    refused: dict[str, list[str]] = field(default_factory=dict)
    """The others, by what sbatch says of them. A recipe may be too large for a site: no mistake of the template."""
    problems: list[Problem] = field(default_factory=list)


def about(template: Found) -> str:
    """The first sentence of a template's own comment."""
    comment = template.path.read_text(encoding="utf-8", errors="replace").partition("{#")[2].partition("#}")[0]
    return " ".join(comment.split()).partition(". ")[0].removesuffix(".")


def try_out(template: Found, place: Place) -> Trial:
    """Try a template with all valid recipes, at a place. One that starts a container where the place has no image is
    tried with an example."""
    trial = Trial()
    try:
        at = _with(template, place)
        for recipe in find.recipes():
            _try_recipe(recipe, at, trial)
    except BadInputError as error:
        trial.problems += error.problems
    return trial


def _with(template: Found, place: Place) -> Place:
    from titan_slurm.launch.rendering import names_in

    if template.name == _LOCAL:
        return Place("local")
    profile = place.profile or Profile("example", "example.toml", Settings(), {})
    settings = profile.settings
    changed: dict[str, Any] = {"cluster": settings.cluster.model_copy(update={"template": str(template.path)})}
    if settings.container is None and "container" in names_in(template):
        changed["container"] = ContainerSection(image="example.sqsh")
    return Place("slurm", Profile(profile.name, profile.path, settings.model_copy(update=changed), profile.origins))


def _try_recipe(recipe: Found, place: Place, trial: Trial) -> None:
    try:
        resolved = resolve(str(recipe.path), environment={}, beneath=beneath(place.profile))
    except BadInputError:
        return  # `recipes check` says why.
    prepared = prepare(resolved, place=place, runs=Path.cwd() / "runs", name=None, only_show=True)
    read = subprocess.run(["bash", "-n"], input=prepared.script, capture_output=True, text=True, check=False)
    if read.returncode != 0:
        what = f"bash cannot read the script of recipe {recipe.name}: {' '.join(read.stderr.split())}"
        raise BadInputError([Problem(str(prepared.template.path), what)])
    trial.rendered.append(recipe.name)
    _ask_sbatch(recipe.name, prepared, trial)


def _ask_sbatch(recipe: str, prepared: Prepared, trial: Trial) -> None:
    answer = would_start(prepared)
    if answer is not None and answer.start:
        trial.accepted.append(recipe)
    elif answer is not None:
        trial.refused.setdefault(answer.text, []).append(recipe)
