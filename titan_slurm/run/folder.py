"""Whether a folder can hold runs: tried, not asked for, since root may write everywhere, says os.access, on a read-only
file system too."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_slurm.run.files import read_json, write_json, write_json_once
from titan_slurm.run.finding import Finding

_LEAST_BYTES = 2**30
_LEAST_FILES = 10_000
_SHARED = "the folder of runs must be on a file system that all nodes share: --runs-dir, and [paths] shared"


def try_folder(folder: Path, name: str, shown: Path) -> Iterator[Finding]:
    """Write in a folder as a run does: new files, on stable storage, under their names by rename and by link. `name`
    is for the file that is left there, with {"name": name} in it; `shown` is the folder that people know."""
    file = folder / f"{name}.json"
    value: dict[str, Any] = {"name": name}
    try:
        write_json(file, value)
        write_json(file, value)
        once = folder / f"{name}.once.json"
        once.unlink(missing_ok=True)
        if not write_json_once(once, value) or write_json_once(once, value):
            raise OSError(0, "a link does not fail where there is a file of that name")
        once.unlink()
        if read_json(file) != value:
            raise OSError(0, "what was written is not what is read")
    except OSError as error:
        what = f"{shown} cannot be written: {error.strerror or error}"
        yield Finding("shared folder", what, f"make room, or mend its permissions; {_SHARED}")
        return
    yield Finding("shared folder", f"{shown} takes files, fsync, rename and link")
    yield from _room(folder, shown)


def _room(folder: Path, shown: Path) -> Iterator[Finding]:
    about = os.statvfs(folder)
    free = about.f_bavail * about.f_frsize
    if free < _LEAST_BYTES:
        what = f"{free / 2**30:.2f} GiB are left in {shown}"
        yield Finding("room", what, "make room: `titan-slurm validate RECIPE` says how much its checkpoints take")
    # File systems that make inodes as they need them say 0 of 0.
    elif about.f_files and about.f_favail < _LEAST_FILES:
        what = f"{about.f_favail} more files fit into {shown}"
        yield Finding("room", what, "delete small files: an attempt makes several for each of its ranks")
    else:
        yield Finding("room", f"{free / 2**30:,.0f} GiB are left in {shown}")


@contextlib.contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Hold a lock on a file, made if need be; whether it could be had at once."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except OSError:
            yield False
    finally:
        os.close(descriptor)


def lock_finding(file: Path) -> Finding:
    """Whether a lock that another machine holds on a file is seen here."""
    with locked(file) as is_free:
        if is_free:
            advice = "two machines may submit the same run at once; mount it with locks (Lustre: -o flock)"
            return Finding("lock", "a lock of another node's is not seen here", advice, is_warning=True)
    return Finding("lock", "a lock of another node's is seen here")
