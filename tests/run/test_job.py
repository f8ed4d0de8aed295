"""What Slurm says of a job, as it really said it (Slurm 22.05.8; `tests/data/scontrol_*.txt`)."""

import calendar
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from titan_slurm.run import job
from titan_slurm.run.job import JobFacts

DATA = Path(__file__).resolve().parents[1] / "data"

FakeCommand = Callable[[str, str], Callable[[], list[str]]]


@pytest.fixture(autouse=True)
def two_hours_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slurm's times are the machine's own."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "TEST-2")
        time.tzset()
        yield
    time.tzset()


def read(name: str) -> JobFacts:
    return job.parse((DATA / f"scontrol_{name}.txt").read_text())


def at(hour: int, minute: int, second: int) -> float:
    """On the day of the recordings, in the zone of these tests."""
    return calendar.timegm((2026, 11, 22, hour - 2, minute, second))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("running", JobFacts("RUNNING", 0, at(16, 29, 30), None)),
        # Its time limit is another: the end of the grace time has taken its place.
        ("preempted", JobFacts("RUNNING", 0, at(16, 20, 0), at(16, 19, 30))),
        ("cancelled", JobFacts("COMPLETING", 0, at(16, 19, 31), at(16, 19, 30))),
        # Without grace time. The end is that of a start to come.
        ("requeued", JobFacts("COMPLETING", 1, at(16, 30, 7), None)),
        ("time_limit", JobFacts("COMPLETING", 0, at(16, 26, 10), None, "TimeLimit")),
    ],
)
def test_a_line_of_scontrol(name: str, facts: JobFacts) -> None:
    assert read(name) == facts


@pytest.mark.parametrize("text", ["", "slurm_load_jobs error: Invalid job id specified\n", "No jobs in the system\n"])
def test_what_is_no_jobs_description(text: str) -> None:
    with pytest.raises(ValueError, match="not a job's description"):
        job.parse(text)


def test_times_that_slurm_does_not_know() -> None:
    assert job.parse("JobId=1 JobState=PENDING StartTime=Unknown EndTime=Unknown") == JobFacts("PENDING", 0, None, None)


def test_nobody_is_asked_outside_a_job(fake_command: FakeCommand) -> None:
    calls = fake_command("scontrol", f"cat {DATA}/scontrol_running.txt")
    assert job.ask() is None
    assert job.requeue(0, None) == "this is not a Slurm job"
    assert calls() == []


