"""What a run's events say around its ranks; tests/train has those of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titan_slurm.run import events, leave
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.events import EventLog


@pytest.fixture
def run(make_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run on this machine, in whose job the test is."""
    monkeypatch.setenv("TITAN_SLURM_LOCAL_JOB_ID", "17")
    return make_run("requeue.crash_delay=0", cluster="local")


def told(run: RunDirectory) -> list[tuple[str, str, int | None]]:
    """Event, whose clock, attempt."""
    return [(each["event"], each["by"], each["attempt"]) for each in run.events()]


def test_the_batch_script_says_when_an_attempt_begins_and_ends(run: RunDirectory) -> None:
    run.submissions().add(events.QUEUED, resumed=False)
    first = leave.begin(run)
    first.stop("SIGUSR2", 5, saved=True)
    leave.end(run, first, 85)
    second = leave.begin(run)
    second.finish(60)
    leave.end(run, second, 0)
    assert told(run) == [
        ("queued", "submit", None),
        ("started", "batch script", 1),
        ("stopped", "rank 0", 1),
        ("verdict", "batch script", 1),
        ("started", "batch script", 2),
        ("finished", "rank 0", 2),
        ("verdict", "batch script", 2),
    ]
    found = list(run.events())
    assert [each["time"] for each in found] == sorted(each["time"] for each in found)
    assert found[1]["job_id"] == "17"
    assert (found[2]["step"], found[2]["saved"]) == (5, True)
    assert (found[3]["verdict"], found[3]["again"]) == ("time_limit", True)
    assert (found[6]["verdict"], found[6]["again"]) == ("completed", False)


def test_a_verdict_that_came_late_says_so(run: RunDirectory) -> None:
    leave.begin(run)
    leave.begin(run)
    late: dict[str, Any] = next(each for each in run.events() if each["event"] == "verdict")
    assert (late["attempt"], late["late"]) == (1, True)
    assert told(run)[-1] == ("started", "batch script", 2)


def test_events_never_end_what_they_tell_of(tmp_path: Path) -> None:
    # As on a disk that is full: nobody can write there.
    EventLog(tmp_path / "gone" / "events.jsonl", events.RANK_0, 1).add(events.FIRST_STEP, step=1)
    events.NO_EVENTS.add(events.FIRST_STEP, step=1)
    assert list(tmp_path.iterdir()) == []
