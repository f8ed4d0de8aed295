"""What a run is doing, where no Slurm is needed to tell."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine
from titan_slurm.cluster import local
from titan_slurm.cluster.state import RunStatus, status, statuses
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import append_json_line, write_json

MakeRun = Callable[..., RunDirectory]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]

# No process has it: Linux gives out no more than 2 ** 22.
GONE = 2**22 + 1


def submitted(run: RunDirectory, cluster: str = "local", process: int = GONE) -> RunDirectory:
    """The run, with the record of a job."""
    started = local.started(process) if process != GONE else 1.0
    job = {"job_id": str(process), "cluster": cluster, "time": 1.0}
    run.add_job(job if cluster == "slurm" else job | {"process_started": started})
    return run


def attempted(run: RunDirectory, number: int = 1) -> Attempt:
    """A new attempt of the run's last job."""
    attempt = Attempt(run.attempts_folder / f"{number:04d}")
    attempt.path.mkdir(parents=True)
    facts = {"job_id": run.jobs()[-1]["job_id"], "nodes": "n1", "restart_count": 0, "saved_step": 0}
    write_json(attempt.path / "attempt.json", facts)
    attempt.set_hosts(["n1", "n1"])
    return attempt


def shown(found: RunStatus) -> tuple[str, str | None, str]:
    return found.state, found.verdict, found.reason


@pytest.fixture
def run(make_run: MakeRun) -> RunDirectory:
    return make_run(cluster="local")


def test_created(run: RunDirectory) -> None:
    found = status(run)
    assert shown(found) == ("created", None, "")
    assert (found.job_id, found.attempts, found.step, found.loss, found.is_active) == (None, 0, 0, None, False)


def test_a_job_of_another_machine_is_not_taken_for_gone(run: RunDirectory) -> None:
    run.add_job({"job_id": str(GONE), "cluster": "local", "time": 1.0, "process_started": 1.0, "host": "elsewhere"})
    assert shown(status(run))[:2] == ("queued", None)
    assert status(run).reason.startswith("its job is one of machine elsewhere, and only there can be known")


def test_a_job_of_this_machine_that_runs(run: RunDirectory) -> None:
    submitted(run, process=os.getpid())
    assert shown(status(run)) == ("queued", None, "")
    attempt = attempted(run)
    append_json_line(run.metrics_file, {"step": 4, "loss": 2.5, "tokens_per_second": 10.0, "time": 1.0, "attempt": 1})
    found = status(run)
    assert shown(found) == ("running", None, "")
    assert (found.step, found.loss, found.attempts, found.nodes, found.is_active) == (4, 2.5, 1, "n1", True)
    attempt.give_verdict("crashed", "bad", again=True, why="")
    assert shown(status(run)) == ("requeued", "crashed", "bad")


def test_a_process_that_is_gone_without_a_word(run: RunDirectory) -> None:
    attempt = attempted(submitted(run))
    expected = ("failed", "crashed", "the job's process is gone and left no word")
    assert shown(status(run)) == expected
    # What was found out is kept, and is found again.
    assert (attempt.verdict() or {})["verdict"] == "crashed"
    assert shown(status(run)) == expected


def test_what_is_found_out_later_says_so_and_is_an_event(cli: CommandLine, run: RunDirectory) -> None:
    attempt = attempted(submitted(run))
    for time, event in ((10.0, "started"), (70.0, "checkpoint_loaded")):
        append_json_line(run.events_file, {"time": time, "event": event, "by": "rank 0", "attempt": 1})
    # Whoever looks again finds out nothing new.
    for _ in range(2):
        assert status(run).state == "failed"
    found = attempt.verdict() or {}
    assert (found["late"], found["saved_step"]) == (True, 0)
    [told] = [line for line in run.events() if line["event"] == "verdict"]
    assert (told["verdict"], told["late"], told["by"], told["attempt"]) == ("crashed", True, "command", 1)
    # Nobody knows of more than its last sign of life; what came then until somebody looked is no time of the run's.
    [row] = json.loads(cli("report", "mine", "--json").out)["attempts"]
    assert (row["begin"], row["end"], row["parts"]) == (10.0, 70.0, {"start_up": 60.0})


def test_a_local_run_that_is_cancelled_has_an_event(cli: CommandLine, run: RunDirectory) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        attempt = attempted(submitted(run, process=process.pid))
        assert cli("cancel", "mine").code == 0
    [told] = [line for line in run.events() if line["event"] == "verdict"]
    assert (told["verdict"], told["by"], (attempt.verdict() or {})["verdict"]) == ("cancelled", "command", "cancelled")
    assert "late" not in told


def test_a_process_that_is_gone_before_its_first_attempt(run: RunDirectory) -> None:
    assert shown(status(submitted(run))) == ("failed", "crashed", "the job's process is gone and left no word")


def test_a_process_id_that_another_process_has_by_now(run: RunDirectory) -> None:
    run.add_job({"job_id": str(os.getpid()), "cluster": "local", "time": 1.0, "process_started": 1.0})
    assert status(run).state == "failed"


