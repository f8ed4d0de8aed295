"""How an attempt begins and ends: what the batch script calls around the ranks."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from titan_slurm.run import leave, nodes, verdict
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_json

PROGRAM = (sys.executable, "-m", "titan_slurm.run")
DATA = Path(__file__).resolve().parents[1] / "data"

MakeRun = Callable[..., RunDirectory]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]


@pytest.fixture(autouse=True)
def handler_of_sigterm() -> Iterator[None]:
    """`end` ignores SIGTERM from where it has told Slurm to end the job; the tests must not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run(make_run: MakeRun) -> RunDirectory:
    """A run on Slurm, with nobody to ask about it."""
    return make_run()


@pytest.fixture
def attempt(run: RunDirectory) -> Attempt:
    """Its first attempt."""
    return leave.begin(run)


@pytest.fixture
def in_job(fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:  # noqa: ARG001
    """`in_job("1", restarts=2)`: from here on the test is the batch script of that job, and no real Slurm answers."""

    def enter(job_id: str, restarts: int = 0) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))

    return enter


def given(attempt: Attempt) -> dict[str, Any]:
    """An attempt's verdict, which it must have."""
    found = attempt.verdict()
    assert found is not None
    return found


def describes_job(file: str, requeue: str = "exit 0") -> str:
    """A scontrol that describes the job as the real one once did."""
    return f'case "$1" in show) cat {DATA / file};; requeue) {requeue};; esac'


