"""`titan-slurm logs`: the cause first, one rank or all, one attempt or all that follow."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import CommandLine
from titan_slurm.cluster import local
from titan_slurm.run import leave
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory

MakeRun = Callable[..., RunDirectory]

RANK_0 = """\
[titan] 2026-11-22 20:21:03,100 - root - INFO - zero begins
[titan] 2026-11-22 20:21:05,900 - root - INFO - zero ends
  with a line more
"""
RANK_1 = """\
without a time
W1122 20:21:04.500000 11306 torch/somewhere.py:1] one begins
[titan] 2026-11-22 20:21:06,000 - root - INFO - one ends"""


@pytest.fixture
def run(cli: CommandLine, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:  # noqa: ARG001
    """A run of this very process, with one attempt."""
    made = make_run(cluster="local")
    process = os.getpid()
    made.add_job(
        {"job_id": str(process), "cluster": "local", "time": 1.0, "process_started": local.started(process), "host": ""}
    )
    monkeypatch.setenv("TITAN_SLURM_LOCAL_JOB_ID", str(process))
    attempted(made, RANK_0, RANK_1)
    return made


def attempted(run: RunDirectory, *logs: str) -> Attempt:
    attempt = leave.begin(run)
    for rank, text in enumerate(logs):
        attempt.log_file(rank).write_text(text)
    return attempt


def test_one_rank_or_all_in_the_order_of_time(cli: CommandLine, run: RunDirectory) -> None:
    assert run.exists()
    assert cli("logs", "mine").out == RANK_0
    assert cli("logs", "mine", "--rank", "1").out == f"{RANK_1}\n"
    zero, one = RANK_0.splitlines(), RANK_1.splitlines()
    merged = [f"1: {one[0]}", f"0: {zero[0]}", f"1: {one[1]}", f"0: {zero[1]}", f"0: {zero[2]}", f"1: {one[2]}"]
    assert cli("logs", "mine", "--all-ranks").out.splitlines() == merged


def test_the_cause_comes_before_the_log_and_the_others_are_counted(cli: CommandLine, run: RunDirectory) -> None:
    attempt = run.attempts()[-1]
    for rank in (0, 2, 3):
        line = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer"
        attempt.report_error(rank, line, f"Traceback (most recent call last):\n{line}\n", step=3)
    attempt.report_error(1, "ValueError: bad", "Traceback (most recent call last):\nValueError: bad\n", step=3)
    lines = cli("logs", "mine").out.splitlines()
    assert lines[0].startswith("=== first error: rank 1 on ")
    assert lines[1:5] == [
        "Traceback (most recent call last):",
        "ValueError: bad",
        "===",
        "=== then errors of 3 more: 0, 2, 3",
    ]
    assert lines[5] == RANK_0.splitlines()[0]


def test_an_attempt_by_its_number(cli: CommandLine, run: RunDirectory) -> None:
    attempted(run, "second\n")
    assert cli("logs", "mine").out == "second\n"
    assert cli("logs", "mine", "--attempt", "1").out == RANK_0
    done = cli("logs", "mine", "--attempt", "3")
    assert (done.code, done.errors) == (2, ["--attempt: run mine has no attempt 3 (it has 1, 2)"])
    done = cli("logs", "mine", "--rank", "1")
    assert (done.code, done.errors) == (2, ["--rank: attempt 2 has no log of rank 1 (it has logs of ranks 0 to 0)"])
    assert cli("logs", "mine", "--rank", "1", "--all-ranks").code == 2


def test_a_run_without_an_attempt(cli: CommandLine, make_run: MakeRun) -> None:
    make_run(name="new")
    assert (cli("logs", "new").code, cli("logs", "new").err) == (0, "run new has not started yet\n")
    assert cli("logs", "new", "--attempt", "1").errors == [
        "--attempt: run new has no attempt 1 (it has not started yet)"
    ]


def test_following_begins_with_the_newest_attempt_or_the_one_asked_for(cli: CommandLine, run: RunDirectory) -> None:
    run.attempts()[0].give_verdict("crashed", "bad", again=True)
    attempted(run, "second\n").give_verdict("completed", "all done", again=False)
    done = cli("logs", "mine", "-f")
    assert (done.code, done.out.splitlines()[:2]) == (0, ["=== attempt 2", "second"])
    done = cli("logs", "mine", "-f", "--attempt", "1")
    assert done.out.startswith(f"{RANK_0}=== attempt 2\nsecond\n")
    done = cli("logs", "mine", "-f", "--attempt", "1", "--all-ranks")
    # Of lines whose end nobody wrote, too.
    assert "1: [titan] 2026-11-22 20:21:06,000 - root - INFO - one ends\n=== attempt 2\n0: second\n" in done.out


def test_following_goes_on_over_a_restart(run: RunDirectory) -> None:
    command = [sys.executable, "-m", "titan_slurm", "logs", "mine", "-f", "--all-ranks"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    try:
        # Only once it has begun does the rest happen.
        seen = [follower.stdout.readline() for _ in range(5)]
        assert seen[0] == "1: without a time\n"
        with run.attempts()[0].log_file(0).open("a") as log:
            log.write("more\n")
        assert follower.stdout.readline() == "0: more\n"
        run.attempts()[0].give_verdict("preempted", "bad luck", again=True)
        second = attempted(run, "again\n", "and again\n")
        second.give_verdict("completed", "all done", again=False)
        rest, _ = follower.communicate(timeout=60)
    finally:
        follower.kill()
    assert rest.startswith(f"1: {RANK_1.splitlines()[-1]}\n=== attempt 2\n0: again\n1: and again\n")
    assert follower.returncode == 0


def test_following_a_job_submitted_again_shows_nothing_of_the_one_before(cli: CommandLine, run: RunDirectory) -> None:
    run.attempts()[0].give_verdict("crashed", "bad", again=False)
    run.add_job({"job_id": str(2**22 + 1), "cluster": "local", "time": 2.0, "process_started": 1.0, "host": ""})
    done = cli("logs", "mine", "-f")
    assert done.code == 1
    assert "zero begins" not in done.out
    assert "state  failed" in done.out