@pytest.mark.parametrize(
    ("verdict", "more", "expected"),
    [
        ("completed", {"again": False}, ("completed", "completed", "because")),
        ("cancelled", {"again": False}, ("cancelled", "cancelled", "because")),
        ("crashed", {"again": False, "why": "mend it"}, ("failed", "crashed", "because; mend it")),
        ("preempted", {}, ("failed", "preempted", "because")),
        # It was to come back, and somebody has killed the process that was to start it.
        ("crashed", {"again": True}, ("failed", "crashed", "the job's process is gone and left no word")),
    ],
)
def test_a_process_that_is_gone_with_a_verdict(
    run: RunDirectory, verdict: str, more: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    attempt = attempted(submitted(run))
    attempt.give_verdict(verdict, "because", **more)
    before = attempt.verdict()
    assert shown(status(run)) == expected
    assert attempt.verdict() == before


@pytest.mark.parametrize("started", [True, False])
def test_a_wish_to_cancel(run: RunDirectory, started: bool) -> None:
    submitted(run)
    if started:
        attempted(run)
    run.cancel({"time": 1.0, "job_id": str(GONE), "user": "ada"})
    assert shown(status(run)) == ("cancelled", "cancelled", "by ada")
    # It was about that job.
    run.add_job({"job_id": str(GONE + 1), "cluster": "local", "time": 2.0, "process_started": 1.0})
    assert status(run).state == "failed"


def test_an_attempt_that_finished_and_was_killed_before_it_could_say_so(run: RunDirectory) -> None:
    attempted(submitted(run)).finish(60)
    assert shown(status(run)) == ("completed", "completed", "all 60 steps done")


def test_only_attempts_of_the_last_job_say_what_it_is_doing(run: RunDirectory) -> None:
    attempted(submitted(run)).give_verdict("crashed", "long ago", again=False)
    submitted(run, process=os.getpid())
    found = status(run)
    assert shown(found) == ("queued", None, "")
    assert found.attempts == 1


@pytest.mark.parametrize(
    ("in_squeue", "in_sacct", "attempt", "expected"),
    [
        ("PENDING|Priority", "", False, ("queued", None, "Priority")),
        ("PENDING|BeginTime", "", True, ("requeued", None, "BeginTime")),
        ("RUNNING|None", "", True, ("running", None, "")),
        ("COMPLETING|None", "", True, ("stopping", None, "")),
        ("TIMEOUT|TimeLimit", "", True, ("failed", "time_limit", "Slurm says TIMEOUT")),
        ("CANCELLED|None", "", False, ("cancelled", "cancelled", "Slurm says CANCELLED")),
        ("", "NODE_FAIL|n1", True, ("failed", "node_failure", "Slurm says NODE_FAIL")),
        ("", "CANCELLED by 0|n1", True, ("cancelled", "cancelled", "Slurm says CANCELLED")),
        ("", "OUT_OF_MEMORY|n1", False, ("failed", "crashed", "Slurm says OUT_OF_MEMORY")),
        ("", "", True, ("failed", "crashed", "Slurm says nothing any more")),
        # The controller has lost its state, and nobody told accounting.
        ("", "RUNNING|n1", True, ("failed", "crashed", "Slurm says nothing any more")),
    ],
)
def test_what_slurm_says(
    make_run: MakeRun,
    fake_command: FakeCommand,
    in_squeue: str,
    in_sacct: str,
    attempt: bool,
    expected: tuple[str, str | None, str],
) -> None:
    run = submitted(make_run(), "slurm")
    if attempt:
        attempted(run)
    fake_command("squeue", f"echo '{GONE}|{in_squeue}|n1'" if in_squeue else "echo 'Invalid job id' >&2; exit 1")
    fake_command("sacct", f"echo '{GONE}|{in_sacct}'" if in_sacct else "exit 1")
    assert shown(status(run)) == expected


def test_a_controller_that_does_not_answer_changes_nothing(make_run: MakeRun, fake_command: FakeCommand) -> None:
    run = submitted(make_run(), "slurm")
    attempt = attempted(run)
    fake_command("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    found = status(run)
    assert (found.state, found.is_active) == ("running", True)
    assert "does not answer" in found.reason
    assert attempt.verdict() is None


def test_many_runs_are_one_question(make_run: MakeRun, fake_command: FakeCommand) -> None:
    calls = fake_command("squeue", "exit 0")
    runs = [submitted(make_run(name=name), "slurm", GONE) for name in ("a", "b", "c")]
    assert [found.name for found in statuses(runs)] == ["a", "b", "c"]
    assert len(calls()) == 1


def test_a_run_that_cannot_be_read_is_in_nobodys_way(cli: CommandLine, make_run: MakeRun) -> None:
    make_run(name="good", cluster="local")
    for name, text in {"torn": '{"schema": 1, "na', "newer": '{"schema": 99}', "list": "[]"}.items():
        folder = Path("runs", name)
        folder.mkdir()
        (folder / "plan.json").write_text(text)
    for arguments in ((), ("--json",)):
        outcome = cli("status", *arguments)
        assert outcome.code == 0
        assert "good" in outcome.out
        notes = [line for line in outcome.err.splitlines() if line.startswith("note: ")]
        assert [Path(note.split(":")[1].strip()).parent.name for note in notes] == ["list", "newer", "torn"]
    assert cli("status", "torn").code == 2


def test_status_for_programs(cli: CommandLine, run: RunDirectory) -> None:
    attempted(submitted(run)).give_verdict("completed", "all 60 steps done", again=False)
    one = json.loads(cli("status", "mine", "--json").out)
    assert one.keys() >= {
        "name",
        "path",
        "state",
        "verdict",
        "job_id",
        "cluster",
        "step",
        "max_steps",
        "loss",
        "tokens_per_second",
        "attempts",
    }
    assert json.loads(cli("status", "--json").out) == [one]
