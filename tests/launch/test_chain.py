"""A chain of jobs for one run: what is submitted, and what is left where one of them is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CommandLine

FakeCommand = Callable[[str, str], Callable[[], list[str]]]

# Numbers its jobs by how often it was called.
COUNTS = 'case "$*" in *--test-only*) exit 1;; esac\nprintf x >> count; number=$(cat count); number=${#number}\n'
ACCEPTS = COUNTS + "echo Submitted batch job $number"


def test_each_job_follows_the_one_before(cli: CommandLine, fake_command: FakeCommand) -> None:
    calls, said = fake_command("sbatch", ACCEPTS), fake_command("scontrol", "")
    outcome = cli("submit", "llama3_debug", "--name", "mine", "--chain", "3", "--cluster", "slurm")
    assert outcome.code == 0, outcome.err
    script = Path("runs/mine/job.sh").absolute()
    assert [call for call in calls() if "--test-only" not in call] == [
        f"--hold {script}",
        f"--dependency=afterany:1 {script}",
        f"--dependency=afterany:2 {script}",
    ]
    assert said()[-1] == "release 1"
    jobs = [json.loads(line) for line in Path("runs/mine/jobs.jsonl").read_text().splitlines()]
    assert [(job["job_id"], job["chain"]) for job in jobs] == [(each, ["1", "2", "3"]) for each in ("1", "2", "3")]
    for each in ("1", "2", "3"):
        assert Path(f"runs/mine/submitit/{each}_submitted.pkl").exists()


def test_if_one_is_refused_none_stays(cli: CommandLine, fake_command: FakeCommand) -> None:
    fake_command("sbatch", COUNTS + "[ $number = 3 ] && { echo no more >&2; exit 1; }\n" + ACCEPTS.removeprefix(COUNTS))
    cancelled, said = fake_command("scancel", ""), fake_command("scontrol", "")
    outcome = cli("submit", "llama3_debug", "--name", "mine", "--chain", "3", "--cluster", "slurm")
    assert outcome.code == 2
    assert outcome.errors == ["sbatch refused the job: no more"]
    assert cancelled() == ["1 2"]
    assert "release" not in " ".join(said())
    assert list(Path("runs").iterdir()) == []


def test_a_local_run_needs_no_chain(cli: CommandLine) -> None:
    outcome = cli("submit", "llama3_debug", "--chain", "3", "--cluster", "local")
    assert outcome.errors == ["--chain: only jobs of Slurm's follow each other (a local run comes back by itself)"]
    assert not Path("runs").exists()


@pytest.mark.parametrize("of_profile", [True, False])
def test_a_job_that_is_to_be_held_begins_no_chain(
    cli: CommandLine, fake_command: FakeCommand, of_profile: bool
) -> None:
    calls = fake_command("sbatch", ACCEPTS)
    Path("clusters").mkdir()
    Path("clusters/hpc.toml").write_text(f"[slurm.sbatch]\nhold = {str(of_profile).lower()}\n")
    hold = [] if of_profile else ["--set", "slurm.sbatch.hold=true"]
    outcome = cli("submit", "llama3_debug", "--name", "mine", "--chain", "3", "--cluster", "hpc", *hold)
    assert (outcome.code, outcome.errors) == (
        2,
        [
            "--chain: slurm.sbatch.hold is given, and the first job of a chain is released once all are submitted "
            "(leave one of them out)"
        ],
    )
    assert [call for call in calls() if "--test-only" not in call] == []
    assert not Path("runs").exists()
