"""The verbs that are for one run or for many: status, cancel, resume, requeue; on jobs of this machine that only sleep,
and on a squeue and a scancel that record how they were called. tests/slurm has the real ones."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.test_state import attempted, submitted
from tests.conftest import CommandLine
from titan_slurm.cluster import slurm
from titan_slurm.cluster.state import status
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import append_json_line

MakeRun = Callable[..., RunDirectory]
FakeCommand = Callable[[str, str], Callable[[], list[str]]]

PATIENCE_S = 60


class Terminal:
    """`titan-slurm` as somebody on a terminal uses it."""

    def __init__(self, *arguments: str) -> None:
        self.end, other = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "150", "LINES": "12"}
        command = [sys.executable, "-m", "titan_slurm", *arguments]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until something is shown that has not been read yet."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            try:
                self.shown += os.read(self.end, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"it has left without {text!r}:\n{self.shown}")
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> int:
        """Answer, and return the exit code."""
        os.write(self.end, text.encode())
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


@pytest.fixture
def terminal(cli: CommandLine) -> Iterator[Callable[..., Terminal]]:  # noqa: ARG001
    """`terminal(*arguments)`."""
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture
def asleep(cli: CommandLine, make_run: MakeRun) -> Iterator[Callable[..., RunDirectory]]:
    """`asleep(name, script=…)`: a run on this machine whose script does nothing, not submitted."""
    made: list[RunDirectory] = []

    def make(name: str, script: str = "sleep 600") -> RunDirectory:
        made.append(make_run(name=name, cluster="local"))
        made[-1].script_file.write_text(f"{script}\n")
        return made[-1]

    yield make
    if made:
        cli("cancel", *(run.name for run in made))


def states(cli: CommandLine) -> dict[str, str]:
    return {each["name"]: each["state"] for each in json.loads(cli("status", "--json").out)}


def test_several_are_resumed_and_cancelled(cli: CommandLine, asleep: Callable[..., RunDirectory]) -> None:
    for name in ("sweep-1", "sweep-2", "other"):
        asleep(name)
    done = cli("resume", "sweep-1", "other", "sweep-2", "other")
    assert done.code == 0
    assert [line.rpartition(" as job ")[0] for line in done.out.splitlines()] == [
        "resumed run sweep-1",
        "resumed run other",
        "resumed run sweep-2",
    ]
    assert set(states(cli).values()) == {"queued"}
    again = cli("resume", "sweep-1", "other")
    assert (again.code, len(again.errors), again.out) == (2, 2, "")
    assert "sweep-1: run sweep-1 is queued as job " in again.errors[0]

    # Nobody can be asked here, and nothing was done.
    done = cli("cancel", "--name", "sweep-*")
    assert (done.code, done.out) == (2, "")
    assert done.errors == ["cancel 2 runs: nobody can be asked, this is no terminal (--yes says that it is meant)"]
    assert set(states(cli).values()) == {"queued"}

    done = cli("cancel", "--name", "sweep-*", "--yes", "--json")
    assert [(each["name"], each["changed"]) for each in json.loads(done.out)] == [("sweep-1", True), ("sweep-2", True)]
    assert states(cli) == {"sweep-1": "cancelled", "sweep-2": "cancelled", "other": "queued"}
    assert cli("cancel", "sweep-1").out == "run sweep-1 is cancelled; there is nothing to cancel\n"
    assert cli("cancel", "--all", "--yes").out.startswith("cancelled run other (job ")
    assert cli("cancel", "--all", "--yes").out == "nothing to cancel\n"

    assert cli("resume", "--name", "sweep-?", "--yes").out.count("resumed run") == 2
    assert states(cli) == {"sweep-1": "queued", "sweep-2": "queued", "other": "cancelled"}


@pytest.mark.parametrize("verb", ["cancel", "resume", "requeue", "runs rm", "runs archive"])
def test_every_mistake_is_reported_and_nothing_is_done(
    cli: CommandLine, asleep: Callable[..., RunDirectory], verb: str
) -> None:
    run = asleep("mine")
    words = verb.split()
    done = cli(*words, "mine", "nope", "9999", "--yes")
    assert (done.code, [text.split(" in ")[0] for text in done.errors]) == (2, ["no run 'nope'", "no run '9999'"])
    assert (cli(*words).code, cli(*words, "mine", "--all").code) == (2, 2)
    assert cli(*words, "--name", "nope*").errors == [f"--name: no run in {run.path.parent} has a name like 'nope*'"]
    assert status(run).state == "created"


def test_on_a_terminal_the_user_is_asked(
    cli: CommandLine, asleep: Callable[..., RunDirectory], terminal: Callable[..., Terminal]
) -> None:
    for name in ("one", "two"):
        asleep(name)
    # In a process of its own, so that the jobs are nobody's children, as they are for users.
    cli.process("resume", "one", "two")
    asking = terminal("cancel", "--all")
    asking.wait_for("one  queued")
    asking.wait_for("cancel these 2 runs? [y/N]")
    assert asking.type("n\n") == 1
    assert states(cli) == {"one": "queued", "two": "queued"}
    asking = terminal("cancel", "--all")
    asking.wait_for("cancel these 2 runs? [y/N]")
    assert asking.type("y\n") == 0
    assert states(cli) == {"one": "cancelled", "two": "cancelled"}


def test_a_finished_run_needs_more_steps_to_go_on(cli: CommandLine, make_run: MakeRun) -> None:
    attempted(submitted(make_run(cluster="local"))).give_verdict("completed", "all 60 steps done", again=False)
    assert cli("resume", "mine").errors == [
        "mine: run mine has done all of its 60 steps "
        "(titan-slurm submit RECIPE --resume --name mine --set training.max_steps=120)"
    ]


# A batch script that starts what starts a rank, which has a process of its own; each says when USR2 has come.
RANK = """
import signal, subprocess, sys, time
signal.signal(signal.SIGUSR2, lambda *_: open(sys.argv[-1] + ".heard", "a").close())
if "submitit.core._submit" in sys.argv:
    subprocess.Popen([sys.executable, __file__, "worker"])
