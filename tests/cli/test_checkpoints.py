"""`titan-slurm checkpoints`, on folders made for it; tests/train has those of real trainings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine
from tests.run.test_checkpoints import SHARD, flip, save
from titan_slurm.launch import create
from titan_slurm.launch.submit import Prepared
from titan_slurm.run import checkpoints


@pytest.fixture
def folder(cli: CommandLine, prepare: Callable[..., Prepared]) -> Path:  # noqa: ARG001 (an empty folder first)
    """The folder of checkpoints of a run called `mine`."""
    prepared = prepare("llama3_debug", "checkpointing.keep_latest=2")
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    return prepared.run.checkpoints_folder


def test_a_run_without_checkpoints(cli: CommandLine, folder: Path) -> None:
    assert cli("checkpoints", "list", "mine").out == f"no checkpoints in {folder}\n"
    assert cli("checkpoints", "list", "mine", "--json").out == "[]\n"
    verified = cli("checkpoints", "verify", "mine")
    assert (verified.code, verified.out) == (0, "no committed checkpoints\n")
    assert cli("checkpoints", "prune", "mine").out == "nothing to remove\n"


def test_list_shows_what_counts_and_what_does_not(cli: CommandLine, folder: Path) -> None:
    save(folder, 20)
    save(folder, 40, commit=False)
    checkpoints.set_aside(save(folder, 30), checkpoints.BAD, ["__0_0.distcp: missing"])
    rows = [line.split() for line in cli("checkpoints", "list", "mine").out.splitlines()]
    assert rows[0] == ["STEP", "STATE", "COMMITTED", "FILES", "SIZE", "SECONDS", "FOLDER", "REASON"]
    assert rows[1][:2] == ["40", "uncommitted"]
    assert rows[2][:3] == ["30", "set", "aside"]
    assert rows[2][-2:] == ["__0_0.distcp:", "missing"]
    assert rows[3][:2] == ["20", "committed"] and "step-20" in rows[3]
    listed = json.loads(cli("checkpoints", "list", "mine", "--json").out)
    assert [(row["step"], row["state"], row["files"]) for row in listed] == [
        (40, "uncommitted", None),
        (30, "set aside", None),
        (20, "committed", 3),
    ]


def test_verify_names_the_file(cli: CommandLine, folder: Path) -> None:
    save(folder, 20)
    flip(save(folder, 40) / SHARD)
    (save(folder, 60) / "commit.json").write_text("{}")
    verified = cli("checkpoints", "verify", "mine")
    assert verified.code == 1
    lines = verified.out.splitlines()
    assert lines[0] == "step-60: BAD" and lines[1].startswith("  commit.json: is not a commit record")
    assert lines[2] == "step-40: BAD" and lines[3].startswith(f"  {SHARD}: altered: crc32 ")
    assert lines[4:] == ["step-20: good"]
    found = json.loads(cli("checkpoints", "verify", "mine", "--json").out)
    assert [(each["step"], len(each["problems"])) for each in found] == [(60, 1), (40, 1), (20, 0)]


def test_prune_keeps_as_many_as_the_run_does(cli: CommandLine, folder: Path) -> None:
    for step in (20, 40, 60, 80):
        save(folder, step)
    assert cli("checkpoints", "prune", "mine").out.split() == [
        *("removed", f"{folder}/step-40"),
        *("removed", f"{folder}/step-20"),
    ]
    assert json.loads(cli("checkpoints", "prune", "mine", "--keep", "1", "--json").out) == [f"{folder}/step-60"]
    assert cli("checkpoints", "prune", "mine", "--keep", "0").code == 2
    assert [path.name for path in folder.iterdir()] == ["step-80"]


def test_a_run_that_is_not_there(cli: CommandLine) -> None:
    for verb in ("list", "verify", "prune"):
        done = cli("checkpoints", verb, "mine")
        assert (done.code, len(done.errors)) == (2, 1)
