"""Taking a run away: first its name, in one step, and then its files. A removal that is cut short leaves nothing that
looks like a run, and the next one ends it."""

import contextlib
import shutil
import time
from pathlib import Path

from titan_slurm.run.checkpoints import committed, read_commit_or_problem
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, sync_directory

# Whoever lists runs passes over names with a dot.
_PREFIX = ".removed-"


def take_away(path: Path) -> Path:
    """Rename a folder so that nobody finds it any more. Returns the new path, for `delete`."""
    for number in range(1000):
        aside = path.with_name(f"{_PREFIX}{path.name}-{time.time_ns() + number}")
        with contextlib.suppress(FileExistsError):
            path.rename(aside)
            sync_directory(path.parent)
            return aside
    raise FileExistsError(f"no other name for {path}")


def delete(aside: Path) -> None:
    """Delete what was taken away, and what an earlier removal in the same folder has left behind."""
    for path in (aside, *aside.parent.glob(f"{_PREFIX}*")):
        # Another process may be at it, too.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def checkpoints_elsewhere(run: RunDirectory) -> Path | None:
    """The run's folder of checkpoints, if it is not within the run."""
    folder = run.checkpoints_folder
    outside = not folder.resolve().is_relative_to(run.path.resolve())
    return folder if outside and folder.is_dir() else None


def shared_with(run: RunDirectory, folder: Path) -> str:
    """Another run that has committed a checkpoint into this folder; empty if there is none."""
    for checkpoint in committed(folder):
        record = read_commit_or_problem(checkpoint.path)
        if not isinstance(record, str) and record.run not in ("", str(run.path)):
            return record.run
    return ""


def sweep_without_runs(run: RunDirectory) -> Path | None:
    """The folder of the sweep that a run was of, if none of its runs is there any more."""
    folder = run.path.with_name(run.name.rpartition("-")[0] or run.name)
    try:
        names = [each["run"] for each in (read_json(folder / "sweep.json") or {}).get("runs", [])]
    except (OSError, ValueError):
        return None
    is_left = run.name in names and not any((folder.parent / name).exists() for name in names)
    return folder if is_left else None


def disk_usage(path: Path) -> int:
    """The size of all files below a folder, in bytes; links count for nothing."""
    total = 0
    with contextlib.suppress(OSError):
        for each in path.iterdir():
            # A run that trains makes and removes files meanwhile.
            with contextlib.suppress(OSError):
                if not each.is_symlink():
                    total += disk_usage(each) if each.is_dir() else each.stat().st_size
    return total
