"""Where a run is to be: this machine, or Slurm, with a site's profile or without. What a profile says beneath a recipe,
what of a recipe it cannot give, and what a run keeps of it."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_slurm.cluster import slurm
from titan_slurm.errors import Problem, bad_input, did_you_mean
from titan_slurm.fields import Placement, megabytes
from titan_slurm.recipe import find
from titan_slurm.recipe.layout import tasks_per_node
from titan_slurm.recipe.resolve import ResolvedRecipe, Value
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.toml import Key

if TYPE_CHECKING:
    # Where there is no profile, nobody need wait for what reads and checks one.
    from titan_slurm.cluster.profile import Profile

CLUSTERS = ("local", "slurm")
CLUSTER_VARIABLE = "TITAN_SLURM_CLUSTER"
# The profile of this name is taken where nobody names one.
DEFAULT = "default"


@dataclass(frozen=True)
class Place:
    """`local` or `slurm`, the site's profile if there is one, and why it is this place where the user did not say."""

    cluster: str
    profile: "Profile | None" = None
    note: str = ""


def choose(name: str | None, *, resumed: Plan | None = None, without_slurm: str = "local") -> Place:
    """The place of that name: `local`, `slurm`, or a profile's name or file. Where none is named: the place of the run
    that goes on, TITAN_SLURM_CLUSTER, the profile called `default`, Slurm by itself; `without_slurm` where there is
    none. Raises BadInputError for a name that means nothing, and for a profile that is not valid.
    """
    if name is not None:
        return _named(name, "--cluster")
    if resumed is not None:
        return Place(resumed.cluster, restored(resumed))
    if os.environ.get(CLUSTER_VARIABLE):
        return _named(os.environ[CLUSTER_VARIABLE], f"environment {CLUSTER_VARIABLE}")
    if not slurm.is_available() and without_slurm == "local":
        return Place("local", note="no Slurm found here (no sbatch on the PATH): running on this machine")
    if any(found.name == DEFAULT for found in find.clusters()):
        return _named(DEFAULT, "")
    return Place("slurm")


def _named(name: str, where: str) -> Place:
    if name in CLUSTERS:
        return Place(name)
    known = [found.name for found in find.clusters()]
    if name not in known and "/" not in name and not name.endswith(".toml"):
        raise bad_input(where, f"there is no cluster {name!r}", did_you_mean(name, [*CLUSTERS, *known]))
    from titan_slurm.cluster import profile as profiles

    found = find.cluster_file(name)
    return Place("slurm", profiles.load(found.path, found.name))


def beneath(profile: "Profile | None") -> dict[Key, Value]:
    """What holds for recipes that do not say, by the recipe's own words."""
    if profile is None:
        return {}
    given = profile.given()
    asked = {name: value for name, value in given.get("slurm", {}).items() if name in Placement.model_fields}
    # Not srun's options, which are put together: a recipe's own must not take the site's away.
    asked.pop("srun", None)
    more = asked.pop("sbatch", {})
    layer: dict[Key, Value] = {}

    def put(key: Key, value: Any, *origin: str) -> None:
        layer[key] = Value(value, profile.where(*origin), of_place=True)

    for name, value in asked.items():
        put(("slurm", name), value, "slurm", name)
    for name, value in more.items():
        put(("slurm", "sbatch", name), value, "slurm", "sbatch", name)
    if mail := given.get("notify", {}).get("mail"):
        put(("slurm", "sbatch", "mail-user"), mail, "notify", "mail")
        put(("slurm", "sbatch", "mail-type"), "END,FAIL", "notify", "mail")
    for key, (section, name) in _FROM_ELSEWHERE.items():
        if name in given.get(section, {}):
            put(key, given[section][name], section, name)
    return layer


_FROM_ELSEWHERE: dict[Key, tuple[str, str]] = {
    ("slurm", "gpus_per_node"): ("nodes", "gpus"),
    ("slurm", "gpu_type"): ("nodes", "gpu_type"),
    ("wandb", "mode"): ("wandb", "mode"),
}


def misfits(resolved: ResolvedRecipe, profile: "Profile", run: RunDirectory) -> list[Problem]:
    """What the recipe asks for and the site does not have, and what of the profile is not to be found here."""
    from titan_slurm.cluster import check

    return [*_nodes_problems(resolved, profile), *_folder_problems(profile, run), *check.missing(profile)]


