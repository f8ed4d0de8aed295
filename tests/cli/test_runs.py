"""`titan-slurm runs`: list, show, rm, archive, on run directories that were never trained."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.test_state import attempted, submitted
from tests.conftest import CommandLine
from tests.run.test_checkpoints import SHARD, flip, save
from titan_slurm.run import archive
from titan_slurm.run.directory import RunDirectory

MakeRun = Callable[..., RunDirectory]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]


@pytest.fixture
def run(cli: CommandLine, make_run: MakeRun) -> RunDirectory:  # noqa: ARG001
    """A run that has ended, with a checkpoint."""
    made = submitted(make_run(cluster="local"))
    attempted(made).give_verdict("completed", "all 60 steps done", again=False, saved_step=60)
    save(made.checkpoints_folder, 60)
    return made


def test_list_needs_no_scheduler(cli: CommandLine, make_run: MakeRun, fake_command: FakeCommand) -> None:
    squeue = fake_command("squeue", "exit 1")
    for name in ("b", "a", "other"):
        submitted(make_run(name=name), "slurm")
    rows = [line.split() for line in cli("runs", "list").out.splitlines()]
    assert [row[0] for row in rows] == ["NAME", "a", "b", "other"]
    assert rows[1][-1] == str(Path("runs", "a").absolute())
    listed = json.loads(cli("runs", "list", "--name", "?", "--sizes", "--json").out)
    assert [(each["name"], each["attempts"], each["max_steps"]) for each in listed] == [("a", 0, 60), ("b", 0, 60)]
    assert listed[0]["bytes"] > Path("runs", "a", "plan.json").stat().st_size
    assert "SIZE" in cli("runs", "list", "--sizes").out.splitlines()[0]
    assert squeue() == []


def test_show_has_everything(cli: CommandLine, run: RunDirectory) -> None:
    out = cli("runs", "show", "mine").out
    assert "state  completed (all 60 steps done)" in out
    for heading in ("JOB ", "ATTEMPT ", "CHECKPOINT ", "ON DISK "):
        assert heading in out
    shown = json.loads(cli("runs", "show", "mine", "--json").out)
    assert shown["status"]["state"] == "completed"
    assert shown["plan"]["name"] == "mine"
    assert (shown["jobs"], [each["verdict"] for each in shown["attempts"]]) == (run.jobs(), ["completed"])
    assert [each["step"] for each in shown["checkpoints"]] == [60]
    assert shown["disk"]["checkpoints"] > 0


def test_a_removed_run_is_gone(cli: CommandLine, run: RunDirectory) -> None:
    # What a removal that was killed has left behind goes, too.
    (run.path.parent / ".removed-other-1").mkdir()
    refused = cli("runs", "rm", "mine")
    assert (refused.code, "--yes" in refused.errors[0], run.exists()) == (2, True, True)
    assert cli("runs", "rm", "mine", "--yes").out == f"removed run mine ({run.path})\n"
    assert list(run.path.parent.iterdir()) == []
    assert cli("runs", "rm", "--all", "--yes").out == "nothing to remove\n"


def test_a_run_that_may_be_running_is_not_removed(
    cli: CommandLine, run: RunDirectory, make_run: MakeRun, fake_command: FakeCommand
) -> None:
    submitted(make_run(name="alive", cluster="local"), process=os.getpid())
    attempted(submitted(make_run(name="unknown"), "slurm"))
    fake_command("squeue", "exit 1")
    for verb in ("rm", "archive"):
        # All or none: whoever names four runs has made a mistake with one.
        done = cli("runs", verb, "mine", "alive", "unknown", "--yes")
        assert done.code == 2
        assert [text.split(" (")[0] for text in done.errors] == [
            f"alive: is queued as job {os.getpid()}",
            "unknown: may be running: Slurm's controller does not answer; this is the last known state",
        ]
    assert cli("runs", "rm", "--all", "--yes").out == f"removed run mine ({run.path})\n"
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["alive", "unknown"]


def test_a_run_that_somebody_is_submitting_is_left_alone(cli: CommandLine, run: RunDirectory) -> None:
    with run.lock():
        done = cli("runs", "rm", "mine", "--yes")
    assert (done.code, done.errors) == (2, ["mine: somebody is submitting it at this moment"])
    assert run.exists()


def test_checkpoints_outside_the_run_stay_unless_asked_for(cli: CommandLine, make_run: MakeRun, tmp_path: Path) -> None:
    setting = f"checkpointing.save_dir={tmp_path / 'scratch'}"
    folders = {}
    for name in ("kept", "gone", "shared"):
        run = make_run(setting, name=name, cluster="local")
        folders[name] = run.checkpoints_folder
        save(run.checkpoints_folder, 20)
    record = folders["shared"] / "step-20" / "commit.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"run": "/other/runs/shared"}))
    assert f"its checkpoints stay in {folders['kept']}" in cli("runs", "rm", "kept", "--yes").out
    done = cli("runs", "rm", "gone", "shared", "--checkpoints", "--yes")
    assert done.out == f"removed run gone ({Path('runs', 'gone').absolute()})\n"
    assert "are also those of /other/runs/shared" in done.errors[0]
    assert [name for name, folder in folders.items() if folder.exists()] == ["kept", "shared"]
    assert [path.name for path in Path("runs").iterdir()] == ["shared"]


def unpacked(file: Path, into: Path) -> Path:
    """An archive's contents, which `sha256sum` finds in order."""
    into.mkdir()
    subprocess.run(["tar", "xf", file, "-C", into], check=True)
    (folder,) = into.iterdir()
    subprocess.run(["sha256sum", "--check", "--quiet", archive.SUMS_FILE], cwd=folder, check=True)
    return folder


