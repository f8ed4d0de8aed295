"""A cluster profile held against the live site."""

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_slurm.cluster.profile import Profile, Settings
from titan_slurm.cluster.site import Partition, Site, about_kind, about_preemption, kinds, seconds
from titan_slurm.errors import Problem, did_you_mean
from titan_slurm.fields import megabytes
from titan_slurm.run.notify import webhook_problem

# Of a shared file system that is busy.
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `advice` says what to do if it is not right, and is empty if it is."""

    what: str
    advice: str = ""

    @property
    def is_right(self) -> bool:
        """Whether nothing is to be done."""
        return not self.advice


def check(profile: Profile, site: Site) -> list[Finding]:
    """Hold a profile against the site."""
    return [*_findings(profile.settings, site), *_path_findings(profile), *_setup_findings(profile)]


def missing(profile: Profile) -> list[Problem]:
    """What the profile names and this machine, which should see all that the nodes see, does not have."""
    setup, container = profile.settings.setup, profile.settings.container
    problems = [
        Problem(profile.where("paths", "shared"), f"paths.shared: there is no folder {path}")
        for path in profile.settings.paths.shared
        if not Path(path).is_dir()
    ]
    if setup.venv and not Path(setup.venv, "bin", "python").exists():
        problems.append(Problem(profile.where("setup", "venv"), f"setup.venv: there is no {setup.venv}/bin/python"))
    webhook = profile.settings.notify.webhook_file
    if webhook and (problem := webhook_problem(Path(webhook))):
        problems.append(Problem(profile.where("notify", "webhook_file"), f"notify.webhook_file: {problem}"))
    if container and container.image.startswith("/") and not Path(container.image).exists():
        problems.append(Problem(profile.where("container", "image"), f"container.image: there is no {container.image}"))
    return problems


def _path_findings(profile: Profile) -> Iterator[Finding]:
    problems = missing(profile)
    for problem in problems:
        yield Finding(problem.what, "make it, or name another")
    if not problems and (profile.settings.paths.shared or profile.settings.setup.venv or profile.settings.container):
        yield Finding("all paths are here")


def _setup_findings(profile: Profile) -> Iterator[Finding]:
    """Modules and the conda environment, loaded here as the batch script does on the job's first node."""
    setup = profile.settings.setup
    if setup.modules:
        yield Finding(f"module load {' '.join(setup.modules)}", _complaint(_LOAD_MODULES, *setup.modules))
    if setup.conda:
        yield Finding(f"conda activate {setup.conda}", _complaint(_ACTIVATE_CONDA, *setup.modules, setup.conda))


_LOAD_MODULES = """\
if ! type module >/dev/null 2>&1; then . /etc/profile; fi
for each; do module load "$each" || exit 1; done
"""
_ACTIVATE_CONDA = """\
if [ "$#" -gt 1 ]; then
  if ! type module >/dev/null 2>&1; then . /etc/profile; fi
  module load "${@:1:$#-1}" || exit 1
fi
eval "$(conda shell.bash hook)" && conda activate "${@:$#}"
"""


