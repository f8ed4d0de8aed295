"""Writing files that another process reads: whole or not at all. No knowledge of what is in them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_TAIL_BYTES = 65536


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a crash at any instant, sees the old content or the new, never a part."""
    with _written_beside(path, text) as temporary:
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
def _written_beside(path: Path, text: str) -> Iterator[Path]:
    """A file with that text on stable storage, in the folder of `path`; gone afterwards, unless it got another name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; a run is often shared with a group.
        temporary.chmod(0o666 & ~_umask())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _umask() -> int:
    # The only portable way to read the umask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