def test_an_archive_is_the_run_without_its_checkpoints(cli: CommandLine, run: RunDirectory, tmp_path: Path) -> None:
    (run.cache_folder / "inductor").mkdir(parents=True)
    (run.path / "link").symlink_to("plan.json")
    (run.path / "twin").hardlink_to(run.plan_file)
    done = cli("runs", "archive", "mine", "--json")
    (outcome,) = json.loads(done.out)
    file = Path("mine.tar.gz").absolute()
    assert (outcome["changed"], outcome["archive"], file.stat().st_mode & 0o444) == (True, str(file), 0o444)
    folder = unpacked(file, tmp_path / "unpacked")
    assert (folder / "link").readlink() == Path("plan.json")
    assert (folder / "twin").read_bytes() == run.plan_file.read_bytes()
    ours = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if not path.name.startswith(".")}
    theirs = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    left_out = {each for each in ours if each.startswith(("cache", "checkpoints/step-60"))}
    assert theirs == ours - left_out | {archive.SUMS_FILE}
    # Where the run was it is a run again.
    assert cli("runs", "rm", "mine", "--yes").code == 0
    subprocess.run(["tar", "xf", file, "-C", "runs"], check=True)
    assert json.loads(cli("status", "mine", "--json").out)["state"] == "completed"


def test_an_archive_loses_nothing_beside_checkpoints(cli: CommandLine, run: RunDirectory, tmp_path: Path) -> None:
    """Of a run whose recipe had them saved beside everything else, when that could still be said."""
    plan = json.loads(run.plan_file.read_text())
    plan["torchtitan"]["checkpoint.folder"] = str(run.path)
    run.plan_file.write_text(json.dumps(plan))
    (run.path / "checkpoints" / "step-60").rename(run.path / "step-60")
    assert cli("runs", "archive", "mine").code == 0
    folder = unpacked(Path("mine.tar.gz"), tmp_path / "unpacked")
    names = {path.name for path in run.path.iterdir() if not path.name.startswith(".")}
    assert {path.name for path in folder.iterdir()} == names - {"step-60"} | {archive.SUMS_FILE}
    assert list((folder / "code").rglob("*.py"))


def test_an_archive_with_the_newest_checkpoint_that_is_intact(
    cli: CommandLine, run: RunDirectory, tmp_path: Path
) -> None:
    flip(save(run.checkpoints_folder, 80) / SHARD)
    assert "with the checkpoint of step 60" in cli("runs", "archive", "mine", "--checkpoint", "--to", tmp_path).out
    folder = unpacked(tmp_path / "mine.tar", tmp_path / "unpacked")
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()] == ["step-60"]
    shard = Path("checkpoints", "step-60", SHARD)
    assert (folder / shard).read_bytes() == (run.path / shard).read_bytes()
    flip(run.path / shard)
    done = cli("runs", "archive", "mine", "--checkpoint")
    assert (done.code, done.errors) == (2, ["--checkpoint: run mine has no checkpoint that is intact"])
    assert not Path("mine.tar").exists()


def test_archives_take_the_place_of_runs(cli: CommandLine, make_run: MakeRun) -> None:
    for name in ("a", "b"):
        make_run(name=name, cluster="local")
    Path("b.tar.gz").write_text("mine")
    done = cli("runs", "archive", "--all", "--rm", "--yes")
    assert (done.code, done.errors) == (2, [f"b: {Path('b.tar.gz').absolute()} exists already"])
    assert (Path("b.tar.gz").read_text(), [path.name for path in Path("runs").iterdir()]) == ("mine", ["b"])
    assert Path("a.tar.gz").exists()
    # Nothing half-written is left.
    assert not list(Path().glob(".*"))


def test_an_archive_that_is_not_what_was_read_is_none(
    cli: CommandLine, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = archive._unpacked_sums
    monkeypatch.setattr(archive, "_unpacked_sums", lambda file: read(file) | {"mine/plan.json": "0" * 64})
    done = cli("runs", "archive", "mine", "--rm", "--yes")
    assert (done.code, done.errors) == (2, [f"mine: what is in the archive is not what was read of {run.path}"])
    assert run.exists()
    assert [path.name for path in Path().iterdir()] == ["runs"]


def test_where_an_archive_cannot_be(cli: CommandLine, run: RunDirectory, make_run: MakeRun) -> None:
    make_run(name="other", cluster="local")
    assert run.exists()
    assert "neither a folder that exists nor ends in" in cli("runs", "archive", "mine", "--to", "x.zip").errors[0]
    assert cli("runs", "archive", "mine", "--to", "no/x.tar").errors == ["--to: there is no folder no"]
    assert "each run gets a file" in cli("runs", "archive", "mine", "other", "--to", "x.tar").errors[0]
