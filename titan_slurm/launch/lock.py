"""A run's lock and its own copy of the code, made when it is submitted: from then on nothing reads the checkout, and
whoever edits it while the job waits changes nothing. What is in a lock is said in `titan_slurm.run.lock`."""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import titan_slurm
from titan_slurm.recipe.resolve import ResolvedRecipe
from titan_slurm.recipe.versions import content_hash
from titan_slurm.run import lock
from titan_slurm.run.attempt import user
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_atomic, write_json
from titan_slurm.run.plan import Plan
from titan_slurm.run.redact import redact, redact_command

PACKAGE = Path(titan_slurm.__file__).resolve().parent

_GIT_TIMEOUT_S = 30
_LARGEST_PATCH_BYTES = 4 * 2**20


def write(run: RunDirectory, plan: Plan, resolved: ResolvedRecipe, submitted_with: RunDirectory | None = None) -> None:
    """Give the run a copy of the code that runs here, and its lock. What it had of either goes to its history.

    `submitted_with`: a new run that was just made by the same command; what is the same for both is taken from it.
    """
    before = read_json(run.lock_file)
    same = lock_of(submitted_with) if submitted_with else {}
    if submitted_with:
        for folder in (submitted_with.code_folder, submitted_with.path / "patches"):
            if folder.is_dir():
                shutil.copytree(folder, run.path / folder.name, copy_function=share)
    else:
        take_code(run, PACKAGE)
        code = {"hash": lock.code_hash(copy_of_code(run)), "version": titan_slurm.__version__} | _git(run)
        same = submission() | {"code": code, "data": {}}
    made = same | {
        "recipe": {"name": plan.recipe, "version": plan.recipe_version, "hash": content_hash(resolved)},
        "seed": plan.torchtitan.get("debug.seed"),
        "data": fingerprints(plan, same["data"]),
    }
    # What the run was begun with is what its later attempts are held against.
    kept = {name: before[name] for name in ("trained", "reproduces") if before and name in before}
    put(run, made | kept)


def put(run: RunDirectory, made: dict[str, Any]) -> None:
    """Write the lock; the one that was there goes to the run's history."""
    if run.lock_file.exists():
        run.lock_file.replace(run.next_in_history("lock", ".json"))
    write_json(run.lock_file, {"schema": lock.SCHEMA} | made)


def take_code(run: RunDirectory, package: Path) -> None:
    """Copy a folder of titan-slurm's code into the run, unless that is what it has. What it had goes to its history."""
    if lock.code_hash(copy_of_code(run)) == lock.code_hash(package):
        return
    partial = run.path / ".code"
    shutil.rmtree(partial, ignore_errors=True)
    for name in lock.code_files(package):
        target = partial / PACKAGE.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # Without its mode: an installed file may be read-only, and a run must be removable.
        shutil.copyfile(package / name, target)
    if run.code_folder.is_dir():
        run.code_folder.rename(run.next_in_history("code", ""))
    partial.rename(run.code_folder)


def share(source: str, target: str) -> None:
    """One file in two folders where the file system can do that: nobody changes what is in it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_of_code(run: RunDirectory) -> Path:
    """The package in the run's own copy."""
    return run.code_folder / PACKAGE.name


def submission() -> dict[str, Any]:
    """Who submits what from where, and with which packages."""
    return {
        "time": time.time(),
        "user": user(),
        "host": socket.gethostname(),
        "command": ["titan-slurm", *redact_command(sys.argv[1:])],
        "working_directory": str(Path.cwd()),
        "python": lock.python_version(),
        "packages": lock.packages(),
    }


