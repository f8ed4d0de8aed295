"""How a checkpoint reaches the disk: torch's own writer, with a checksum taken of every byte on its way out, and the
commit record as the last act of the save. Saver processes load this module, so it imports no torchtitan."""

import os
import shutil
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, _FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization

from titan_slurm.run.checkpoints import Checksum, FileRecord, commit

# Below, handing a chunk to another thread costs more than its checksum.
_WORTH_A_THREAD_BYTES = 2**20


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be saved; the message says where, why and how much room there is."""


# Not FileSystemWriter: that is a stager as well, and DCP's asynchronous save would stage with it instead of its own.
class CommittingWriter(_FileSystemWriter):
    """Writes a checkpoint into `path` and commits it.

    DCP gathers what each rank wrote at the coordinator, which finishes the save; sizes and checksums travel along. So
    there is a commit exactly when every rank's files are synced, in every mode of saving and without a collective more.
    """

    def __init__(self, path: str, run: str = "") -> None:
        super().__init__(path)
        self.run = run
        self.fs = _SummingFileSystem()
        self.started = time.monotonic()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Write this rank's files. Raises CheckpointSaveError."""
        # torch.save takes a CRC-32 of each tensor as well, at which nothing that loads checkpoints looks; ours, of the
        # whole file, takes its place and its time.
        with self._plain_errors(), serialization.patch("save.compute_crc32", False):
            results = _Results(super().write_data(plan, planner).value())
        results.files = self.fs.take_records()
        future: Any = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata and commit: on the coordinator, after every rank's files. Raises CheckpointSaveError."""
        with self._plain_errors():
            super().finish(metadata, results)
            files = self.fs.take_records()
            for each in results:
                assert isinstance(each, _Results)
                files |= each.files
            commit(Path(self.path), files, started=self.started, run=self.run)

    @contextmanager
    def _plain_errors(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            # torch.save replaces what the disk said by a remark on its own position in the file.
            cause = self.fs.failure or error
            said = (cause.strerror if isinstance(cause, OSError) else None) or f"{type(cause).__name__}: {cause}"
            raise CheckpointSaveError(f"cannot write {self.path}: {said} ({_room(Path(self.path))})") from error


class _Results(list[WriteResult]):
    """What a rank wrote, as DCP wants it, and the files that hold it."""

    files: dict[str, FileRecord]


class _SummingFileSystem(FileSystem):
    """Keeps size and checksum of every file written through it, by name, and the first error of the disk."""

    def __init__(self) -> None:
        self._records: dict[str, FileRecord] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any]:
        """Open a file, as FileSystem does."""
        with super().create_stream(path, mode) as stream, ThreadPoolExecutor(1) as helper:
            summing = _SummingStream(stream, helper, self)
            yield summing
        self._records[Path(path).name] = FileRecord(summing.size, summing.checksum.hexadecimal())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file that has been written."""
        super().rename(path, new_path)
        self._records[Path(new_path).name] = self._records.pop(Path(path).name)

    def take_records(self) -> dict[str, FileRecord]:
        """What has been written since the last call."""
        records, self._records = self._records, {}
        return records


class _SummingStream:
    """A file being written from front to back: all that DCP and torch.save need of it, and no `seek`."""

    def __init__(self, stream: Any, helper: ThreadPoolExecutor, owner: _SummingFileSystem) -> None:
        self._stream = stream
        self._helper = helper
        self._owner = owner
        self.checksum = Checksum()
        self.size = 0

    def write(self, data: Any) -> int:
        """Write `data`, with its checksum taken meanwhile by the helper: both run outside Python's lock."""
        view = memoryview(data).cast("B")
        if len(view) < _WORTH_A_THREAD_BYTES:
            self.checksum.update(view)
            self._write(view)
        else:
            summing = self._helper.submit(self.checksum.update, view)
            # The memory is the caller's again when this returns, whatever comes of the writing.
            try:
                self._write(view)
            finally:
                summing.result()
        self.size += len(view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        try:
            self._stream.write(view)
        except OSError as error:
            self._owner.failure = self._owner.failure or error
            raise

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def _room(path: Path) -> str:
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return "its free space cannot be read"
    return f"{free / 2**20:,.0f} MiB free"