open(sys.argv[-1] + ".ready", "a").close()
time.sleep(600)
"""


def test_requeue_asks_the_ranks_to_stop(
    cli: CommandLine, asleep: Callable[..., RunDirectory], clean_environment: Path
) -> None:
    Path("rank.py").write_text(RANK)
    start = "import subprocess, sys; subprocess.run([sys.executable, 'rank.py', 'submitit.core._submit', 'rank'])"
    run = asleep("mine", f'{sys.executable} -c "{start}"; true')
    cli("resume", "mine")
    assert cli("requeue", "mine").errors == ["mine: is queued; only a running one can be requeued"]
    wait_until(lambda: Path("rank.ready").exists() and Path("worker.ready").exists())
    attempt = attempted(run)
    (attempt.path / "hosts.json").unlink()
    assert cli("requeue", "mine").errors == ["mine: its ranks have not started yet"]
    attempt.set_hosts(["n1"])
    done = cli("requeue", "mine")
    assert (done.code, done.out.partition(" (")[0]) == (0, "run mine")
    wait_until(lambda: Path("rank.heard").exists())
    assert not Path("worker.heard").exists()
    assert (attempt.requeue_wish() or {}).keys() == {"time", "user"}
    cli("cancel", "mine")
    assert cli("requeue", "mine").errors == ["mine: is cancelled; `titan-slurm resume mine` goes on with it"]
    assert clean_environment.exists()


def wait_until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_requeue_refuses_what_would_not_come_back(make_run: MakeRun, cli: CommandLine) -> None:
    run = submitted(make_run("requeue.enabled=false", cluster="local"), process=os.getpid())
    attempt = attempted(run)
    assert "[requeue] enabled = false" in cli("requeue", "mine").errors[0]
    assert attempt.requeue_wish() is None


def on_slurm(make_run: MakeRun, *names: str) -> list[RunDirectory]:
    """Runs with the jobs 1, 2, …, that have begun."""
    runs = [make_run(name=name) for name in names]
    for number, run in enumerate(runs, 1):
        run.add_job({"job_id": str(number), "cluster": "slurm", "time": float(number)})
        attempted(run)
    return runs


SQUEUE = 'for id in 1 2 3; do echo "$id|RUNNING|None|n$id"; done'


def test_many_jobs_are_one_question_and_one_order(
    make_run: MakeRun, cli: CommandLine, fake_command: FakeCommand
) -> None:
    runs = on_slurm(make_run, "a", "b", "c")
    squeue = fake_command("squeue", SQUEUE)
    scancel = fake_command("scancel", "echo 'scancel: error: Kill job error on job id 2: Access denied' >&2; exit 1")
    done = cli("cancel", "--all", "--yes")
    assert scancel() == ["1 2 3"]
    # One to show what is meant, one to see what there is to do.
    assert len(squeue()) == 2
    assert (done.code, done.errors) == (2, ["b: scancel 2: Access denied"])
    assert done.out.splitlines() == [
        "cancelled run a (job 1) at step 0",
        "cancelled run c (job 3) at step 0",
    ]
    assert all(run.cancelled() for run in runs)
    done = cli("requeue", "a", "c", "b")
    assert scancel()[1:] == ["--signal=USR2 1 3 2"]
    assert (done.code, len(done.errors), len(squeue())) == (2, 1, 3)


def test_a_controller_that_is_not_there_is_said_once_for_each_run(
    make_run: MakeRun, cli: CommandLine, fake_command: FakeCommand
) -> None:
    on_slurm(make_run, "a", "b")
    fake_command("squeue", "exit 1")
    fake_command("scancel", "echo one >&2; echo 'scancel: error: no controller' >&2; exit 1")
    assert cli("cancel", "a", "b").errors == [
        f"{name}: scancel {number}: scancel: error: no controller" for name, number in (("a", 1), ("b", 2))
    ]
    assert all("does not answer" in text for text in cli("requeue", "a", "b").errors)
    assert "does not answer" in cli("resume", "a").errors[0]


def test_runs_that_have_ended_are_not_asked_about(
    make_run: MakeRun, cli: CommandLine, fake_command: FakeCommand
) -> None:
    runs = on_slurm(make_run, "a", "b")
    runs[0].attempts()[-1].give_verdict("completed", "all done", again=False)
    squeue = fake_command("squeue", SQUEUE)
    assert states(cli) == {"a": "completed", "b": "running"}
    assert len(squeue()) == 1 and "--jobs=2 " in squeue()[0]
    runs[1].attempts()[-1].give_verdict("cancelled", "by ada", again=False)
    assert states(cli) == {"a": "completed", "b": "cancelled"}
    assert len(squeue()) == 1


def test_more_jobs_than_an_argument_can_hold(fake_command: FakeCommand) -> None:
    squeue = fake_command("squeue", 'echo "9_7|PENDING|Priority|"; echo "4|RUNNING|None|n1"')
    found = slurm.jobs([f"9_{task}" for task in range(6000)])
    assert found is not None and found.keys() == {"9_7"}
    assert len(squeue()) == 1 and "--jobs" not in squeue()[0]


def test_what_the_user_has_set_for_squeue_hides_no_job(
    fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_PARTITION", "another")
    fake_command("squeue", '[ -z "$SQUEUE_PARTITION" ] && echo "1|RUNNING|None|n1"')
    assert (slurm.jobs(["1"]) or {}).keys() == {"1"}


def test_status_of_some_in_an_order(make_run: MakeRun, cli: CommandLine, fake_command: FakeCommand) -> None:
    runs = on_slurm(make_run, "b-late", "a-new", "b-ended")
    make_run(name="c-made")
    fake_command("squeue", SQUEUE)
    runs[2].attempts()[-1].give_verdict("completed", "all done", again=False)
    for run, step in zip(runs, (5, 9, 7), strict=True):
        append_json_line(
            run.metrics_file, {"step": step, "loss": 2.5, "tokens_per_second": 1.0, "time": 1.0, "attempt": 1}
        )

    def names(*arguments: str) -> list[str]:
        return [each["name"] for each in json.loads(cli("status", "--json", *arguments).out)]

    # As they were submitted, the newest beside the prompt.
    assert names() == ["b-late", "a-new", "b-ended", "c-made"]
    assert names("--sort", "name") == ["a-new", "b-ended", "b-late", "c-made"]
    assert names("--sort", "-step") == ["a-new", "b-ended", "b-late", "c-made"]
    assert names("--state", "running") == ["b-late", "a-new"]
    assert names("--state", "created,completed") == ["b-ended", "c-made"]
    assert names("--state", "active", "--name", "b-*") == ["b-late"]
    rows = cli("status", "--name", "b-*", "--sort", "-submitted").out.splitlines()
    assert [row.split()[0] for row in rows] == ["RUN", "b-ended", "b-late"]
    assert cli("status", "--name", "z*").out.startswith("no runs like that in ")


def test_mistakes_in_what_is_asked_for(cli: CommandLine, make_run: MakeRun) -> None:
    make_run(cluster="local")
    assert cli("status", "--state", "runing,done").errors == [
        "--state: there is no state 'runing' (did you mean 'running'?)",
        "--state: there is no state 'done' (known: active, cancelled, completed, created, failed, queued, requeued,"
        " running, stopping)",
    ]
    assert cli("status", "--sort", "steps").errors == ["--sort: there is no key 'steps' (did you mean 'step'?)"]
    assert cli("status", "mine", "--state", "running").code == 2
    done = cli("status", "--watch")
    assert (done.code, done.errors) == (
        2,
        ["--watch: this is no terminal (`titan-slurm status --json` is for programs)"],
    )
    assert cli("status", "--watch", "--json").code == 2
    assert cli("status", "--every", "5").errors == ["--every: is of use with --watch alone"]


def test_watching_goes_on_while_slurm_does_not_answer(
    make_run: MakeRun, fake_command: FakeCommand, terminal: Callable[..., Terminal]
) -> None:
    runs = on_slurm(make_run, *(f"run-{number:02d}" for number in range(10)))
    for run in runs[:9]:
        run.attempts()[-1].give_verdict("completed", "all done", again=False)
    squeue = fake_command("squeue", "echo '10|RUNNING|None|n1'")
    watching = terminal("status", "--watch", "--every", "1")
    watching.wait_for("1 running, 9 completed")
    # More than the screen holds: what runs is there all the same.
    watching.wait_for("not shown")
    watching.wait_for("run-09")
    fake_command("squeue", "exit 1")
    watching.wait_for("does not answer, these are the last known states")
    fake_command("squeue", "echo '10|COMPLETING|None|n1'")
    watching.wait_for("1 stopping, 9 completed")
    looks = len(squeue())
    (runs[9].path / "plan.json").rename("plan.json")
    watching.wait_for("9 completed")
    assert looks >= 3
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(PATIENCE_S) == 0


def test_watching_one_run(make_run: MakeRun, terminal: Callable[..., Terminal]) -> None:
    run = submitted(make_run(cluster="local"), process=os.getpid())
    watching = terminal("status", "mine", "--watch", "--every", "1")
    watching.wait_for("queued")
    attempted(run)
    watching.wait_for("running")
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(PATIENCE_S) == 0


def test_the_time_left_follows_from_the_newest_steps(make_run: MakeRun) -> None:
    run = submitted(make_run("training.max_steps=5000", cluster="local"), process=os.getpid())
    attempted(run)
    now = time.time()
    # Ten seconds a step at first, one in the end; what lies far back is not read.
    times = [now - 10 * (4000 - step) if step < 3000 else now - (4000 - step) for step in range(1, 4001)]
    lines = (
        json.dumps({"step": step, "time": at, "attempt": 1, "loss": 2.0, "tokens_per_second": 1.0, "ranks": "x" * 200})
        for step, at in enumerate(times, 1)
    )
    run.metrics_file.write_text("\n".join(lines) + "\n")
    left = status(run).seconds_left
    assert left is not None and 990 < left <= 1001


def test_somebody_elses_run_is_looked_at_all_the_same(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = submitted(make_run(cluster="local"))
    attempt = attempted(run)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # The tests' user may write everywhere.
    monkeypatch.setattr("titan_slurm.run.attempt.write_json_once", refuse)
    assert (status(run).state, status(run).verdict, attempt.verdict()) == ("failed", "crashed", None)
