"""A run as one file: a tar archive of its folder, a run again where it is unpacked. It is complete or not there, and
has the checksum of every file as `sha256sum --check` reads it."""

import gzip
import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from titan_slurm.run.checkpoints import Checkpoint, doomed, list_checkpoints
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import sync_directory, umask

SUMS_FILE = "SHA256SUMS"
COMPRESSED = (".tar.gz", ".tgz")
ENDINGS = (*COMPRESSED, ".tar")


class ChangedError(Exception):
    """The archive is not what was read: the run has changed meanwhile, or the disk has failed."""


def write(run: RunDirectory, target: Path, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Archive a run into a new file, without its checkpoints, or with this one, and without what torch has compiled.

    Everything is read back and compared before the file gets its name. Returns the SHA-256 of each file in it. Raises
    FileExistsError if there is such a file, ChangedError if it is not as it was read, and other OSErrors.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            sums = _pack(run, file, checkpoint, compress=target.name.endswith(COMPRESSED))
            file.flush()
            os.fsync(file.fileno())
        if _unpacked_sums(temporary) != {f"{run.name}/{path}": value for path, value in sums.items()}:
            raise ChangedError(f"what is in the archive is not what was read of {run.path}")
        temporary.chmod(0o666 & ~umask())
        # Unlike a rename, a link never takes the place of what is there.
        target.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(target.parent)
    return sums


def _pack(run: RunDirectory, file: IO[bytes], checkpoint: Checkpoint | None, *, compress: bool) -> dict[str, str]:
    sums: dict[str, str] = {}
    out: Any = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6) if compress else file
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, inside in _contents(run, checkpoint):
            info = tar.gettarinfo(path, f"{run.name}/{inside}")
            if info.islnk():
                # Two names of one file are two files here: each can be checked, and unpacked, by itself.
                info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
            if info.isreg():
                with path.open("rb") as source:
                    reader = _Hashing(source)
                    tar.addfile(info, reader)
                sums[inside] = reader.sum.hexdigest()
            else:
                tar.addfile(info)
        text = "".join(f"{value}  {path}\n" for path, value in sorted(sums.items())).encode()
        info = tarfile.TarInfo(f"{run.name}/{SUMS_FILE}")
        info.size, info.mode = len(text), 0o644
        tar.addfile(info, io.BytesIO(text))
    if compress:
        out.close()
    return sums


def _contents(run: RunDirectory, checkpoint: Checkpoint | None) -> Iterator[tuple[Path, str]]:
    """What goes into the archive, folders before what is in them: its path, and its name in the run."""
    for path in _below(run.path, without={run.cache_folder, *_checkpoints(run.checkpoints_folder)}):
        if not path.name.startswith(".") and path.name != SUMS_FILE:
            yield path, str(path.relative_to(run.path))
    if checkpoint is not None:
        # Where it is not within the run, it is in the archive.
        inside = checkpoint.path.is_relative_to(run.path)
        base = checkpoint.path.relative_to(run.path) if inside else Path("checkpoints", checkpoint.path.name)
        yield checkpoint.path, str(base)
        for path in _below(checkpoint.path, without=set()):
            yield path, str(base / path.relative_to(checkpoint.path))


def _checkpoints(folder: Path) -> list[Path]:
    """Whatever has been saved there, or is on its way out, and nothing else that a recipe has put beside it."""
    return [*(each.path for each in list_checkpoints(folder)), *doomed(folder)]


def _below(folder: Path, without: set[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path in without:
            continue
        if path.is_symlink() or path.is_file():
            yield path
        elif path.is_dir():
            yield path
            yield from _below(path, without)


def _unpacked_sums(file: Path) -> dict[str, str]:
    """The checksum of each file in an archive, but for the one that holds them."""
    sums = {}
    with tarfile.open(file) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None and not member.name.endswith(f"/{SUMS_FILE}"):
                sums[member.name] = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
    return sums


class _Hashing:
    """A file whose checksum is known when it has been read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.sum = hashlib.sha256()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """As a file does."""
        data = self._file.read(size)
        self.sum.update(data)
        return data
