"""What a committed checkpoint is on disk: a folder `step-N` with a commit record, written last, that holds the size and
checksum of every file. What the files contain does not live here."""

import contextlib
import json
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_slurm.run.files import append_json_line, read_json_lines, sync_directory, write_json

SCHEMA = 1
COMMIT_FILE = "commit.json"
COMMITS_FILE = "commits.jsonl"
# What the files must survive is accidents, not forgery. CRC-32 is the fastest that Python carries (7 GB/s on a core
# where SHA-1 does 2.2, SHA-256 2.1 and BLAKE2b 1.4), and misses one altered file in four billion.
ALGORITHM = "crc32"

COMMITTED = "committed"
UNCOMMITTED = "uncommitted"
SET_ASIDE = "set aside"

BAD = "bad"
PARTIAL = "partial"

_REASON_FILE = "set_aside.json"
# A folder on its way out: without its old name it can no longer be taken for a checkpoint when a kill cuts this short.
_DOOMED = "pruned"
_STEP = re.compile(r"^step-(\d+)$")
# Nothing that torchtitan would find: it searches for "step-" and digits anywhere in a name.
_SET_ASIDE = re.compile(rf"^({BAD}|{PARTIAL}|{_DOOMED})-(\d+)-")

_CHUNK_BYTES = 4 * 2**20
# Shared file systems answer several readers faster than one.
_READERS = 4
# How long a file that another node has written may take to show here.
_PATIENCE_S = 30.0
_TURN_S = 0.5
_RECENT_SAVES = 5


class NoUsableCheckpointError(RuntimeError):
    """There were checkpoints, and none of them can be loaded."""


@dataclass(frozen=True)
class FileRecord:
    """What a commit says of one file: size in bytes, checksum in hexadecimal."""

    size: int
    checksum: str
    algorithm: str = ALGORITHM


@dataclass(frozen=True)
class Commit:
    """The record that makes a folder a checkpoint. `time`: when it was written, in seconds since 1970; `seconds`: from
    the beginning of the save to here; `run`: the path of the run that made it, empty where it is not known."""

    step: int
    time: float
    seconds: float
    files: dict[str, FileRecord]
    run: str = ""

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True)
class Checkpoint:
    """A folder of checkpoints has this in it. `state`: committed, uncommitted or set aside; `kind` says what a folder
    was set aside as: bad, or partial (never committed)."""

    step: int
    path: Path
    state: str
    kind: str = ""

    def reason(self) -> list[str]:
        """Why it was set aside."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return [str(line) for line in json.loads((self.path / _REASON_FILE).read_text("utf-8"))["problems"]]
        return []


class Checksum:
    """The checksum of a stream of bytes."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any) -> None:
        """Add bytes; other threads run meanwhile if there are more than a few thousand."""
        self._value = zlib.crc32(data, self._value)

    def hexadecimal(self) -> str:
        """The checksum of all bytes so far."""
        return f"{self._value:08x}"


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Everything in a folder of checkpoints, newest step first; of one step, what was set aside comes last."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if match := _STEP.match(path.name):
                state = COMMITTED if (path / COMMIT_FILE).exists() else UNCOMMITTED
                found.append(Checkpoint(int(match[1]), path, state))
            elif (match := _SET_ASIDE.match(path.name)) and match[1] != _DOOMED:
                found.append(Checkpoint(int(match[2]), path, SET_ASIDE, match[1]))
    return sorted(found, key=lambda each: (-each.step, each.state == SET_ASIDE, each.path.name))


def committed(folder: Path) -> list[Checkpoint]:
    """The committed ones, newest first."""
    return [each for each in list_checkpoints(folder) if each.state == COMMITTED]


def newest_committed_step(folder: Path) -> int:
    """The step of the newest committed checkpoint; 0 if there is none."""
    return next((each.step for each in committed(folder)), 0)


