"""A folder of checkpoints: what counts, what is found wrong with it, and what may go."""

import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_slurm.run import checkpoints
from titan_slurm.run.checkpoints import FileRecord

SHARD, OTHER, METADATA = "__0_0.distcp", "__1_0.distcp", ".metadata"
CONTENTS = {SHARD: bytes(range(256)) * 64, OTHER: b"\0" * 10_000, METADATA: b"what is where"}


def save(folder: Path, step: int, *, commit: bool = True) -> Path:
    path = checkpoints.step_folder(folder, step)
    path.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (path / name).write_bytes(content)
    if commit:
        files = {name: FileRecord(len(content), f"{zlib.crc32(content):08x}") for name, content in CONTENTS.items()}
        checkpoints.commit(path, files, started=time.monotonic() - 2)
    return path


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (SHARD, flip, "__0_0.distcp: altered: crc32 "),
    (SHARD, cut, "__0_0.distcp: truncated: 16383 of 16384 bytes"),
    (OTHER, remove, "__1_0.distcp: missing"),
    (METADATA, remove, ".metadata: missing"),
    (METADATA, empty, ".metadata: truncated: 0 of 13 bytes"),
    ("commit.json", empty, "commit.json: Expecting value"),
    ("commit.json", cut, ""),
]


def test_what_was_committed_verifies(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert checkpoints.problems_with(path) == []
    record = checkpoints.read_commit(path)
    assert record.step == 3
    assert record.bytes == sum(map(len, CONTENTS.values()))
    assert record.seconds >= 2
    assert json.loads((path / "commit.json").read_text())["schema"] == 1


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE)
def test_damage_is_told_by_file(tmp_path: Path, name: str, damage: Callable[[Path], None], says: str) -> None:
    path = save(tmp_path, 3)
    if name == "commit.json" and damage is cut:
        # The last byte is a newline, without which the record is as good.
        cut(path / name)
    damage(path / name)
    problems = checkpoints.problems_with(path)
    assert len(problems) == 1
    assert problems[0].startswith(says or "commit.json: ")
    # What reading the sizes alone can tell.
    assert checkpoints.is_whole(checkpoints.list_checkpoints(tmp_path)[0]) == (damage is flip)


def test_every_single_byte_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    for place in (0, len(CONTENTS[SHARD]) - 1):
        content = bytearray(CONTENTS[SHARD])
        content[place] ^= 0x80
        (path / SHARD).write_bytes(content)
        assert checkpoints.problems_with(path)
    (path / SHARD).write_bytes(CONTENTS[SHARD] + b"\0")
    assert checkpoints.problems_with(path) == ["__0_0.distcp: altered: 16385 bytes instead of 16384"]


def test_the_work_can_be_shared(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    flip(path / SHARD)
    record = checkpoints.read_commit(path)
    assert checkpoints.problems_with(path, record, [OTHER, METADATA]) == []
    assert len(checkpoints.problems_with(path, record, [SHARD])) == 1


def test_a_copy_under_another_step_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 3).rename(tmp_path / "step-9")
    assert checkpoints.problems_with(tmp_path / "step-9") == ["commit.json: is of step 3"]


def test_only_exact_names_are_checkpoints(tmp_path: Path) -> None:
    assert checkpoints.list_checkpoints(tmp_path / "none") == []
    for step in (2, 10):
        save(tmp_path, step)
    save(tmp_path, 12, commit=False)
    for name in ("step-12.bak", "old-step-14", "step-", "step-1a", "notes"):
        (tmp_path / name).mkdir()
    found = [(each.step, each.state) for each in checkpoints.list_checkpoints(tmp_path)]
    assert found == [(12, "uncommitted"), (10, "committed"), (2, "committed")]
    assert checkpoints.newest_committed_step(tmp_path) == 10
    assert checkpoints.newest_committed_step(tmp_path / "none") == 0


