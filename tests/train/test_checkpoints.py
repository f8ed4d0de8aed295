"""What a run goes on from, when its checkpoints have been damaged for real: files cut, altered and removed, a full
disk, a kill in the middle of a save. Every case resumes a real training."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.train.conftest import LocalRun

LAST = 14


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LocalRun:
    """A run with a checkpoint at every second step, that nothing happened to."""
    run = LocalRun(
        tmp_path_factory.mktemp("runs") / "mine", "checkpointing.save_interval=2", "checkpointing.keep_latest=9"
    )
    run.train(f"training.max_steps={LAST}")
    assert run.steps == [2, 4, 6, 8, 10, 12, 14]
    return run


@pytest.fixture
def finished(undisturbed: LocalRun, tmp_path: Path) -> Iterator[LocalRun]:
    """The same run, to be damaged: it is put back afterwards, in its place, since a plan holds paths."""
    path = undisturbed.run.path
    shutil.copytree(path, tmp_path / "backup", symlinks=True)
    yield LocalRun(path, *undisturbed.settings)
    shutil.rmtree(path)
    (tmp_path / "backup").rename(path)


@pytest.fixture
def losses(undisturbed: LocalRun) -> dict[int, float]:
    """The loss of each step of the undisturbed run."""
    return undisturbed.losses(attempt=1)


def flip(file: Path) -> None:
    """Alter one byte in the middle."""
    with file.open("r+b") as content:
        content.seek(file.stat().st_size // 2)
        byte = content.read(1)
        content.seek(-1, 1)
        content.write(bytes([byte[0] ^ 0x10]))


def cut(file: Path) -> None:
    """Lose the last block."""
    with file.open("r+b") as content:
        content.truncate(file.stat().st_size - 4096)


def test_every_kind_of_damage_is_passed_over(finished: LocalRun, losses: dict[int, float]) -> None:
    folder = finished.checkpoints
    (folder / "step-14" / "commit.json").unlink()
    cut(folder / "step-12" / "__0_0.distcp")
    (folder / "step-10" / "__1_0.distcp").unlink()
    flip(folder / "step-8" / "__1_0.distcp")
    (folder / "step-6" / ".metadata").unlink()
    (folder / "step-4" / ".metadata").write_bytes(b"")
    expected = {
        12: "__0_0.distcp: truncated",
        10: "__1_0.distcp: missing",
        8: "__1_0.distcp: altered",
        6: ".metadata: missing",
        4: ".metadata: truncated",
    }
    verified = finished.titan_slurm("checkpoints", "verify", "mine", code=1)
    for step, problem in expected.items():
        assert f"step-{step}: BAD\n  {problem}" in verified
    assert "step-2: good" in verified

    finished.train(f"training.max_steps={LAST + 2}")
    # From step 2 on everything was computed again, to the same bits.
    again = finished.losses(attempt=2)
    assert list(again) == list(range(3, LAST + 3))
    assert {step: again[step] for step in range(3, LAST + 1)} == {step: losses[step] for step in range(3, LAST + 1)}
    assert finished.steps == list(range(2, LAST + 3, 2))
    log = finished.log()
    listed = json.loads(finished.titan_slurm("checkpoints", "list", "mine", "--json"))
    aside = {row["step"]: row for row in listed if row["state"] == "set aside"}
    for step, problem in expected.items():
        path = Path(aside[step]["path"])
        assert path.name.startswith(f"bad-{step:06}-")
        assert f"step-{step} is set aside as {path.name}" in log
        assert any(line.startswith(problem) for line in aside[step]["problems"])
        assert problem in log
    # What was never committed is worth nothing once the run has come by that step again.
    assert f"step-14 is set aside as partial-{14:06}-" in log
    assert 14 not in aside
    finished.titan_slurm("checkpoints", "verify", "mine")


def test_with_only_bad_ones_the_run_stops(finished: LocalRun) -> None:
    folder = finished.checkpoints
    for step in range(2, 12, 2):
        shutil.rmtree(folder / f"step-{step}")
    flip(folder / "step-14" / "__0_0.distcp")
    cut(folder / "step-12" / "__1_0.distcp")
    finished.start(f"training.max_steps={LAST + 2}")
    ended = finished.wait()
    assert ended.state == "failed"
    for part in (
        "no usable checkpoint",
        "step 14: __0_0.distcp: altered",
        "step 12: __1_0.distcp: truncated",
        "step 0",
    ):
        assert part in ended.reason
    assert finished.losses(attempt=2) == {}
    # Nothing is moved: what can be restored, can be restored where it was.
    assert finished.steps == [12, 14]
    flip(folder / "step-14" / "__0_0.distcp")
    finished.train()
    assert list(finished.losses(attempt=3)) == [15, 16]
    # Nor is a run whose checkpoints have all vanished a new one.
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    finished.start(f"training.max_steps={LAST + 4}")
    ended = finished.wait()
    assert ended.state == "failed"
    assert "no usable checkpoint" in ended.reason and "all are gone" in ended.reason


def test_a_damaged_checkpoint_of_another_run_is_no_start(finished: LocalRun, tmp_path: Path) -> None:
    other = finished.checkpoints / "step-12"
    run = LocalRun(tmp_path / "second", f"checkpointing.resume_from_checkpoint={other}", "training.max_steps=14")
    flip(other / "__0_0.distcp")
    run.start()
    ended = run.wait()
    assert ended.state == "failed"
    assert f"{other} cannot be started from: __0_0.distcp: altered" in ended.reason
    assert run.losses() == {}


def test_a_full_disk_costs_no_checkpoint(small_disk: Path, tmp_path: Path, losses: dict[int, float]) -> None:
    run = LocalRun(
        tmp_path / "full",
        f"checkpointing.save_dir={small_disk / 'checkpoints'}",
        "checkpointing.save_interval=2",
        "checkpointing.async_mode=async",
        "training.max_steps=8",
    )
    run.start()
    ended = run.wait()
    # The save at step 4 failed beside the training, which went on; the next one was made with the training waiting.
    assert ended.state == "failed"
    step_6 = run.checkpoints / "step-6"
    assert f"step 6 could not be saved: cannot write {step_6}: No space left on device (" in ended.reason
    assert "MiB free)" in ended.reason
    assert "step 4 could not be saved" in run.log() and "from here on, saves are synchronous" in run.log()
    assert run.steps == [2]
    assert "step-2: good" in run.titan_slurm("checkpoints", "verify", "full")
    # What did not fit has made room again, and with more of it the run goes on.
    assert [path.name for path in run.checkpoints.iterdir() if path.is_dir()] == ["step-2"]
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    run.train()
    assert run.steps == [4, 6, 8]
    assert run.losses(attempt=2) == {step: losses[step] for step in range(3, 9)}


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, losses: dict[int, float], mode: str) -> None:
    run = LocalRun(
        tmp_path / "killed",
        "checkpointing.save_interval=1",
        "checkpointing.keep_latest=3",
        f"checkpointing.async_mode={mode}",
    )
    run.start("training.max_steps=20")
    processes = stop_in_the_middle_of_a_save(run)
    refused = run.titan_slurm("checkpoints", "prune", "killed", code=2)
    assert "run killed is running and may be saving" in refused
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=30)
    good = run.steps[-1]
    partial = sorted(path.name for path in run.checkpoints.glob("step-*") if not (path / "commit.json").exists())
    assert partial
    run.train(f"training.max_steps={good + 3}")
    again = run.losses(attempt=2)
    assert list(again) == [good + 1, good + 2, good + 3]
    assert {step: again[step] for step in again.keys() & losses.keys()}.items() <= losses.items()
    assert f"The checkpoint of step {good} verifies" in run.log()
    for name in partial:
        assert f"{name} is set aside as partial-" in run.log()
    assert run.steps == [good + 1, good + 2, good + 3]
    assert not list(run.checkpoints.glob("partial-*"))


def stop_in_the_middle_of_a_save(run: LocalRun) -> list[psutil.Process]:
    """Stop every process of a run while a step folder is without its commit, and at least two checkpoints have one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not uncommitted(run) or len(run.steps) < 2:
            continue
        processes = run.processes()
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        while any(process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE) for process in processes):
            time.sleep(0.01)
        if uncommitted(run):
            return processes
        # Too late for this one.
        for process in processes:
            process.send_signal(signal.SIGCONT)
    pytest.fail(f"no save was seen under way\n{run.log()[-3000:]}")