def commit(path: Path, files: dict[str, FileRecord], *, started: float, run: str = "") -> None:
    """Make `path`, named step-N, a checkpoint. Every file must have been synced to stable storage by its writer.

    `started`: when the save began, by time.monotonic() on this machine. `run`: the path of the run that makes it.
    Raises FileNotFoundError if a file does not come to its size here within half a minute: then the ranks do not write
    to one shared folder.
    """
    _wait_until_in_place(path, files)
    sync_directory(path)
    sync_directory(path.parent)
    record = {
        "schema": SCHEMA,
        "step": _step_of(path),
        "time": time.time(),
        "seconds": time.monotonic() - started,
        "run": run,
        "files": {name: vars(file) for name, file in sorted(files.items())},
    }
    write_json(path / COMMIT_FILE, record)


def read_commit(path: Path) -> Commit:
    """The commit record of a checkpoint. Raises ValueError if it is not one, or not of this folder's step, and OSError
    if it cannot be read."""
    values = json.loads((path / COMMIT_FILE).read_text(encoding="utf-8"))
    try:
        if values["schema"] != SCHEMA:
            raise ValueError(f"has schema {values['schema']!r}, this titan-slurm reads {SCHEMA}")
        files = {str(name): FileRecord(**file) for name, file in values["files"].items()}
        times = float(values["time"]), float(values["seconds"])
        found = Commit(int(values["step"]), *times, files, values.get("run", ""))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"is not a commit record: {error!r}") from None
    if _STEP.match(path.name) and found.step != _step_of(path):
        raise ValueError(f"is of step {found.step}")
    return found


def read_commit_or_problem(path: Path) -> Commit | str:
    """The commit record of a checkpoint, or a line that says why it cannot be used."""
    try:
        return read_commit(path)
    except (OSError, ValueError) as error:
        return f"{COMMIT_FILE}: {_plainly(error)}"


