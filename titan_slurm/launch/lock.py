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
from titan_slurm.run.redact import redact, redact_command, redact_patch

PACKAGE = Path(titan_slurm.__file__).resolve().parent

_GIT_TIMEOUT_S = 30
# Of one that has not answered in that time.
_SLOW_GIT_TIMEOUT_S = 2
_LARGEST_PATCH_BYTES = 4 * 2**20
_UNTRACKED_NAMED = 100
# A patch that `git apply` takes, whatever the user's configuration says of how to show one.
_PATCH = (
    "--binary",
    "--unified=3",
    "--no-renames",
    "--src-prefix=a/",
    "--dst-prefix=b/",
    "--submodule=short",
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
)
# What is in such files is nobody's business; as git's patterns, without the beginning.
_SECRET_FILES = tuple(
    f"glob,icase)**/{name}"
    for name in (
        *(".env*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "id_rsa*", "id_ed25519*"),
        *("id_ecdsa*", ".netrc", "_netrc", ".pypirc", ".htpasswd", ".git-credentials", "*credentials*", "secrets.*"),
    )
)


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
    if plan.script:
        made["code"] = made["code"] | {"script": lock.code_hash(run.script_folder)}
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
        git = _Git(folder)
        root = git.text("rev-parse", "--show-toplevel")
        if root and root not in by_root:
            by_root[root] = _checkout(run, Path(root))
        # An installed package is in no repository, and git need not be there to say so.
        in_repository = any((each / ".git").exists() for each in (folder, *folder.parents))
        silent = {"changed": None, "unanswered": git.unanswered} if in_repository else {}
        found[name] = {"path": str(folder)} | by_root.get(root or "", silent)
    return found


def _checkout(run: RunDirectory, root: Path) -> dict[str, Any]:
    git = _Git(root)
    status = git.text("status", "--porcelain", "--untracked-files=normal")
    untracked = [line.removeprefix("?? ") for line in (status or "").splitlines() if line.startswith("?? ")]
    commit = git.text("rev-parse", "--verify", "--quiet", "HEAD") or None
    about = {
        "root": str(root),
        "commit": commit,
        "remote": redact(git.text("config", "--get", "remote.origin.url") or "") or None,
        "changed": None if status is None else bool(status),
        "untracked": untracked[:_UNTRACKED_NAMED],
        "untracked_count": len(untracked),
        **(_changes(run, git) if commit else {"patch": None, "left_out": []}),
    }
    return about | ({"unanswered": git.unanswered} if git.unanswered else {})


def _changes(run: RunDirectory, git: "_Git") -> dict[str, Any]:
    """The patch of what is not committed, and the changed files that are left out of it for what they may hold."""
    patch = git.ask("diff", "HEAD", *_PATCH, "--", ".", *(f":(exclude,{magic}" for magic in _SECRET_FILES))
    left_out = git.text("diff", "HEAD", "--name-only", "--no-renames", "--", *(f":({magic}" for magic in _SECRET_FILES))
    return {
        "patch": _keep_patch(run, redact_patch(patch)) if patch else None,
        "left_out": (left_out or "").splitlines(),
    }


def _keep_patch(run: RunDirectory, patch: bytes) -> str:
    """Write a patch into the run under its content's name. Returns its path in the run."""
    if len(patch) > _LARGEST_PATCH_BYTES:
        return f"left out: {len(patch):,} bytes"
    file = run.path / "patches" / f"{hashlib.sha256(patch).hexdigest()[:12]}.patch"
    file.parent.mkdir(exist_ok=True)
    if not file.exists():
        write_atomic(file, patch)
    return file.relative_to(run.path).as_posix()


class _Git:
    """What git says of a folder. `unanswered`: what it did not say, and why."""

    def __init__(self, folder: Path) -> None:
        self.unanswered: list[str] = []
        self._folder = folder
        self._slow = False

    def ask(self, *arguments: str) -> bytes | None:
        """Its answer, empty where there is nothing to say; None where it gives none."""
        try:
            done = self._run(arguments)
        except OSError as error:
            why = error.strerror or "cannot be started"
        except subprocess.TimeoutExpired as error:
            self._slow = True
            why = f"not within {error.timeout:.0f} s"
        else:
            # By 1 it says that there is nothing: no such setting, no commit yet.
            if done.returncode in (0, 1):
                return done.stdout
            said = done.stderr.decode(errors="replace").strip().partition("\n")[0]
            why = redact(said) or f"left with {done.returncode}"
        self.unanswered.append(f"git {arguments[0]}: {why}")
        return None

    def text(self, *arguments: str) -> str | None:
        """The same, as text."""
        answer = self.ask(*arguments)
        return None if answer is None else answer.decode(errors="replace").strip("\n")

    def _run(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["git", "-C", str(self._folder), *arguments],
            capture_output=True,
            timeout=_SLOW_GIT_TIMEOUT_S if self._slow else _GIT_TIMEOUT_S,
            check=False,
            # Looking must not lock the user's repository.
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
