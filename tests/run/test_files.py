"""Files that another process reads: whole or not at all, whatever becomes of the writer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from titan_slurm.run.files import (
    append_json_line,
    last_json_line,
    locked,
    read_json,
    read_json_lines,
    write_atomic,
    write_json,
)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for value in ({"a": 1}, {"name": "ünïcode 🙂", "list": [1, None]}):
        write_json(file, value)
        assert read_json(file) == value
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []
    assert last_json_line(tmp_path / "none.jsonl") is None


def test_a_file_can_be_read_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "shared", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o640


def test_a_writer_that_fails_halfway_leaves_the_old_text(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, "old")
    # A lone surrogate cannot be written: the error arises when the file is open and partly filled.
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "new" * 100_000 + "\ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


DIES = """
import resource, signal, sys
from pathlib import Path
from titan_slurm.run.files import append_json_line, write_atomic

# The kernel kills this process when it has written that much of a file.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
"""


def dies_writing(statement: str) -> None:
    """Run a statement in a process that the kernel kills in the middle of it, as kill -9 would."""
    done = subprocess.run([sys.executable, "-c", f"{DIES}\n{statement}"])
    # A second write is what goes beyond the limit: the first one is cut short at it.
    assert done.returncode == -signal.SIGXFSZ


def test_a_writer_that_is_killed_halfway_leaves_the_old_text(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomic(file, "old")
    dies_writing(f"write_atomic(Path({str(file)!r}), 'new' * 1_000_000)")
    assert file.read_text() == "old"
    write_atomic(file, "newer")
    assert file.read_text() == "newer"


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_json_line(file, {"step": 1})
    dies_writing(f"append_json_line(Path({str(file)!r}), {{'step': 2, 'text': 'x' * 5000}})")
    assert file.stat().st_size == 1000
    assert list(read_json_lines(file)) == [{"step": 1}]
    assert last_json_line(file) == {"step": 1}

    append_json_line(file, {"step": 3})

    assert list(read_json_lines(file)) == [{"step": 1}, {"step": 3}]
    assert last_json_line(file) == {"step": 3}
    assert json.loads(file.read_text().splitlines()[-1]) == {"step": 3}


def test_a_line_cut_inside_a_character_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"text": "\xc3')
    assert last_json_line(file) == {"step": 1}
    assert list(read_json_lines(file)) == [{"step": 1}]


def test_the_last_line_of_a_long_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(20_000)))
    assert last_json_line(file) == {"step": 19_999}


def test_lines_of_many_writers_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    statement = (
        "import sys; from pathlib import Path; from titan_slurm.run.files import append_json_line\n"
        f"for number in range(50): append_json_line(Path({str(file)!r}), {{'writer': sys.argv[1], 'number': number}})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", statement, str(writer)]) for writer in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    lines = list(read_json_lines(file))
    assert len(lines) == 200
    for writer in "0123":
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(50))


def test_a_lock_is_that_of_the_folder_which_has_the_name(tmp_path: Path) -> None:
    folder, same = tmp_path / "run", []

    def wait() -> None:
        with locked(folder / ".lock") as descriptor:
            same.append(os.path.samestat(os.fstat(descriptor), (folder / ".lock").stat()))

    folder.mkdir()
    waiting = threading.Thread(target=wait)
    with locked(folder / ".lock"):
        with pytest.raises(BlockingIOError), locked(folder / ".lock", patience_s=0.0):
            pass
        waiting.start()
        folder.rename(tmp_path / "taken-away")
        folder.mkdir()
    waiting.join()
    assert same == [True]
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError), locked(folder / ".lock"):
        pass
