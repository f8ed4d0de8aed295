"""Look for whatever would keep runs from working here: Slurm, the profile, the folder of runs, packages, wandb.

With --job also on the nodes, by a job of some minutes: shared folder, GPUs and their health, network, clocks, limits,
versions, and the bandwidth of all-reduce. Each line is ok, a warning, or FAIL with what to do; then the exit code is 1.

\b
Examples:
  titan-slurm doctor
  titan-slurm doctor --cluster hpc --job
  titan-slurm doctor --cluster hpc --job --nodes 4
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from titan_slurm.cli import options

if TYPE_CHECKING:
    from titan_slurm.launch.place import Place
    from titan_slurm.run.finding import Finding

NAME = "doctor"
# Without these a job would find nothing more.
_NEEDED = frozenset({"Slurm", "shared folder", "packages"})


def command(
    cluster: options.Cluster = None,
    job: Annotated[bool, typer.Option("--job", help="Look at the nodes too, by a job.")] = False,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", "-N", min=1, help="With --job: on so many; all of the partition if left out.", show_default=False
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="With --job: seconds after which it must have started.")
    ] = 600,
    runs_dir: options.RunsDir = None,
    as_json: options.Json = False,
) -> None:
    import json

    from titan_slurm.errors import bad_input
    from titan_slurm.launch.place import choose
    from titan_slurm.run.find import runs_folder
    from titan_slurm.run.finding import FAIL

    if nodes is not None and not job:
        raise bad_input("--nodes", "says on how many nodes the job looks", "with --job")
    place = choose(cluster, without_slurm="slurm")
    if place.cluster == "local":
        raise bad_input("--cluster", "doctor looks at a Slurm site", "a cluster profile, or slurm")
    findings = []
    for each in _look(place, cluster, runs_folder(runs_dir), job=job, nodes=nodes, wait_s=wait):
        findings.append(each)
        if not as_json:
            typer.echo(each)
    if as_json:
        typer.echo(json.dumps([each.to_dict() for each in findings], indent=2, ensure_ascii=False))
    if any(each.level == FAIL for each in findings):
        raise typer.Exit(1)


def _look(
    place: "Place", cluster: str | None, runs: Path, *, job: bool, nodes: int | None, wait_s: float
) -> "Iterator[Finding]":
    from titan_slurm.cluster.doctor import on_login_node
    from titan_slurm.run.finding import FAIL, Finding

    failed = set()
    for each in on_login_node(place.profile, runs):
        failed |= {each.name} if each.level == FAIL else set()
        yield each
    if job and failed & _NEEDED:
        yield Finding("job", "not submitted", "mend what fails above first", is_warning=True)
    elif job:
        yield from _look_at_nodes(place, cluster, runs, nodes, wait_s)


def _look_at_nodes(
    place: "Place", cluster: str | None, runs: Path, nodes: int | None, wait_s: float
) -> "Iterator[Finding]":
    from titan_slurm.cluster.doctor import usable_nodes
    from titan_slurm.errors import BadInputError
    from titan_slurm.launch import doctor
    from titan_slurm.launch.create import free_name
    from titan_slurm.run.finding import Finding

    profile = place.profile
    count = nodes or usable_nodes(profile.settings.slurm.partition if profile else None)
    if profile is None or profile.settings.nodes.gpus is None:
        advice = "`titan-slurm cluster init` makes a profile, with [nodes] gpus"
        yield Finding("GPUs", "are not looked at: no profile says how many a node has", advice, is_warning=True)
    if not count:
        yield Finding("job", "not submitted: no node takes jobs", "wait, or choose another partition", is_warning=True)
        return
    name, given = free_name("doctor", runs), doctor.settings(count, profile)
    try:
        prepared = options.prepare(doctor.RECIPE, count, given, cluster, name, runs, without_slurm="slurm")
    except BadInputError as error:
        for problem in error.problems:
            yield Finding("job", f"cannot be planned: {problem.what}", problem.hint or f"see {problem.where}")
        return
    yield from doctor.on_nodes(prepared, wait_s)
