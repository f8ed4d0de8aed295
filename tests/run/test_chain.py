"""A job as part of more: of a chain that goes on with one run, or of an array; what its batch script finds and does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_slurm.cluster.state import status
from titan_slurm.run import leave, verdict
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory

MakeRun = Callable[..., RunDirectory]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]

RUNNING = 'case "$1" in show) echo "JobId=1 JobState=RUNNING Restarts=0 EndTime=Unknown PreemptTime=None";; esac'


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`in_job("2")`: from here on the test is the batch script of that job."""
    return lambda job_id: monkeypatch.setenv("SLURM_JOB_ID", job_id)


@pytest.fixture
def scontrol(fake_command: FakeCommand) -> Callable[[], list[str]]:
    """What was asked of a Slurm that says the job is running."""
    return fake_command("scontrol", RUNNING)


@pytest.fixture
def chain(make_run: MakeRun) -> RunDirectory:
    """A run with a chain of three jobs, which may not come back by themselves."""
    run = make_run("requeue.enabled=false")
    for job_id in ("1", "2", "3"):
        run.add_job({"job_id": job_id, "cluster": "slurm", "time": 0.0, "chain": ["1", "2", "3"]})
    return run


def given(attempt: Attempt) -> tuple[str, bool]:
    """An attempt's verdict, and whether the run goes on."""
    found = attempt.verdict()
    assert found is not None
    return found["verdict"], found["again"]


def ends(run: RunDirectory, attempt: Attempt) -> Attempt:
    """The attempt stops at a step because its time is nearly over."""
    attempt.stop("SIGUSR2", 3, saved=True)
    assert leave.end(run, attempt, verdict.STOPPED_EXIT_CODE) == verdict.STOPPED_EXIT_CODE
    return attempt


def test_the_next_job_goes_on_until_there_is_none(
    chain: RunDirectory, in_job: Callable[[str], None], scontrol: Callable[[], list[str]]
) -> None:
    for job_id, again in (("1", True), ("2", True), ("3", False)):
        in_job(job_id)
        assert given(ends(chain, leave.begin(chain))) == ("time_limit", again)
    assert [attempt.facts()["job_id"] for attempt in chain.attempts()] == ["1", "2", "3"]
    assert not any(call.startswith("requeue") for call in scontrol())


def test_a_job_that_is_left_over_has_nothing_to_do(
    chain: RunDirectory,
    in_job: Callable[[str], None],
    scontrol: Callable[[], list[str]],  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_job("1")
    attempt = leave.begin(chain)
    attempt.finish(60)
    assert leave.end(chain, attempt, 0) == 0
    for job_id in ("2", "3"):
        in_job(job_id)
        with pytest.raises(SystemExit) as left:
            leave.begin(chain)
        # Whoever waits for the last one to end well waits for the run.
        assert left.value.code == 0
        assert capsys.readouterr().err == "nothing to do: job 1 of this chain has completed\n"
    assert len(chain.attempts()) == 1


def test_a_chain_does_not_fight_an_end_for_good(
    chain: RunDirectory,
    in_job: Callable[[str], None],
    scontrol: Callable[[], list[str]],  # noqa: ARG001
) -> None:
    in_job("1")
    attempt = leave.begin(chain)
    attempt.report_error(0, "ValueError: bad", "", step=None)
    assert leave.end(chain, attempt, 1) == 1
    assert given(attempt) == ("crashed", False)
    in_job("2")
    with pytest.raises(SystemExit, match="this error comes again at every start"):
        leave.begin(chain)
    assert len(chain.attempts()) == 1


def test_a_budget_holds_for_the_whole_chain(
    make_run: MakeRun,
    in_job: Callable[[str], None],
    scontrol: Callable[[], list[str]],  # noqa: ARG001
) -> None:
    run = make_run("requeue.enabled=false", "requeue.crashed=1", "requeue.crash_delay=0")
    for job_id in ("1", "2", "3", "4"):
        run.add_job({"job_id": job_id, "cluster": "slurm", "time": 0.0, "chain": ["1", "2", "3", "4"]})
    for job_id, again in (("1", True), ("2", False)):
        in_job(job_id)
        attempt = leave.begin(run)
        leave.end(run, attempt, 1)
        assert given(attempt) == ("crashed", again)
    in_job("3")
    with pytest.raises(SystemExit, match=r"\[requeue\] crashed = 1"):
        leave.begin(run)


def test_a_job_that_was_killed_without_a_word_is_followed_by_the_next(
    chain: RunDirectory,
    in_job: Callable[[str], None],
    scontrol: Callable[[], list[str]],  # noqa: ARG001
) -> None:
    in_job("1")
    lost = leave.begin(chain)
    in_job("2")
    assert leave.begin(chain).number == 2
    assert given(lost) == ("crashed", True)


def test_a_wish_to_end_the_run_holds_for_the_whole_chain(chain: RunDirectory, in_job: Callable[[str], None]) -> None:
    chain.cancel({"time": 0.0, "job_id": "3", "user": "me"})
    for job_id in ("1", "2"):
        in_job(job_id)
        with pytest.raises(SystemExit, match="me has cancelled this run"):
            leave.begin(chain)


def test_a_chain_makes_way_for_a_later_submission(chain: RunDirectory, in_job: Callable[[str], None]) -> None:
    chain.add_job({"job_id": "7", "cluster": "slurm", "time": 1.0})
    in_job("2")
    with pytest.raises(SystemExit, match="job 7 was submitted for this run since"):
        leave.begin(chain)


def test_the_status_of_a_chain_is_that_of_the_job_whose_turn_it_is(
    chain: RunDirectory,
    in_job: Callable[[str], None],
    scontrol: Callable[[], list[str]],  # noqa: ARG001
    fake_command: FakeCommand,
) -> None:
    in_job("1")
    fake_command("squeue", "printf '1|RUNNING|None|n1\\n2|PENDING|Dependency|\\n3|PENDING|Dependency|\\n'")
    attempt = leave.begin(chain)
    assert (status(chain).state, status(chain).job_id, status(chain).nodes) == ("running", "1", "n1")
    ends(chain, attempt)
    fake_command("squeue", "printf '1|FAILED|None|n1\\n2|PENDING|Priority|\\n3|PENDING|Dependency|\\n'")
    now = status(chain)
    assert (now.state, now.job_id, now.reason) == ("requeued", "2", "Priority")
    fake_command("squeue", "printf '3|CANCELLED|None|\\n'")
    assert status(chain).state == "failed"


def test_a_task_of_an_array_goes_by_its_number_in_it(
    make_run: MakeRun, in_job: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    run.submitit_folder.mkdir()
    (run.submitit_folder / "task.pkl").write_text("what the ranks call")
    in_job("4713")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    # Whoever submitted it was killed before the job could be written down.
    assert leave.begin(run).facts()["job_id"] == "4711_2"
    leave.begin(run)
    jobs = [json.loads(line) for line in Path(run.jobs_file).read_text().splitlines()]
    assert [job["job_id"] for job in jobs] == ["4711_2"]
    assert (run.submitit_folder / "4711_2_submitted.pkl").read_text() == "what the ranks call"
