"""What tells two states of data and of code apart."""

import os
from pathlib import Path

import pytest

from titan_slurm.run import lock

MIB = 2**20


def rewrite(file: Path, offset: int, *, keep_time: bool) -> None:
    """Alter a byte, and perhaps let the file look as old as it was."""
    before = file.stat()
    with file.open("r+b") as content:
        content.seek(offset)
        content.write(b"x")
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a small file and a large one, of zeros."""
    folder = tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "small.txt").write_text("text")
    with (folder / "large.bin").open("wb") as large:
        large.truncate(9 * MIB)
    return folder


@pytest.mark.parametrize("offset", [0, 5 * MIB - MIB // 2 + 1, 9 * MIB - 1])
def test_an_edit_shows(data: Path, offset: int) -> None:
    known = lock.fingerprint(data)
    assert known is not None
    assert (known["files"], known["bytes"]) == (2, 9 * MIB + 4)
    assert lock.is_same(data, known)
    rewrite(data / "large.bin", offset, keep_time=False)
    assert not lock.is_same(data, known)


def test_a_copy_is_the_same_wherever_and_whenever_it_was_made(data: Path) -> None:
    known = lock.fingerprint(data)
    assert known is not None
    os.utime(data / "large.bin", (1, 1))
    assert lock.is_same(data, known)
    moved = data.rename(data.with_name("moved"))
    assert lock.is_same(moved, known)
    assert not lock.is_same(data, known)


def test_the_name_of_a_file_counts(data: Path) -> None:
    known = lock.fingerprint(data)
    (data / "large.bin").rename(data / "other.bin")
    assert lock.fingerprint(data) != known


def test_not_more_is_read_than_it_takes(data: Path) -> None:
    before = lock.fingerprint(data)
    # Between the pieces that are read of a large file: only its time would tell.
    rewrite(data / "large.bin", 2 * MIB, keep_time=True)
    assert lock.fingerprint(data) == before


def test_what_is_not_there_has_no_fingerprint(tmp_path: Path) -> None:
    assert lock.fingerprint(tmp_path / "none") is None
    assert lock.tokenizer_fingerprint(tmp_path / "none") is None


def test_of_a_tokenizers_folder_only_the_tokenizer_counts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    known = lock.tokenizer_fingerprint(tmp_path)
    assert known is not None
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert lock.is_same(tmp_path, known)
    (tmp_path / "tokenizer.json").write_text('{"added": 1}')
    assert not lock.is_same(tmp_path, known)


def test_the_hash_of_code_is_of_its_source_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").write_text("x = 1\n")
    known = lock.code_hash(tmp_path)
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "x.pyc").write_bytes(b"compiled")
    assert lock.code_hash(tmp_path) == known
    (tmp_path / "a" / "__init__.py").write_text("x = 2\n")
    assert lock.code_hash(tmp_path) != known
