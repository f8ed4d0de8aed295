"""What a login node can tell of a site before anything is submitted there. What only the nodes can tell is looked at by
a job: `titan_slurm.launch.doctor`."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from titan_slurm.cluster import check, slurm
from titan_slurm.cluster import site as sites
from titan_slurm.cluster.profile import Profile, Settings
from titan_slurm.cluster.site import Partition, Site
from titan_slurm.errors import BadInputError
from titan_slurm.run.finding import Finding
from titan_slurm.run.folder import locked, try_folder
from titan_slurm.run.wandb_key import wandb_key

_COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
_PACKAGES = ("titan-slurm", "torch", "torchtitan", "submitit", "wandb")
_TIMEOUT_S = 60
# A run without grace time has no more than this to save in.
_SHORT_KILL_WAIT_S = 30


def on_login_node(profile: Profile | None, runs: Path) -> Iterator[Finding]:
    """Everything that can be told here. `profile`: None for Slurm without one. `runs`: the folder of runs."""
    if profile is None:
        yield Finding("profile", "none is used")
    else:
        yield Finding("profile", f"{profile.name}: {profile.path}")
    profile = profile or Profile("slurm", "", Settings(), {})
    yield from _slurm_findings(profile)
    yield from _folder_findings(runs)
    yield from _package_findings(profile)
    yield _wandb_finding(profile)


def usable_nodes(partition: str | None) -> int:
    """How many nodes of a partition, or of the default one, take jobs now or when their jobs have ended."""
    site = sites.read()
    found = site.partitions.get(partition) if partition else site.default_partition
    return sum(kind.count for kind in found.nodes if kind.is_up) if found else 0


def _slurm_findings(profile: Profile) -> Iterator[Finding]:
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        what = f"{', '.join(missing)} not on the PATH of {socket.gethostname()}"
        yield Finding("Slurm", what, "submit from a login node, or load the module that has Slurm's commands")
        return
    # Without a controller, its other commands try again for a minute each.
    if not slurm.is_answering():
        advice = "wait until it is up, or ask the site's staff; what hangs on it is not looked at"
        yield Finding("Slurm", f"slurmctld does not answer: {_ping()}", advice)
        return
    try:
        site = sites.read()
    except BadInputError as error:
        yield Finding("Slurm", error.problems[0].what, error.problems[0].hint)
        return
    own = re.sub(r"[^\d.]", "", slurm.ask("sinfo", "--version") or "")
    theirs = site.config.get("SLURM_VERSION", "")
    differs = own.split(".")[:2] != theirs.split(".")[:2]
    advice = "have the commands here be of the controller's version" if differs else ""
    yield Finding("Slurm", f"commands of version {own}, slurmctld {theirs}", advice, is_warning=True)
    for each in check.check(profile, site):
        yield Finding("site", each.what, each.advice)
    for partition in _partitions(profile, site):
        yield from _node_findings(partition)
    yield from _requeue_findings(site)
    yield _accounting_finding(site)


def _ping() -> str:
    return "; ".join((slurm.ask("scontrol", "ping") or "scontrol ping fails").split("\n")[:2]).strip("; ")


def _partitions(profile: Profile, site: Site) -> list[Partition]:
    named = profile.settings.slurm.partition
    if named:
        return [site.partitions[name] for name in named.split(",") if name in site.partitions]
    return [site.default_partition] if site.default_partition else []


def _node_findings(partition: Partition) -> Iterator[Finding]:
    """A line for each node that takes no jobs."""
    lines = slurm.ask("sinfo", "--noheader", "--Node", f"--partition={partition.name}", "--format=%N|%T|%E") or ""
    count = 0
    for line in lines.splitlines():
        node, state, reason = line.split("|", 2)
        count += sites.is_up(state)
        if not sites.is_up(state):
            why = "" if reason == "none" else f": {reason}"
            advice = "the site's staff mends it, and lets it back by `scontrol update State=RESUME`"
            yield Finding("node", f"is {state} in partition {partition.name}{why}", advice, True, (node,))
    advice = "" if count else "wait, or choose another partition"
    yield Finding("nodes", f"{count} of partition {partition.name} take jobs", advice)


def _requeue_findings(site: Site) -> Iterator[Finding]:
    allowed = site.config.get("JobRequeue", "1") == "1"
    advice = "runs ask for it by themselves (--requeue); where the site takes that away, submit with --chain"
    yield Finding("requeue", f"JobRequeue={int(allowed)}", "" if allowed else advice, is_warning=True)
    wait = re.sub(r"\D", "", site.config.get("KillWait", "30"))
    is_short = int(wait or 0) < _SHORT_KILL_WAIT_S
    advice = "a job preempted without grace may not have the time to save: save often, or ask for GraceTime"
    yield Finding("requeue", f"KillWait={wait} s", advice if is_short else "", is_warning=True)


def _accounting_finding(site: Site) -> Finding:
    kind = site.config.get("AccountingStorageType", "accounting_storage/none")
    if kind.endswith("/none"):
        return Finding("accounting", "this site has none; titan-slurm does without it")
    advice = "ask the site's staff; until then nobody knows how a lost attempt ended"
    answers = slurm.ask("sacct", "--noheader", "--starttime=now", "--allocations", "--format=JobID") is not None
    return Finding("accounting", "sacct answers" if answers else "sacct fails", "" if answers else advice, True)


def _folder_findings(runs: Path) -> Iterator[Finding]:
    folder = next(each for each in (runs, *runs.parents) if each.exists())
    # One try at a time, and nothing that another could take for a run.
    trial = folder / f".doctor.{socket.gethostname()}.{os.getpid()}"
    try:
        trial.mkdir()
    except OSError as error:
        yield Finding("shared folder", f"{folder} cannot be written: {error.strerror}", "another --runs-dir")
        return
    try:
        yield from try_folder(trial, "login", folder)
        with locked(trial / "lock") as first, locked(trial / "lock") as second:
            works = first and not second
        advice = "" if works else "mount it with locks (Lustre: -o flock); two submissions of one run may meet"
        yield Finding("lock", f"locks in {folder} {'hold' if works else 'do not hold'}", advice)
    except OSError as error:
        yield Finding("lock", f"no locks in {folder}: {error.strerror}", "another --runs-dir, or mount it with locks")
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _package_findings(profile: Profile) -> Iterator[Finding]:
    here = _versions_here()
    yield from _version_findings(sys.executable, here)
    venv = profile.settings.setup.venv
    if venv and Path(venv, "bin", "python").exists():
        there = _versions_of(f"{venv}/bin/python")
        if there is None:
            yield Finding("packages", f"{venv}/bin/python does not start", "make the environment anew")
            return
        yield from _version_findings(f"{venv}/bin/python", there)
        own = here.get("titan-slurm")
        if there.get("titan-slurm", own) != own:
            what = f"titan-slurm {there['titan-slurm']} in {venv}, and {own} here"
            yield Finding("packages", what, "install the same one in both", is_warning=True)


def _versions_here() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _versions_of(python: str) -> dict[str, str] | None:
    """The same of another Python; None where it does not start."""
    program = (
        "import importlib.metadata as m, json, platform\n"
        f"names = {_PACKAGES!r}\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({'Python': platform.python_version()} | {n: found[n] for n in names if n in found}))"
    )
    try:
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True, cwd="/"
        )
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _version_findings(python: str, versions: dict[str, str]) -> Iterator[Finding]:
    wanted = _wanted()
    missing = [name for name in _PACKAGES if name not in versions]
    wrong = [
        f"{name} {versions[name]} (needs {wanted[name]})"
        for name in _PACKAGES
        if name in versions and name in wanted and not fits(versions[name], wanted[name])
    ]
    what = ", ".join(f"{name} {version}" for name, version in versions.items())
    if missing or wrong:
        what = "; ".join([*([f"no {', '.join(missing)}"] if missing else []), *wrong])
    advice = "pip install titan-slurm, which brings them along" if missing or wrong else ""
    yield Finding("packages", f"{python}: {what}", advice)


def _wanted() -> dict[str, str]:
    """What titan-slurm itself asks for, by package: >=2.14,<2.15, say."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        lines = importlib.metadata.requires("titan-slurm") or []
        found = (re.fullmatch(r"([\w.-]+)([<>=!~][^;]*)", line.replace(" ", "")) for line in lines)
        return {each[1]: each[2] for each in found if each}
    return {}


def fits(version: str, wanted: str) -> bool:
    """Whether a version is within bounds such as >=2.14,<2.15; of what is no number, such as +cu130, nothing counts."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]

    for sign, bound in re.findall(r"(>=|<)([\d.]+)", wanted):
        if (numbers(version) >= numbers(bound)) != (sign == ">="):
            return False
    return True


def _wandb_finding(profile: Profile) -> Finding:
    asked = profile.settings.wandb.mode
    mode = os.environ.get("WANDB_MODE") or asked if asked == "auto" else asked
    if mode not in ("auto", "online", "offline", "dryrun"):
        return Finding("wandb", "disabled")
    if mode in ("offline", "dryrun"):
        return Finding("wandb", "offline: runs are kept in their folders, for `wandb sync`")
    if where := wandb_key():
        return Finding("wandb", where)
    advice = "`wandb login`, or export WANDB_API_KEY where you submit; until then runs are recorded offline"
    return Finding("wandb", "no key was found", advice, is_warning=True)