def uncommitted(run: LocalRun) -> list[Path]:
    """Step folders without a commit."""
    return [path for path in run.checkpoints.glob("step-*") if not (path / "commit.json").exists()]


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_saves_in_the_background_end_committed(tmp_path: Path, losses: dict[int, float], mode: str) -> None:
    run = LocalRun(
        tmp_path / "background",
        "checkpointing.save_interval=2",
        "checkpointing.keep_latest=2",
        f"checkpointing.async_mode={mode}",
    )
    # The last step is off the interval, with a save in the background just before it.
    run.train("training.max_steps=7")
    assert run.losses() == {step: losses[step] for step in range(1, 8)}
    assert run.steps == [6, 7]
    commits = [json.loads(line) for line in (run.checkpoints / "commits.jsonl").read_text().splitlines()]
    assert [line["step"] for line in commits] == [2, 4, 6, 7]
    assert all(line["seconds_blocked"] > 0 and line["bytes"] > 70e6 for line in commits)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-6", "step-7", "commits.jsonl"}
    assert run.titan_slurm("checkpoints", "verify", "background").splitlines() == ["step-7: good", "step-6: good"]
    assert run.titan_slurm("checkpoints", "prune", "background").strip() == "nothing to remove"
    assert "removed" in run.titan_slurm("checkpoints", "prune", "background", "--keep", "1")
    assert run.steps == [7]
