"""A run that waits for others: what sbatch is told, and what cannot be waited for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine
from titan_slurm.run.attempt import new_attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json

MakeRun = Callable[..., RunDirectory]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]

ACCEPTS = 'case "$*" in *--test-only*) exit 1;; *) echo Submitted batch job 99;; esac'


@pytest.fixture
def sbatch(cli: CommandLine, make_run: MakeRun, fake_command: FakeCommand) -> Callable[..., str]:
    """`sbatch("--after", "one", …)`: what a submission with these options tells sbatch, or its mistakes. Of the runs
    that there are, `one` and `two` are in the queue, the latter as a chain; others have ended as they are called."""
    for name, job_id in (("one", "1"), ("two", "2"), ("completed", "4"), ("failed", "5"), ("cancelled", "6")):
        run = make_run(name=name)
        run.add_job(
            {"job_id": job_id, "cluster": "slurm", "time": 0.0} | ({"chain": ["2", "3"]} if name == "two" else {})
        )
        if name == "completed":
            attempt = new_attempt(run.attempts_folder)
            write_json(attempt.path / "attempt.json", {"job_id": job_id})
            attempt.give_verdict(name, "all steps done")
    make_run(name="created")
    ended = r"4|COMPLETED|None|\n5|FAILED|None|\n6|CANCELLED|None|\n"
    fake_command("squeue", rf"printf '1|RUNNING|None|n1\n2|RUNNING|None|n2\n3|PENDING|Dependency|\n{ended}'")
    calls = fake_command("sbatch", ACCEPTS)

    def submit(*options: str) -> str:
        before = len(calls())
        outcome = cli("submit", "llama3_debug", "--name", "mine", *options, "--cluster", "slurm")
        told = [call for call in calls()[before:] if "--test-only" not in call]
        if outcome.code:
            assert not told
            assert not Path("runs/mine").exists()
            return "\n".join(outcome.errors)
        [line] = told
        return line.removesuffix(f" {Path('runs/mine/job.sh').absolute()}") + outcome.err

    return submit


def test_it_waits_for_the_jobs_of_the_runs(sbatch: Callable[..., str]) -> None:
    # Of a chain the last job; by a job's id as well as by the run's name.
    told = sbatch(
        "--after", "one", "--after", "two", "--after-any", "1", "--after", "completed", "--after-any", "failed"
    )
    assert told.startswith("--dependency=afterok:1:3,afterany:1")
    assert "note: --after completed: it has ended (completed), nothing is left to wait for" in told
    assert "note: --after-any failed: it has ended (failed), nothing is left to wait for" in told
    # By the same script a later job may be submitted, when nobody knows those any more.
    assert "--dependency" not in Path("runs/mine/job.sh").read_text()


def test_it_waits_for_what_the_recipe_says_too(sbatch: Callable[..., str]) -> None:
    told = sbatch("--after", "one", "--set", "slurm.sbatch.dependency='singleton'")
    assert told.startswith("--dependency=singleton,afterok:1")


def test_where_nothing_is_left_to_wait_for_it_does_not_wait(sbatch: Callable[..., str]) -> None:
    assert "--dependency" not in sbatch("--after", "completed")


def test_what_cannot_be_waited_for(sbatch: Callable[..., str]) -> None:
    assert "--after ones: no run 'ones' in " in sbatch("--after", "ones", "--after", "one")
    named = ("failed", "cancelled", "created")
    assert sbatch(*(word for name in named for word in ("--after", name)), "--after-any", "created").splitlines() == [
        "--after failed: it is failed, and will not complete (go on with it first, or use --after-any)",
        "--after cancelled: it is cancelled, and will not complete (go on with it first, or use --after-any)",
        "--after created: it was never submitted (submit it first)",
        "--after-any created: it was never submitted (submit it first)",
    ]