def _complaint(script: str, *arguments: str) -> str:
    """What a shell says of a script that fails; nothing where it does not."""
    try:
        done = subprocess.run(
            ["bash", "-c", script, "bash", *arguments],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"is not done within {_TIMEOUT_S} s"
    said = " ".join(done.stderr.split())[:300]
    # The older of the two programs that have `module` leaves with 0 whatever it says.
    return (said or "fails without a word") if done.returncode or ":ERROR:" in said else ""


def _findings(settings: Settings, site: Site) -> Iterator[Finding]:
    yield Finding(f"Slurm {site.config.get('SLURM_VERSION', '')} answers for cluster {site.name}")
    asked = settings.slurm
    names = asked.partition.split(",") if asked.partition else []
    partitions = [site.partitions[name] for name in names if name in site.partitions]
    for name in names:
        yield _partition_finding(name, site)
    if not names and site.default_partition:
        partitions = [site.default_partition]
        yield Finding(f"partition: none is named, jobs go to the default one, {site.default_partition.name}")
    elif not names:
        yield Finding("partition: none is named", f"there is no default one; name one of {', '.join(site.partitions)}")
    yield from _account_findings(settings, site, partitions)
    yield from _feature_findings(settings, site, partitions)
    for partition in partitions:
        yield from _node_findings(settings, partition)
        yield from _time_findings(settings, site, partition)


def _partition_finding(name: str, site: Site) -> Finding:
    if name not in site.partitions:
        return Finding(f"partition {name}", f"there is none; {did_you_mean(name, site.partitions)}")
    state = site.partitions[name].facts.get("State", "UP")
    return Finding(f"partition {name} is {state}", "" if state == "UP" else "choose another, or wait until it is up")


def _account_findings(settings: Settings, site: Site, partitions: list[Partition]) -> Iterator[Finding]:
    for what, word, known, enforced in (
        ("account", "Accounts", site.accounts, site.enforces("associations")),
        ("qos", "Qos", site.qos, site.enforces("qos")),
    ):
        name = getattr(settings.slurm, what)
        if name is None:
            if what == "account" and enforced and not known:
                yield Finding("account: none is given", "jobs need one here, and you have none: ask the site for one")
            continue
        if known is None:
            yield Finding(f"{what} {name}: accounting does not answer, so nobody can say here whether it is known")
        elif name not in known:
            advice = f"not known; {did_you_mean(name, known) or 'you have none'}" if enforced else ""
            yield Finding(f"{what} {name}" + ("" if enforced else ": not known, and not enforced here"), advice)
        else:
            yield Finding(f"{what} {name} is known")
        for partition in partitions:
            if not partition.allows(word, name):
                allowed = partition.facts.get(f"Allow{word}")
                yield Finding(f"{what} {name} in partition {partition.name}", f"not allowed there; allowed: {allowed}")


def _feature_findings(settings: Settings, site: Site, partitions: list[Partition]) -> Iterator[Finding]:
    asked = settings.slurm
    known = {feature for partition in partitions for kind in partition.nodes for feature in kind.features}
    for feature in re.findall(r"[A-Za-z_][\w.:-]*", asked.constraint or ""):
        advice = (
            "" if feature in known else f"no node has it; {did_you_mean(feature, known) or 'nodes have no features'}"
        )
        yield Finding(f"constraint {feature}", advice)
    for name in asked.reservation.split(",") if asked.reservation else []:
        there = ", ".join(site.reservations) or "none"
        yield Finding(
            f"reservation {name}", "" if name in site.reservations else f"there is none now; there are: {there}"
        )
    yield Finding(f"gpu_request {asked.gpu_request}", _gpu_request_advice(settings, site, partitions))


def _gpu_request_advice(settings: Settings, site: Site, partitions: list[Partition]) -> str:
    wanted = settings.slurm.gpu_request
    if wanted == "none" and settings.nodes.gpus != 0 and any(partition.gpus for partition in partitions):
        return f'jobs must ask for GPUs here: "{"gpus-per-node" if site.has_gpu_options else "gres"}"'
    if wanted != "none" and not site.has_gpus and settings.nodes.gpus:
        return 'Slurm hands out no GPUs here: "none"'
    if wanted == "gpus-per-node" and site.has_gpus and not site.has_gpu_options:
        return 'this Slurm has no such option: "gres"'
    return ""


def _node_findings(settings: Settings, partition: Partition) -> Iterator[Finding]:
    nodes = settings.nodes
    where = f"partition {partition.name}"
    if nodes.gpus is not None:
        gpus = f"{nodes.gpus} {f'{nodes.gpu_type} ' if nodes.gpu_type else ''}GPUs in a node"
        fitting = [kind for kind in partition.nodes if kind.gpus_of(nodes.gpu_type) >= nodes.gpus]
        count, up = sum(kind.count for kind in fitting), sum(kind.count for kind in fitting if kind.is_up)
        there = "; ".join(map(about_kind, kinds(partition))) or "no nodes"
        what = f"{gpus}: {count} nodes of {where}, {up} of them up"
        yield Finding(what, "" if fitting else f"none has as many; there are {there}")
    limits: Iterable[tuple[str, float | None, float]] = (
        ("CPUs", nodes.cpus, max((kind.cpus for kind in partition.nodes), default=0)),
        (
            "MB of memory",
            megabytes(nodes.memory) if nodes.memory else None,
            max((kind.memory for kind in partition.nodes), default=0),
        ),
    )
    for what, said, most in limits:
        if said is not None:
            advice = "" if said <= most else f"no node of {where} has more than {most:g}"
            yield Finding(f"{said:g} {what} in a node of {where}", advice)


def _time_findings(settings: Settings, site: Site, partition: Partition) -> Iterator[Finding]:
    asked, limit = settings.slurm.time, partition.facts.get("MaxTime", "UNLIMITED")
    most = None if limit == "UNLIMITED" else seconds(limit)
    if asked is not None:
        advice = "" if most is None or seconds(asked) <= most else f"partition {partition.name} allows {limit}"
        yield Finding(f"time {asked} in partition {partition.name}", advice)
        if seconds(asked) <= settings.slurm.signal_lead:
            what = f"signal_lead {settings.slurm.signal_lead} s before the limit"
            yield Finding(what, f"must be shorter than the time limit {asked}")
    mode = partition.facts.get("PreemptMode", "")
    preemption = f"jobs in partition {partition.name} are {about_preemption(partition, site)}"
    lost = mode == "CANCEL" and partition.facts.get("GraceTime", "0") == "0" and "preempted by" in preemption
    yield Finding(preemption, "a preempted run does not come back by itself here; ask for GraceTime" if lost else "")