def fingerprints(plan: Plan, known: Mapping[str, Any]) -> dict[str, Any]:
    """Name, path and fingerprint of each thing outside the run that it reads; None where it is not on this machine.
    `known`: what this function has just said of another plan."""
    found: dict[str, Any] = {}
    for name, (what, path) in _read_by(plan).items():
        if name in known and (known[name]["name"], known[name]["path"]) == (what, path):
            found[name] = known[name]
            continue
        make = lock.tokenizer_fingerprint if name == "tokenizer" else lock.fingerprint
        found[name] = {"name": what, "path": path, "fingerprint": None}
        # The nodes may be allowed to read what this machine is not.
        with contextlib.suppress(OSError):
            found[name]["fingerprint"] = make(Path(path)) if path else None
    return found


def _read_by(plan: Plan) -> dict[str, tuple[str, str | None]]:
    """What a run reads that is not its own: name and path, which may also be an address; None where it is built in."""
    tokenizer = plan.data["tokenizer"]
    things: dict[str, tuple[str, str | None]] = {
        "data": (plan.data["dataset"], plan.data["dataset_path"]),
        "tokenizer": (tokenizer, tokenizer if Path(tokenizer).is_absolute() else None),
    }
    if start := plan.torchtitan.get("checkpoint.initial_load_path"):
        things["start"] = (Path(start).name, start)
    return things


def changes(run: RunDirectory) -> list[str]:
    """What a user who goes on with a run should know: what is another here than where it began, as far as this machine
    can tell without torch."""
    before = lock_of(run)
    if not before:
        return []
    locked = before.get("trained", {}).get("versions") or lock.submitted_versions(before)
    notes = [
        f"{name} was {then} in this run and is {now} here"
        for name, (then, now) in lock.differences(locked, versions_here()).items()
        if now is not None
    ]
    for name, known in before["data"].items():
        if known["fingerprint"] and not lock.is_same(Path(known["path"]), known["fingerprint"]):
            notes.append(f"{known['path']} is not what this run began with ({name})")
    return notes


def lock_of(run: RunDirectory) -> dict[str, Any]:
    """A run's lock; empty for a run of a titan-slurm that made none."""
    return read_json(run.lock_file) or {}


def versions_here() -> dict[str, str]:
    """The versions that training depends on, as far as they can be told without torch."""
    return lock.versions(lock.packages(), lock.python_version(), titan_slurm.__version__, lock.code_hash(PACKAGE))


def _git(run: RunDirectory) -> dict[str, Any]:
    """Where the code came from: of the package and of the working directory the commit, and what had changed since."""
    by_root: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for name, folder in (("package", PACKAGE), ("working_directory", Path.cwd())):
        root = _ask_git(folder, "rev-parse", "--show-toplevel").strip()
        if root and root not in by_root:
            by_root[root] = _checkout(run, Path(root))
        found[name] = {"path": str(folder)} | by_root.get(root, {})
    return found


def _checkout(run: RunDirectory, root: Path) -> dict[str, Any]:
    status = _ask_git(root, "status", "--porcelain", "--untracked-files=normal").splitlines()
    patch = redact(_ask_git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv"))
    return {
        "root": str(root),
        "commit": _ask_git(root, "rev-parse", "HEAD").strip() or None,
        "remote": redact(_ask_git(root, "config", "--get", "remote.origin.url").strip()) or None,
        "changed": bool(status),
        "untracked": [line.removeprefix("?? ") for line in status if line.startswith("?? ")],
        "patch": _keep_patch(run, patch) if patch else None,
    }


def _keep_patch(run: RunDirectory, patch: str) -> str:
    """Write a patch into the run under its content's name. Returns its path in the run."""
    if len(patch) > _LARGEST_PATCH_BYTES:
        return f"left out: {len(patch):,} characters"
    file = run.path / "patches" / f"{hashlib.sha256(patch.encode(errors='replace')).hexdigest()[:12]}.patch"
    file.parent.mkdir(exist_ok=True)
    if not file.exists():
        write_atomic(file, patch)
    return file.relative_to(run.path).as_posix()


def _ask_git(folder: Path, *arguments: str) -> str:
    """What git says of a folder; empty where there is no git, no repository, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT_S,
            check=False,
            # Looking must not lock the user's repository.
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