def _nodes_problems(resolved: ResolvedRecipe, profile: "Profile") -> Iterable[Problem]:
    asked, nodes = resolved.recipe.slurm, profile.settings.nodes
    tasks = tasks_per_node(resolved.recipe)
    cpus = tasks * (asked.cpus_per_task or 1)

    def problem(field: str, what: str, limit: str) -> Problem:
        value = resolved.values.get(("slurm", field))
        where = value.origin if value else str(resolved.found.path)
        has = f"the nodes of cluster {profile.name} have {getattr(nodes, limit)}"
        return Problem(where, f"slurm.{field}: {what}, and {has}", profile.where("nodes", limit))

    if nodes.gpus is not None and asked.gpus_per_node > nodes.gpus:
        yield problem("gpus_per_node", f"{asked.gpus_per_node} GPUs are asked for", "gpus")
    if asked.gpus_per_node and nodes.gpu_type and asked.gpu_type != nodes.gpu_type:
        yield problem("gpu_type", f"{asked.gpu_type!r} is asked for", "gpu_type")
    if nodes.cpus is not None and cpus > nodes.cpus:
        field = "cpus_per_task" if asked.cpus_per_task else "tasks_per_node"
        yield problem(field, f"{tasks} tasks × {asked.cpus_per_task or 1} CPUs are asked for", "cpus")
    if nodes.memory is not None and asked.mem is not None and megabytes(asked.mem) > megabytes(nodes.memory):
        yield problem("mem", f"{asked.mem} is asked for", "memory")


def _folder_problems(profile: "Profile", run: RunDirectory) -> Iterable[Problem]:
    shared = profile.settings.paths.shared
    if shared and not any(run.path.resolve().is_relative_to(Path(path).resolve()) for path in shared):
        what = f"{run.path} is not on a file system that all nodes share"
        yield Problem("--runs-dir", what, f"{profile.where('paths', 'shared')} names {', '.join(shared)}")


def mounts(profile: "Profile", run: RunDirectory, used: Any) -> tuple[list[str], list[Problem]]:
    """What a container must see, as SOURCE:TARGET[:ro]: what the profile names, and each path in the values `used` that
    this does not cover. Paths are the same inside and outside."""
    container = profile.settings.container
    if container is None:
        return [], []
    shown = [*container.mounts, *(f"{path}:{path}" for path in profile.settings.paths.shared)]
    problems = []
    for needed in [run.path, *_paths(used)]:
        if any(needed.is_relative_to(source) for source in map(_seen_as_is, shown) if source):
            continue
        # Of a folder that is still to be made, what there is of it. The run's own is there when its job starts.
        path = needed if needed == run.path else next(each for each in (needed, *needed.parents) if each.exists())
        if any(character in str(path) for character in ":,"):
            problems.append(Problem(str(path), "a container cannot be given a path with ':' or ',' in it"))
        elif path == Path("/"):
            problems.append(Problem("", "a container can only be given folders that exist; make the run's first"))
        else:
            shown.append(f"{path}:{path}")
    return list(dict.fromkeys(shown)), problems


def _seen_as_is(mount: str) -> str:
    """What can be read and written inside by the same path; empty where nothing can."""
    source, target, *read_only = mount.split(":")
    return source if source == target and not read_only else ""


def _paths(values: Any) -> Iterable[Path]:
    """The absolute paths in nested values."""
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _paths(value)
    elif isinstance(values, str) and values.startswith("/"):
        yield Path(values)


def frozen(profile: "Profile", mounted: list[str]) -> dict[str, Any]:
    """What a run keeps of its profile in its plan; `restored` is the inverse."""
    return {"name": profile.name, "path": profile.path, "given": profile.given(), "mounts": mounted}


def frozen_values(profile: "Profile") -> dict[str, dict[str, Any]]:
    """Each value of the profile with where it stands, for the plan's `values`."""
    flat = {key: profile.given() for key in profile.origins}
    for key in flat:
        for part in key:
            flat[key] = flat[key][part]
    return {".".join(("cluster", *key)): {"value": value, "from": profile.origins[key]} for key, value in flat.items()}


def restored(plan: Plan) -> "Profile | None":
    """The profile that a run has in its plan. Nothing reads its file again."""
    if plan.profile is None:
        return None
    from titan_slurm.cluster import profile as profiles

    origins = {
        tuple(key.split(".")[1:]): value["from"] for key, value in plan.values.items() if key.startswith("cluster.")
    }
    return profiles.restore(plan.profile["name"], plan.profile["path"], plan.profile["given"], origins)
