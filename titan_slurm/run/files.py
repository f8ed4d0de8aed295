"""Writing files that another process reads: whole or not at all. No knowledge of what is in them."""

import contextlib
import fcntl
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_TAIL_BYTES = 65536
# Most locks are held for a moment; a server of files is not to be asked again and again for the others.
_SHORTEST_TURN_S, _LONGEST_TURN_S = 0.01, 0.5


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, as UTF-8 if it is text: a reader, or a crash at any instant, sees the old content or
    the new, never a part."""
    with _written_beside(path, content) as temporary:
        temporary.replace(path)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of `value` as JSON."""
    write_atomic(path, _json_text(value))


def write_json_once(path: Path, value: Any) -> bool:
    """As `write_json`, but what is in `path` already stands: of several writers at once, one wins. Returns whether it
    was this one."""
    with _written_beside(path, _json_text(value)) as temporary:
        try:
            # Unlike a rename, a link never takes the place of what is there.
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
    sync_directory(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if there is no such file, nor perhaps a folder for it."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return value


def finite(value: Any) -> Any:
    """Plain values that JSON can hold: what is no number is None."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_directory(path: Path) -> None:
    """Put renames and new names in `path` on stable storage."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Put what has been written to `path` on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_line(path: Path, value: Any) -> None:
    """Append one line of JSON by a single write, after a newline if an earlier writer died inside its line."""
    line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        # The kernel writes less than all of it only where there is no more room; then the next write says so.
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a line cut short by a kill is passed over."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def last_json_line(path: Path, having: str = "") -> dict[str, Any] | None:
    """The last whole line of a JSON-lines file, read from its end: the cost does not grow with the run. `having`: only
    a line with that field."""
    return next((value for value in _objects(reversed(_tail(path))) if not having or having in value), None)


def recent_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines among the last 64 KiB of a JSON-lines file, oldest first; each is parsed when it is asked for."""
    return _objects(_tail(path))


def _tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value


@contextlib.contextmanager
def locked(path: Path, patience_s: float | None = None) -> Iterator[int]:
    """Hold the lock that `path` is, which is made if it is not there. Held by the kernel, on file systems that machines
    share too: a kill frees it, unless a child lives on to which the descriptor that this yields was handed.

    Raises BlockingIOError if another has held it for `patience_s` (None: waits for ever), and FileNotFoundError if
    there is no such folder (any more).
    """
    give_up = None if patience_s is None else time.monotonic() + patience_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _wait_for_lock(descriptor, give_up)
            # Whoever had it may have taken the whole folder away, and another may have made a new one.
            if _is_file(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _wait_for_lock(descriptor: int, give_up: float | None) -> None:
    if give_up is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    turn_s = _SHORTEST_TURN_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(turn_s)
            turn_s = min(2 * turn_s, _LONGEST_TURN_S)


def _is_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextlib.contextmanager
def _written_beside(path: Path, content: str | bytes) -> Iterator[Path]:
    """A file with that content on stable storage, in the folder of `path`; gone afterwards, unless it got another
    name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; a run is often shared with a group.
        temporary.chmod(0o666 & ~umask())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def umask() -> int:
    """Of this process."""
    # To set it, which is how other systems tell it, would change it for the other threads.
    found = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1], 8) if found else 0o077