def problems_with(path: Path, record: Commit | None = None, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, a line for each; empty if they are as they were committed.

    record: its commit, if read already. names: only these files, for a reader that shares the work with others.
    """
    found = record or read_commit_or_problem(path)
    if isinstance(found, str):
        return [found]
    files = found.files
    wanted = sorted(files if names is None else names)
    with ThreadPoolExecutor(_READERS) as readers:
        lines = readers.map(lambda name: _problem_with(path / name, name, files[name]), wanted)
        return [line for line in lines if line]


def is_whole(checkpoint: Checkpoint) -> bool:
    """Whether every file is there in its size; reads none of them."""
    try:
        record = read_commit(checkpoint.path)
        return all((checkpoint.path / name).stat().st_size == file.size for name, file in record.files.items())
    except (OSError, ValueError):
        return False


def is_good(checkpoint: Checkpoint) -> bool:
    """Whether every file is as it was committed; reads all of them."""
    return not problems_with(checkpoint.path)


def set_aside(path: Path, kind: str, problems: list[str]) -> Path:
    """Rename a step folder, so that nothing takes it for a checkpoint any more, and leave the reason in it.

    kind: `BAD` or `PARTIAL`. Returns the new path.
    """
    aside = _rename(path, kind)
    # On a full disk the name must do.
    with contextlib.suppress(OSError):
        write_json(aside / _REASON_FILE, {"step": _step_of(path), "time": time.time(), "problems": problems})
    return aside


def stale(folder: Path, keep: int, *, good: Callable[[Checkpoint], bool] = is_whole) -> list[Checkpoint]:
    """The committed checkpoints older than the newest `keep` that are `good`. Where none is good, nothing is stale."""
    kept, found = 0, []
    for checkpoint in committed(folder):
        if kept >= max(keep, 1):
            found.append(checkpoint)
        elif good(checkpoint):
            kept += 1
    return found


def leftovers(folder: Path) -> list[Checkpoint]:
    """What was set aside as never committed, of steps that a committed checkpoint has reached since."""
    newest = newest_committed_step(folder)
    return [each for each in list_checkpoints(folder) if each.kind == PARTIAL and each.step <= newest]


def doom(path: Path) -> Path:
    """Rename a folder that is to be removed. Returns the new path; removing it may be cut short at any instant."""
    return _rename(path, _DOOMED)


def doomed(folder: Path) -> list[Path]:
    """Folders whose removal was cut short."""
    return sorted(folder.glob(f"{_DOOMED}-*-*"))


def prune(folder: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` committed checkpoints that verify, and what was never committed and is older
    than the newest of them. Not while a training may be saving into `folder`. Returns what is gone, by its old name."""
    old = stale(folder, keep, good=is_good)
    newest = newest_committed_step(folder)
    old += [each for each in list_checkpoints(folder) if each.state == UNCOMMITTED and each.step < newest]
    old += leftovers(folder)
    for each in old:
        doom(each.path)
    for path in doomed(folder):
        shutil.rmtree(path)
    return [each.path for each in old]


def record_commit(folder: Path, step: int, *, seconds_blocked: float) -> dict[str, Any]:
    """Add a commit to the folder's history; returns its line there. One process at a time.

    seconds_blocked: how long the training stood still for it.
    """
    record = read_commit(step_folder(folder, step))
    line = {
        "step": step,
        "time": record.time,
        "bytes": record.bytes,
        "seconds_blocked": seconds_blocked,
        "seconds_total": record.seconds,
    }
    append_json_line(folder / COMMITS_FILE, line)
    return line


def commits(folder: Path) -> list[dict[str, Any]]:
    """All commits that there ever were, oldest first: {"step", "time", "bytes", "seconds_blocked", "seconds_total"}."""
    return list(read_json_lines(folder / COMMITS_FILE))


def expected_save_seconds(folder: Path) -> float | None:
    """How long a synchronous save may take: the longest of the last five, from its beginning to its commit; None before
    there is one. A save in the background counts in full: when it matters, there is nothing left to hide it behind."""
    return max((line["seconds_total"] for line in commits(folder)[-_RECENT_SAVES:]), default=None)


def _step_of(path: Path) -> int:
    match = _STEP.match(path.name)
    if not match:
        raise ValueError(f"{path} is not the folder of a step")
    return int(match[1])


def _wait_until_in_place(path: Path, files: dict[str, FileRecord]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        absent = [name for name, file in files.items() if _size(path / name) != file.size]
        if not absent:
            return
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"{path / min(absent)} is not as its rank wrote it, seen from the rank that commits"
                f" ({len(absent)} of {len(files)} files); is the folder shared by all nodes?"
            )
        time.sleep(_TURN_S)
        # Listing a folder makes an NFS client look again.
        list(path.iterdir())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _problem_with(path: Path, name: str, expected: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size < expected.size:
            return f"{name}: truncated: {size} of {expected.size} bytes"
        if size > expected.size:
            return f"{name}: altered: {size} bytes instead of {expected.size}"
        if expected.algorithm != ALGORITHM:
            return f"{name}: its checksum is of an unknown kind, {expected.algorithm!r}"
        checksum = _checksum(path)
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: unreadable: {_plainly(error)}"
    if checksum != expected.checksum:
        return f"{name}: altered: {ALGORITHM} {checksum} instead of {expected.checksum}"
    return None


def _checksum(path: Path) -> str:
    checksum = Checksum()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.hexadecimal()


def _rename(path: Path, kind: str) -> Path:
    match = _STEP.match(path.name) or _SET_ASIDE.match(path.name)
    assert match is not None
    # The step is the last group of either pattern.
    base = f"{kind}-{int(match[match.re.groups]):06d}-{time.strftime('%Y%m%dT%H%M%S')}"
    candidates = (path.with_name(base if number == 1 else f"{base}-{number}") for number in range(1, 1000))
    aside = next(candidate for candidate in candidates if not candidate.exists())
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def _plainly(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
