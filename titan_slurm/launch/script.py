"""A plan and a template → the text of the batch script. A pure function: it needs no Slurm and writes nothing."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.recipe import find
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import to_exclude
from titan_slurm.run.plan import Plan


def template_for(plan: Plan) -> find.Found:
    """The template that a plan's script is made from: for a local run, of the cluster profile, or the base one. The
    user's own comes before a built-in one of the same name."""
    name = "local" if plan.cluster == "local" else _given(plan, "cluster", "template") or "base"
    try:
        return find.template_file(name)
    except BadInputError as error:
        where = plan.values.get("cluster.cluster.template", {}).get("from", "")
        problems = (Problem(where, f"{each.where}: {each.what}", each.hint) for each in error.problems)
        raise BadInputError(problems) from None


def render(plan: Plan, run: RunDirectory, command: str, sbatch: Mapping[str, Any] | None = None) -> str:
    """The batch script that runs `command` once per rank. `sbatch`: its options, where they are not the run's own.
    Raises BadInputError for a template that cannot be used."""
    # Whoever only asks which template it is, as `validate` does, need not wait for it.
    from titan_slurm.launch import rendering

    _check_path(run.path)
    template = template_for(plan)
    context = {
        "plan": plan,
        "run": str(run.path),
        "name": plan.name,
        "python": python(plan),
        "command": command,
        "sbatch": sbatch_options(plan, run) if sbatch is None else sbatch,
        "srun": [*(_given(plan, "slurm", "srun") or []), *plan.slurm["srun"]],
        "wrapper": [],
        "look": _look(plan),
        "threads": max(1, (os.cpu_count() or 1) // plan.layout.world_size),
    }
    context |= _site(plan)
    if "container" in context and "container" not in rendering.names_in(template):
        what = f"container.image is given, and the template {template.name} starts no container"
        raise bad_input(plan.values["cluster.container.image"]["from"], what, "cluster.template = 'pyxis_efa', say")
    return rendering.render(template, context)


def _check_path(path: Path) -> None:
    """Raises BadInputError for a run where its job would not find what it needs."""
    for character, what in ((":", "which PYTHONPATH cannot hold"), ("%", "by which submitit means a job's id")):
        if character in str(path):
            raise bad_input("--runs-dir", f"{path} has a {character!r}, {what}", "another folder of runs")


@dataclass(frozen=True)
class Array:
    """A job array: what it is called, how many tasks it has, and how many of them may run at a time (None: as many as
    Slurm lets). The comment is for all of its jobs."""

    name: str
    comment: str
    tasks: int
    at_once: int | None

    @property
    def digits(self) -> int:
        """How many digits the numbers of its runs have: then they are in order by name too."""
        return len(str(self.tasks - 1))

    def run_name(self, task: int) -> str:
        """The name of a task's run."""
        return f"{self.name}-{task:0{self.digits}d}"


def array_script(plan: Plan, run: RunDirectory, array: Array) -> str:
    """The batch script of a job array whose first task is this run: what the run's own script would tell sbatch by the
    array's options, and then, for each task, the script of its run."""
    directives = []
    for line in render(plan, run, "true", array_options(plan, run, array)).split("\n"):
        # As sbatch itself, which reads none after the first command.
        if line and not line.startswith("#"):
            break
        directives += [line] if line.startswith("#SBATCH") else []
    return "\n".join(
        [
            "#!/bin/bash",
            *directives,
            "",
            "# Each task is a run of its own.",
            f'printf -v task %0{array.digits}d "$SLURM_ARRAY_TASK_ID"',
            f'exec bash {shlex.quote(str(run.path.with_name(array.name)))}-"$task"/job.sh',
            "",
        ]
    )


def array_options(plan: Plan, run: RunDirectory, array: Array) -> dict[str, Any]:
    """Options of sbatch for a job array whose first task is this run."""
    log = f"{run.path.with_name(array.name)}-%{array.digits}a/job.log"
    own = {"job-name": array.name, "comment": array.comment, "output": log}
    options = {name: own.get(name, value) for name, value in sbatch_options(plan, run).items()}
    return options | {"array": f"0-{array.tasks - 1}" + (f"%{array.at_once}" if array.at_once else "")}


def python(plan: Plan) -> str:
    """The interpreter that has titan-slurm: of the profile's environment, or the one that runs now."""
    venv, conda = _given(plan, "setup", "venv"), _given(plan, "setup", "conda")
    return f"{venv}/bin/python" if venv else "python" if conda else sys.executable


def python_of_ranks(plan: Plan) -> str:
    """The same for the ranks, which may be in a container."""
    if not _given(plan, "container", "image"):
        return python(plan)
    return _given(plan, "container", "python") or "python3"


def _look(plan: Plan) -> str:
    """What one task on each node runs to look at it, ready for the shell; empty where nobody looks."""
    wanted = plan.cluster == "slurm" and plan.slurm.get("preflight")
    return f"{shlex.quote(python_of_ranks(plan))} -m titan_slurm.run look" if wanted else ""


def sbatch_options(plan: Plan, run: RunDirectory) -> dict[str, Any]:
    """Options of sbatch by their long names, in the order of the script. True is an option without a value."""
    slurm, layout = plan.slurm, plan.layout
    more = {name: value for name, value in slurm["sbatch"].items() if value is not False}
    # What is given by these two is said together with what the run itself has to say.
    gres, _ = more.pop("gres", None), more.pop("exclude", None)
    gpus = slurm["gpus_per_node"] and f"{slurm['gpu_type'] + ':' if slurm['gpu_type'] else ''}{slurm['gpus_per_node']}"
    request = _given(plan, "slurm", "gpu_request") or "gpus-per-node"
    options = {
        "job-name": plan.name,
        "comment": plan.job_comment,
        "nodes": layout.nodes,
        "ntasks-per-node": layout.tasks_per_node,
        "gpus-per-node": (gpus or None) if request == "gpus-per-node" else None,
        "gres": _joined(f"gpu:{gpus}" if gpus and request == "gres" else None, gres),
        "cpus-per-task": slurm["cpus_per_task"],
        "mem": slurm["mem"],
        "time": slurm["time"],
        "partition": slurm["partition"],
        "account": slurm["account"],
        "qos": slurm["qos"],
        "constraint": slurm["constraint"],
        "reservation": slurm["reservation"],
        "exclusive": slurm["exclusive"] or None,
        "exclude": _joined(*to_exclude(run, plan)),
        "requeue" if plan.requeue["enabled"] else "no-requeue": True,
        # Only the ranks get it, not this script, which has to act after they have left.
        "signal": f"USR2@{slurm['signal_lead']}",
        "output": str(run.path / "job.log"),
        # A requeued job must not wipe out what its earlier attempts said.
        "open-mode": "append",
    }
    never = _given(plan, "slurm", "refused") or []
    return {name: value for name, value in (options | more).items() if value is not None and name not in never}


def refused(plan: Plan) -> dict[str, str]:
    """The fields that were set and that the site refuses, and where it says so."""
    where = plan.values.get("cluster.slurm.refused", {}).get("from")
    fields = [f"slurm.{name.replace('-', '_')}" for name in _given(plan, "slurm", "refused") or []]
    return {field: f"{where} names it as refused" for field in fields if field in plan.values}


def _joined(*parts: str | None) -> str | None:
    return ",".join(part for part in parts if part) or None


def _given(plan: Plan, section: str, field: str) -> Any:
    """A value of the plan's cluster profile; None where there is none."""
    return plan.profile["given"].get(section, {}).get(field) if plan.profile else None


def _site(plan: Plan) -> dict[str, Any]:
    """What a template may say of the site. `container` is defined only where there is one."""
    given = plan.profile["given"] if plan.profile else {}
    setup, network = given.get("setup", {}), given.get("network", {})
    site = {
        "modules": setup.get("modules", []),
        "venv": setup.get("venv"),
        "conda": setup.get("conda"),
        "variables": given.get("environment", {}),
        "interface": network.get("interface"),
        "infiniband": network.get("infiniband"),
        "infiniband_devices": network.get("infiniband_devices"),
        "efa": network.get("efa", False),
        "scratch": given.get("paths", {}).get("scratch"),
    }
    if plan.profile and "container" in given:
        site["container"] = {"image": given["container"]["image"], "mounts": plan.profile["mounts"]}
    return site