def test_where_there_is_no_scontrol(
    clean_environment: Path,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", "/nonexistent")
    # Also with patience: a program does not come by waiting.
    assert job.ask(patience_s=1e9) is None
    assert job.past_state("1", 0) == ""


@pytest.mark.parametrize("script", ["echo error >&2; exit 1", "exit 0", "echo nonsense"])
def test_where_scontrol_has_no_answer(fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    fake_command("scontrol", script)
    assert job.ask() is None


def test_what_slurm_says_of_this_job(fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    calls = fake_command("scontrol", f"cat {DATA}/scontrol_preempted.txt")
    assert job.ask() == read("preempted")
    assert calls() == ["show job --oneliner 1"]


def test_what_a_user_has_set_for_people_to_read_is_not_for_us(
    fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    fake_command("scontrol", f'[ "$SLURM_TIME_FORMAT" = standard ] && cat {DATA}/scontrol_preempted.txt')
    assert job.ask() == read("preempted")


def test_the_deadline_of_a_job_that_runs_is_its_end() -> None:
    assert job.deadline(read("running")) == at(16, 29, 30)
    assert job.deadline(read("preempted")) == at(16, 20, 0)


@pytest.mark.parametrize("name", ["cancelled", "requeued", "time_limit"])
@pytest.mark.parametrize(
    ("script", "seconds"),
    [("printf 'KeepAliveTime = 7\\nKillWait                = 12 sec\\n'", 12.0), ("exit 1", 30.0)],
)
def test_the_deadline_of_a_job_that_ends_is_killwait_after_its_signal(
    fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch, name: str, script: str, seconds: float
) -> None:
    fake_command("scontrol", script)
    monkeypatch.setattr(time, "time", lambda: 5000.0)
    assert job.deadline(read(name)) == 5000.0 + seconds


@pytest.mark.parametrize(("value", "deadline"), [("1700000000", 1700000000.0), ("", None), ("soon", None)])
@pytest.mark.usefixtures("clean_environment")
def test_the_deadline_where_slurm_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, value: str, deadline: float | None
) -> None:
    assert job.deadline(None) is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", value)
    assert job.deadline(None) == deadline


def test_how_earlier_starts_ended(fake_command: FakeCommand) -> None:
    calls = fake_command("sacct", "echo PREEMPTED; echo REQUEUED; echo 'CANCELLED by 0'")
    assert [job.past_state("3", start) for start in range(4)] == ["PREEMPTED", "REQUEUED", "CANCELLED", ""]
    assert set(calls()) == {"--noheader --parsable2 --allocations --format=State --duplicates --jobs=3"}
    fake_command("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert job.past_state("3", 0) == ""


@pytest.fixture
def sigterm_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    # Here one that has come is dropped.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_as_before")
def test_a_requeue(fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    # Slurm ends the job as soon as it has understood, and what is left to say must still be said.
    calls = fake_command("scontrol", '[ "$1" = requeue ] && kill -TERM $PPID; exit 0')
    assert job.requeue(30.4, ["n1", "n7"]) == ""
    show = "show job --oneliner 1"
    asked = [show, "requeue 1", "update JobId=1 ExcNodeList=n1,n7", show, "update JobId=1 StartTime=now+30"]
    assert calls() == asked


@pytest.mark.usefixtures("sigterm_as_before")
def test_a_requeue_never_starts_sooner_than_slurm_means_to(
    fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    # Sooner, Slurm still refuses the job's credentials, and the start ends as FAILED.
    calls = fake_command("scontrol", "echo JobId=1 JobState=RUNNING StartTime=2099-01-01T00:00:00")
    assert job.requeue(30, None) == ""
    assert calls() == ["show job --oneliner 1", "requeue 1", "show job --oneliner 1"]


@pytest.mark.usefixtures("sigterm_as_before")
def test_a_requeue_that_slurm_refuses(fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    calls = fake_command("scontrol", "echo 'Requested operation is presently disabled' >&2; exit 1")
    assert job.requeue(30, ["n1"]) == "Requested operation is presently disabled"
    assert calls() == ["show job --oneliner 1", "requeue 1"]


@pytest.mark.usefixtures("sigterm_as_before")
@pytest.mark.parametrize(
    ("state", "asked"),
    [
        # The controller was too busy.
        ("JobState=RUNNING Restarts=0", ["requeue 1", "requeue 1", "update JobId=1 ExcNodeList=n1"]),
        # It had heard it, and could not say so in time.
        ("JobState=PENDING Restarts=1", ["requeue 1", "update JobId=1 ExcNodeList=n1"]),
        # A user has cancelled the job meanwhile.
        ("JobState=COMPLETING Restarts=0", ["requeue 1"]),
    ],
)
def test_a_requeue_that_is_not_answered_in_time(
    fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, asked: list[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(job, "_TURN_S", 0.0)
    tried, busy = tmp_path / "tried", "Socket timed out on send/recv operation"
    calls = fake_command(
        "scontrol",
        f'[ "$1" = show ] && {{ [ -e {tried} ] && echo {state} || echo JobState=RUNNING Restarts=0; exit; }}\n'
        f'[ "$1" = update ] || [ -e {tried} ] || {{ : > {tried}; echo {busy} >&2; exit 1; }}',
    )
    assert job.requeue(0, ["n1"]) == ""
    assert [call for call in calls() if not call.startswith("show")] == asked


def test_a_job_that_is_cancelled_before_its_own_requeue_stays_cancelled(
    fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    calls = fake_command("scontrol", f'[ "$1" = show ] && kill -TERM $PPID; cat {DATA}/scontrol_running.txt')
    # By itself, as it is in a batch script: a thread of another's might take the signal.
    program = "from titan_slurm.run import job; print(repr(job.requeue(0, None)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("''\n", "")
    assert calls() == ["show job --oneliner 1"]


def test_a_scontrol_that_hangs(clean_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    def hang(*_: object, **options: float) -> None:
        raise subprocess.TimeoutExpired("scontrol", options["timeout"])

    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(shutil, "which", lambda _: "scontrol")
    monkeypatch.setattr(subprocess, "run", hang)
    assert job.ask() is None
