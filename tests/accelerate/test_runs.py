"""A script in a run of its own, on this machine: what goes wrong with it, and what becomes of the run."""

from pathlib import Path

from tests.train.conftest import LocalRun

SCRIPT = Path(__file__).with_name("stumble.py")
SETTINGS = (
    "slurm.tasks_per_node=1",
    "training.max_steps=10",
    "checkpointing.save_interval=2",
    "checkpointing.keep_latest=2",
    "requeue.enabled=true",
    "requeue.hang_timeout=3",
)


def test_a_script_stumbles_and_goes_on_from_its_own_newest_step(tmp_path: Path) -> None:
    run = LocalRun(tmp_path / "runs" / "stumbles", *SETTINGS)
    run.run.path.parent.mkdir()
    # Python reads it by what it says of itself, and so must whoever copies it.
    script = tmp_path / SCRIPT.name
    script.write_bytes(f"# -*- coding: latin-1 -*-\n{SCRIPT.read_text()}".encode("latin-1"))
    run.submit("--script", str(script), "--", "--stones", "s")
    ended = run.wait()
    assert (ended.state, ended.attempts) == ("failed", 1)
    assert "WrongArgumentsError" in ended.reason
    assert "comes again at every start" in ended.reason

    milestones = tmp_path / "milestones"
    milestones.mkdir()
    run.submit("--resume", "--", "--milestones", str(milestones))
    ended = run.wait()
    verdicts = [(attempt.verdict() or {})["verdict"] for attempt in run.run.attempts()]
    assert verdicts == ["crashed", "hung", "crashed"], ended
    # Its own fourth step, not the second one that the script names.
    assert "began at 0" in run.run.attempts()[1].log_file(0).read_text()
    assert "began at 4" in run.log()
    assert ended.state == "failed"
    assert "EndedEarlyError: the script ended after step 6 of 10, which is saved" in ended.reason
    assert "--set training.max_steps=6" in ended.reason
    assert (ended.step, ended.loss) == (6, None)
    # What a script saves in a place of its own is not the recipe's to remove.
    assert sorted(path.name for path in milestones.glob("step-*")) == [f"step-{step}" for step in range(1, 7)]
    assert run.steps == [4, 6]