def test_what_is_set_aside_is_out_of_the_way_and_says_why(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    aside = checkpoints.set_aside(path, checkpoints.BAD, ["__0_0.distcp: missing"])
    # torchtitan takes any name with "step-" and digits in it.
    assert aside.name.startswith("bad-000012-") and "step-" not in aside.name
    assert not path.exists()
    save(tmp_path, 12)
    # The same step in the same second.
    again = checkpoints.set_aside(path, checkpoints.BAD, [])
    assert again != aside
    save(tmp_path, 12)
    listed = checkpoints.list_checkpoints(tmp_path)
    assert [each.state for each in listed] == ["committed", "set aside", "set aside"]
    assert [each.reason() for each in listed] == [[], ["__0_0.distcp: missing"], []]


def test_the_commit_waits_for_files_of_other_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_PATIENCE_S", 0)
    path = save(tmp_path, 3, commit=False)
    with pytest.raises(FileNotFoundError, match=r"__9_0.distcp .* is the folder shared by all nodes\?"):
        checkpoints.commit(path, {"__9_0.distcp": FileRecord(1, "")}, started=0)
    assert not (path / "commit.json").exists()


def test_retention_counts_good_ones_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    save(tmp_path, 5, commit=False)
    assert [each.step for each in checkpoints.stale(tmp_path, 2)] == [2, 1]
    cut(tmp_path / "step-4" / SHARD)
    assert [each.step for each in checkpoints.stale(tmp_path, 2)] == [1]
    for step in (1, 2, 3):
        cut(tmp_path / f"step-{step}" / SHARD)
    assert checkpoints.stale(tmp_path, 2) == []


def test_prune_keeps_what_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    flip(tmp_path / "step-4" / SHARD)
    save(tmp_path, 0, commit=False)
    save(tmp_path, 6, commit=False)
    checkpoints.set_aside(save(tmp_path, 5, commit=False), checkpoints.PARTIAL, [])
    left = checkpoints.set_aside(save(tmp_path, 3_000_000, commit=False), checkpoints.BAD, [])
    (tmp_path / "pruned-000001-20200101T000000").mkdir()
    gone = checkpoints.prune(tmp_path, 1)
    assert {path.name for path in gone} == {"step-2", "step-1", "step-0"}
    remaining = {path.name for path in tmp_path.iterdir()}
    # Step 6 may be being saved, what was cut off at 5 is newer than the last good one, 4 is bad and does not count.
    assert {"step-3", "step-4", "step-6", left.name} <= remaining
    assert len(remaining) == 5
    # The last good one stays whatever is asked.
    assert checkpoints.prune(tmp_path, 1) == []


def test_what_was_cut_off_goes_once_a_newer_one_is_committed(tmp_path: Path) -> None:
    aside = checkpoints.set_aside(save(tmp_path, 5, commit=False), checkpoints.PARTIAL, [])
    assert checkpoints.leftovers(tmp_path) == []
    save(tmp_path, 4)
    assert checkpoints.leftovers(tmp_path) == []
    save(tmp_path, 6)
    assert [each.path for each in checkpoints.leftovers(tmp_path)] == [aside]


def test_how_long_a_save_takes_is_learned(tmp_path: Path) -> None:
    assert checkpoints.expected_save_seconds(tmp_path) is None
    save(tmp_path, 1)
    checkpoints.record_commit(tmp_path, 1, seconds_blocked=0.5)
    line = checkpoints.commits(tmp_path)[0]
    assert (line["step"], line["seconds_blocked"]) == (1, 0.5)
    assert line["bytes"] == sum(map(len, CONTENTS.values()))
    assert checkpoints.expected_save_seconds(tmp_path) == line["seconds_total"] >= 2
    with (tmp_path / "commits.jsonl").open("a") as file:
        file.writelines(json.dumps({"seconds_total": seconds}) + "\n" for seconds in (50, 7, 3, 4, 5, 6))
    # The last five only: disks and sizes change.
    assert checkpoints.expected_save_seconds(tmp_path) == 7