def test_attempts_that_begin_at_once_have_folders_of_their_own(run: RunDirectory) -> None:
    started = [subprocess.Popen([*PROGRAM, "begin", run.path], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    printed = sorted(process.communicate()[0] for process in started)
    assert printed == [f"{run.path}/attempts/{number:04d}\n" for number in range(1, 5)]
    assert [each.number for each in run.attempts()] == [1, 2, 3, 4]


def test_numbers_go_on_after_a_gap_and_beyond_four_digits(run: RunDirectory) -> None:
    for number in ("0001", "9999"):
        (run.attempts_folder / number).mkdir(parents=True)
    assert leave.begin(run).number == 10_000
    assert [each.number for each in run.attempts()] == [1, 9999, 10_000]


def test_an_attempt_knows_its_job(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "n1",
    }.items():
        monkeypatch.setenv(name, value)
    facts = leave.begin(run).facts()
    assert (facts["job_id"], facts["nodes"], facts["restart_count"], facts["host"]) == ("4711", "n[1-2]", 3, "n1")
    assert facts["saved_step"] == 0


def test_a_run_that_is_gone_is_not_made_again(clean_environment: Path) -> None:
    gone = clean_environment / "gone"
    done = subprocess.run([*PROGRAM, "begin", gone], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""
    assert not gone.exists()


@pytest.mark.parametrize(
    ("finished", "error", "exit_code", "verdict", "reason", "left_with"),
    [
        (True, False, 0, "completed", "all 60 steps done", 0),
        # All is saved, exported and said by then.
        (True, True, 1, "completed", "all 60 steps done", 0),
        (True, False, 139, "completed", "all 60 steps done", 0),
        (False, True, 1, "crashed", "rank 1 on n1: ValueError: bad; without a word: rank 0", 1),
        # The job must not look as if it had done its work.
        (False, False, 0, "crashed", "the ranks left without an error before the last step", 1),
        (False, False, 3, "crashed", "a rank left with exit code 3 and without an error", 3),
        (
            False,
            False,
            137,
            "crashed",
            "a rank was killed by SIGKILL (out of memory, perhaps) before it could say why",
            137,
        ),
    ],
)
def test_the_verdict(
    run: RunDirectory,
    attempt: Attempt,
    monkeypatch: pytest.MonkeyPatch,
    finished: bool,
    error: bool,
    exit_code: int,
    verdict: str,
    reason: str,
    left_with: int,
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    if finished:
        attempt.finish(60)
    if error:
        attempt.report_error(1, "ValueError: bad", "Traceback …", step=7)
    done = subprocess.run([*PROGRAM, "end", run.path, attempt.path, str(exit_code)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (left_with, ""), done.stderr
    found = given(attempt)
    assert (found["verdict"], found["reason"]) == (verdict, reason)
    # Nobody is there who could start it again.
    assert not found["again"]
    assert ("brings the run back" in found["why"]) == (verdict == "crashed")


def test_the_first_verdict_stands(attempt: Attempt) -> None:
    attempt.give_verdict(verdict.CANCELLED, "by ada")
    attempt.give_verdict(verdict.CRASHED, "Slurm says FAILED")
    assert (given(attempt)["verdict"], given(attempt)["reason"]) == ("cancelled", "by ada")
    assert sorted(path.name for path in attempt.path.iterdir()) == ["attempt.json", "verdict.json"]


def test_of_verdicts_given_at_once_one_stands(attempt: Attempt) -> None:
    statement = (
        "import sys; from pathlib import Path; from titan_slurm.run.attempt import Attempt\n"
        f"attempt = Attempt(Path({str(attempt.path)!r})); print('ready', flush=True); sys.stdin.readline()\n"
        "attempt.give_verdict(sys.argv[1], sys.argv[1]); print(attempt.verdict()['verdict'])"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", statement, word], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for word in ("crashed", "cancelled", "preempted")
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    # Whoever has written, or has found that another was first, reads the same.
    assert {process.communicate()[0] for process in started} == {f"{given(attempt)['verdict']}\n"}


def test_errors_are_in_the_order_of_time(attempt: Attempt) -> None:
    assert attempt.errors() == []
    # The others fail because a rank that they wait for is gone, and may well be quicker to write.
    for rank, seconds in ((0, 30.5), (1, 10.5), (2, 9.75), (10, 20.0)):
        value = {"rank": rank, "error": f"of rank {rank}", "traceback": "", "time": seconds, "host": "n1"}
        write_json(attempt.path / f"error_rank_{rank}.json", value)
    assert [error["rank"] for error in attempt.errors()] == [2, 1, 10, 0]


def test_logs_are_in_the_order_of_ranks(attempt: Attempt) -> None:
    for rank in (10, 2, 0):
        attempt.log_file(rank).touch()
    assert list(attempt.log_files()) == [0, 2, 10]


def test_anything_else_shows_the_usage(clean_environment: Path) -> None:
    done = subprocess.run(PROGRAM, capture_output=True, text=True, cwd=clean_environment)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python -m titan_slurm.run begin RUN")


def test_a_crashed_attempt_is_requeued_after_a_delay(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand
) -> None:
    in_job("1")
    calls = fake_command("scontrol", describes_job("scontrol_running.txt"))
    attempt = leave.begin(run)
    assert leave.end(run, attempt, 1) == 1
    show = "show job --oneliner 1"
    # Once for the verdict, and once more at the last moment.
    assert calls() == [show, show, "requeue 1", show, "update JobId=1 StartTime=now+30"]
    assert (given(attempt)["again"], given(attempt)["delay_s"]) == (True, 30)


def test_a_full_disk_does_not_keep_a_run_from_coming_back(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand, capsys: pytest.CaptureFixture[str]
) -> None:
    in_job("1")
    calls = fake_command("scontrol", describes_job("scontrol_running.txt"))
    attempt = leave.begin(run)
    # Nothing can be written here any more.
    shutil.rmtree(attempt.path)
    assert leave.end(run, attempt, 1) == 1
    assert "requeue 1" in calls()
    assert "the verdict, crashed (a rank left with exit code 1 and without an error), cannot be written" in (
        capsys.readouterr().err
    )


def test_on_a_single_machine_a_run_that_is_not_to_come_back_leaves_with_another_code(make_run: MakeRun) -> None:
    run = make_run("requeue.enabled=false", cluster="local")
    attempt = leave.begin(run)
    attempt.stop("SIGTERM", 5, saved=True)
    assert leave.end(run, attempt, verdict.STOPPED_EXIT_CODE) == 1


def test_a_node_where_no_attempt_could_begin_is_left_out(run: RunDirectory, in_job: Callable[..., None]) -> None:
    in_job("1")
    (run.path / "setup_failed.1").write_text("n1\tactivating /shared/venv\nn3\tactivating /shared/venv\n")
    leave.begin(run)
    assert nodes.excluded(run) == ["n1", "n3"]
    assert run.setup_failures("1") == []


def test_a_job_of_an_array_names_itself_alone(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By its plain id the last task of an array has the name of the whole array.
    in_job("9")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "9")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    calls = fake_command("scontrol", describes_job("scontrol_running.txt"))
    leave.end(run, leave.begin(run), 1)
    assert [line.split()[-1 if "update" not in line else 1] for line in calls()] == [*["9_1"] * 4, "JobId=9_1"]


@pytest.mark.parametrize(
    ("file", "verdict", "again"),
    [
        ("scontrol_requeued.txt", "preempted", True),
        ("scontrol_cancelled.txt", "cancelled", False),
        ("scontrol_time_limit.txt", "time_limit", False),
    ],
)
def test_what_slurm_has_decided_is_not_decided_again(
    run: RunDirectory,
    in_job: Callable[..., None],
    fake_command: FakeCommand,
    file: str,
    verdict: str,
    again: bool,
) -> None:
    in_job("1")
    attempt = leave.begin(run)
    attempt.stop("SIGTERM", 5, saved=True)
    calls = fake_command("scontrol", describes_job(file))
    assert leave.end(run, attempt, 85) == 85
    assert calls() == ["show job --oneliner 1"]
    assert (given(attempt)["verdict"], given(attempt)["again"]) == (verdict, again)


def test_a_preempted_job_that_cannot_requeue_itself_stays_until_slurm_does(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job("1")
    attempt = leave.begin(run)
    attempt.stop("SIGTERM", 5, saved=True)
    fake_command(
        "scontrol", describes_job("scontrol_preempted.txt", requeue="echo Access/permission denied >&2; exit 1")
    )
    while_waiting: list[dict[str, Any]] = []
    # subprocess sleeps too, for milliseconds, while a command takes its time.
    monkeypatch.setattr(time, "sleep", lambda seconds: while_waiting.append(given(attempt)) if seconds > 1 else None)
    assert leave.end(run, attempt, 85) == 85
    why = "cannot requeue (Access/permission denied): `scontrol requeue 1` brings the run back"
    assert [(found["again"], found["why"]) for found in while_waiting] == [(True, why)]
    # Slurm did not, or this would not be here.
    assert (given(attempt)["again"], given(attempt)["why"]) == (False, why)


def test_a_controller_that_is_being_started_again_is_waited_for(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job("1")
    attempt = leave.begin(run)
    fake_command("scontrol", "exit 1")
    monkeypatch.setattr(time, "sleep", lambda _: fake_command("scontrol", describes_job("scontrol_running.txt")))
    leave.end(run, attempt, 1)
    assert given(attempt)["again"]


def test_a_cancelled_run_does_not_come_back(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand
) -> None:
    in_job("1")
    attempt = leave.begin(run)
    calls = fake_command("scontrol", describes_job("scontrol_preempted.txt"))
    run.cancel({"time": 0, "job_id": "1", "user": "ada"})
    assert leave.end(run, attempt, 85) == 85
    assert calls() == ["show job --oneliner 1"]
    assert (given(attempt)["verdict"], given(attempt)["again"]) == ("cancelled", False)
    # And if the wish comes while Slurm is already told to start it again, the next attempt ends before it begins.
    with pytest.raises(SystemExit, match="ada has cancelled this run"):
        leave.begin(run)
    assert len(run.attempts()) == 1
    # A wish is for one job.
    in_job("2")
    assert leave.begin(run).number == 2


SACCT = "echo PREEMPTED; echo NODE_FAIL; echo 'CANCELLED by 0'; echo RUNNING"


@pytest.mark.parametrize(
    ("restarts", "stopped_by", "sacct", "verdict", "again"),
    [
        (0, None, SACCT, "preempted", True),
        (0, "SIGTERM", SACCT, "preempted", True),
        (1, None, SACCT, "node_failure", True),
        (1, "SIGTERM", SACCT, "node_failure", True),
        # Cancelled, and brought back by the user's own `scontrol requeue`.
        (2, None, SACCT, "cancelled", False),
        # Accounting is behind, or there is none.
        (3, None, SACCT, "preempted", True),
        (9, None, SACCT, "preempted", True),
        (0, None, "exit 1", "preempted", True),
        (0, "SIGTERM", "exit 1", "preempted", True),
        (0, "SIGUSR2", "exit 1", "time_limit", True),
    ],
)
def test_an_attempt_whose_script_was_killed_gets_its_verdict_from_the_next(
    run: RunDirectory,
    in_job: Callable[..., None],
    fake_command: FakeCommand,
    restarts: int,
    stopped_by: str | None,
    sacct: str,
    verdict: str,
    again: bool,
) -> None:
    in_job("1", restarts)
    first = leave.begin(run)
    if stopped_by:
        first.stop(stopped_by, 5, saved=True)
    fake_command("sacct", sacct)
    in_job("1", restarts + 1)
    assert leave.begin(run).number == 2
    assert (given(first)["verdict"], given(first)["again"]) == (verdict, again)
    assert ("saved at step 5" in given(first)["reason"]) == (stopped_by is not None)


def test_an_attempt_of_another_job_was_not_brought_back_by_slurm(
    run: RunDirectory, in_job: Callable[..., None], fake_command: FakeCommand
) -> None:
    in_job("1")
    first = leave.begin(run)
    in_job("2")
    second = leave.begin(run)
    found = given(first)
    assert (found["verdict"], found["reason"], found["again"]) == ("crashed", "job 1 ended without a word", False)
    fake_command("sacct", "echo TIMEOUT")
    in_job("3")
    leave.begin(run)
    assert (given(second)["verdict"], given(second)["again"]) == ("time_limit", False)


def test_an_attempt_that_finished_is_completed_whatever_came_then(
    run: RunDirectory, in_job: Callable[..., None]
) -> None:
    in_job("1")
    first = leave.begin(run)
    first.finish(60)
    in_job("1", 1)
    leave.begin(run)
    assert (given(first)["verdict"], given(first)["again"]) == ("completed", False)


def test_a_spent_budget_holds_also_where_slurm_brings_the_job_back(
    make_run: MakeRun, in_job: Callable[..., None]
) -> None:
    run = make_run("requeue.stalled=2")
    for restarts in range(3):
        in_job("1", restarts)
        leave.begin(run)
    in_job("1", 3)
    with pytest.raises(SystemExit, match=r"more than 2 attempts without a new checkpoint"):
        leave.begin(run)
    assert len(run.attempts()) == 3
    found = given(run.attempts()[-1])
    assert (found["verdict"], found["again"]) == ("preempted", False)
    assert "[requeue] stalled = 2" in found["why"]
    # Whoever requeues it now has looked at it.
    in_job("1", 4)
    assert leave.begin(run).number == 4


def test_a_new_job_has_new_budgets(make_run: MakeRun, in_job: Callable[..., None], fake_command: FakeCommand) -> None:
    run = make_run("requeue.crashed=1")
    fake_command("scontrol", describes_job("scontrol_running.txt"))
    for job_id in ("1", "2"):
        again = []
        for restarts in range(2):
            in_job(job_id, restarts)
            attempt = leave.begin(run)
            leave.end(run, attempt, 1)
            again.append(given(attempt)["again"])
        assert again == [True, False]


def test_a_rank_that_died_without_a_word_costs_its_node_its_place(
    make_run: MakeRun, in_job: Callable[..., None], fake_command: FakeCommand
) -> None:
    run = make_run("slurm.nodes=2", "slurm.tasks_per_node=2")
    calls = fake_command("scontrol", describes_job("scontrol_running.txt"))
    for restarts in range(2):
        in_job("1", restarts)
        attempt = leave.begin(run)
        attempt.set_hosts(["n1", "n1", "n2", "n2"])
        for rank in range(3):
            attempt.report_error(rank, "RuntimeError: connection closed by peer", "", step=3)
        leave.end(run, attempt, 137)
    updates = [line for line in calls() if "ExcNodeList" in line]
    assert updates == ["update JobId=1 ExcNodeList=", "update JobId=1 ExcNodeList=n2"]
    assert list(read_json(run.nodes_file) or {}) == ["n2"]


def test_on_this_machine_the_script_starts_itself_again(
    make_run: MakeRun, in_job: Callable[..., None], fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Inside somebody else's job, which must be left alone.
    in_job("4711")
    monkeypatch.setenv("TITAN_SLURM_LOCAL_JOB_ID", "1")
    calls = fake_command("scontrol", describes_job("scontrol_requeued.txt"))
    run = make_run("requeue.crashed=1", "requeue.crash_delay=0", cluster="local")
    first = leave.begin(run)
    assert first.facts()["job_id"] == "1"
    assert leave.end(run, first, 1) == leave.AGAIN_EXIT_CODE
    assert leave.end(run, leave.begin(run), 1) == 1
    assert calls() == []
