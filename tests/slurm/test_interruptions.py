"""What Slurm does to a run, for real, and what the run makes of it: one test per row of the README's table.

Every test trains the debug model on two nodes with two ranks each, and looks at the verdict, at whether the run came
back or stayed away, and at the steps that were lost.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.slurm.conftest import NO_WANDB, Cluster
from titan_slurm.run.directory import RunDirectory

# Long enough that whatever happens to a run happens in its middle.
LONG = ("training.max_steps=400", "checkpointing.save_interval=1000", "requeue.crash_delay=1", NO_WANDB)


def steps(cluster: Cluster, name: str) -> list[int]:
    return [line["step"] for line in cluster.metrics(name)]


def attempt_verdicts(cluster: Cluster, name: str) -> list[str | None]:
    return [verdict and verdict["verdict"] for verdict in cluster.verdicts(name)]


def ranks_of(cluster: Cluster, name: str) -> list[psutil.Process]:
    """The processes of a run's ranks, by rank."""
    folder = str(cluster.path(name) / "submitit")
    found = {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        command = process.info["cmdline"] or []
        if command[-2:] == ["submitit.core._submit", folder] and process.info["environ"]:
            rank = process.info["environ"].get("SLURM_PROCID")
            # Data workers and others that a rank started are not ranks.
            if rank is not None and "slurmstepd" in (process.parent() or process).name():
                found[int(rank)] = process
    return [found[rank] for rank in sorted(found)]


def start(cluster: Cluster, name: str, *settings: str, steps: int = 3) -> dict[str, Any]:
    """Submit a long run and wait until it trains."""
    cluster.submit(name, *LONG, *settings, nodes=2)
    return cluster.wait(name, lambda status: status["step"] >= steps)


def preempt(cluster: Cluster, seconds: int = 3) -> str:
    """A job that takes all nodes from those of lower priority, and gives them back after some seconds."""
    done = cluster.run(
        "sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null",
        "--wrap", f"sleep {seconds}",
    )  # fmt: skip
    return done.stdout.strip()


def back(cluster: Cluster, name: str, attempts: int = 2, seconds: float = 300) -> dict[str, Any]:
    """The status of a run whose next attempt has done a step. Slurm lets a requeued job wait for some seconds."""
    return cluster.wait(name, lambda _: _steps_of_attempt(cluster, name, attempts) >= 1, seconds)


def check_hours(cluster: Cluster, name: str) -> None:
    """The hours of a crashed run that has come back, and still runs, are the wall time by this process's clock."""
    submitted, asked = RunDirectory(cluster.path(name)).jobs()[0]["time"], time.time()
    report = json.loads(cluster.titan_slurm("report", name, "--json").stdout)
    hours = {part["name"]: part["seconds"] for part in report["parts"]}
    assert 0.99 * (asked - submitted) <= sum(hours.values()) <= 1.01 * (time.time() - submitted)
    assert all(hours[part] > 0 for part in ("queue", "start_up", "training", "saving", "lost"))
    assert (hours["idle"], hours["hang"]) == (0, 0)
    assert [row["verdict"] for row in report["attempts"]] == ["crashed", None]
    assert report["attempts"][1]["end"] is None


@pytest.fixture
def cancelled_at_the_end(cluster: Cluster) -> Iterator[list[str]]:
    """Names of runs that are to be ended after the test, however it went."""
    names: list[str] = []
    yield names
    for name in names:
        cluster.titan_slurm("cancel", name, check=False)
        cluster.wait_for_end(name)


def test_preempted_with_grace_time(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("grace")
    start(cluster, "grace")
    preempt(cluster)
    back(cluster, "grace")
    first = cluster.verdicts("grace")[0]
    assert first is not None
    assert first["verdict"] == "preempted"
    assert f"stopped and saved at step {first['saved_step']}" in first["reason"]
    # No step is lost and none is done twice.
    done = steps(cluster, "grace")
    assert done == list(range(1, len(done) + 1))


def test_time_limit(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("limit")
    # Slurm looks at limits twice a minute, and may send the signal up to a minute early.
    start(cluster, "limit", "slurm.time='00:02:00'", "slurm.signal_lead=60", steps=1)
    back(cluster, "limit")
    first = cluster.verdicts("limit")[0]
    assert first is not None
    assert (first["verdict"], first["saved_step"] > 0) == ("time_limit", True)
    done = steps(cluster, "limit")
    assert done == list(range(1, len(done) + 1))


def test_scancel_ends_the_run(cluster: Cluster) -> None:
    status = start(cluster, "scancel")
    cluster.run("scancel", status["job_id"])
    status = cluster.wait_for_end("scancel")
    assert (status["state"], status["verdict"]) == ("cancelled", "cancelled")
    cluster.accounting(status["job_id"], "CANCELLED")
    assert status["attempts"] == 1


def test_scancel_within_the_grace_time_ends_the_run(cluster: Cluster) -> None:
    # A run that has so much to do in one step that it is still there when the user changes their mind.
    cluster.submit(
        "twice", *LONG, "training.seq_len=512", "training.batch_size=8", "training.global_batch_size=64", nodes=2
    )
    status = cluster.wait("twice", lambda status: status["step"] >= 1)
    high = preempt(cluster, seconds=1)
    cluster.wait("twice", lambda _: "PreemptTime=2" in cluster.run("scontrol", "show", "job", status["job_id"]).stdout)
    cluster.run("scancel", status["job_id"])
    status = cluster.wait_for_end("twice")
    assert status["state"] == "cancelled"
    assert status["attempts"] == 1
    cluster.accounting(high, "COMPLETED")


def test_a_rank_killed_by_sigkill(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("killed")
    start(cluster, "killed", "checkpointing.save_interval=2", steps=5)
    ranks_of(cluster, "killed")[1].kill()
    back(cluster, "killed")
    first = cluster.verdicts("killed")[0]
    assert first is not None
    assert first["verdict"] == "crashed"
    done = steps(cluster, "killed")
    # At most the steps since the last checkpoint are done twice, and with the same result.
    assert len(done) - len(set(done)) <= 4
    losses: dict[int, float] = {}
    for line in cluster.metrics("killed"):
        assert losses.setdefault(line["step"], line["loss"]) == line["loss"]
    check_hours(cluster, "killed")


def test_a_rank_that_raises(cluster: Cluster, cancelled_at_the_end: list[str], tmp_path: Path) -> None:
    cancelled_at_the_end.append("raising")
    # An error out of the blue, in the middle of whatever rank 1 does when the file appears.
    (tmp_path / "sitecustomize.py").write_text(
        "import ctypes, os, pathlib, sys, threading, time\n"
        "def wait():\n"
        "    while not pathlib.Path(os.environ['RAISE_WHEN']).exists(): time.sleep(0.05)\n"
        "    pathlib.Path(os.environ['RAISE_WHEN']).unlink()\n"
        "    main = ctypes.c_ulong(threading.main_thread().ident)\n"
        # Somewhere in torch it may be swallowed: in a destructor, say.
        "    while not list(pathlib.Path(os.environ['TITAN_SLURM_ATTEMPT']).glob('error_rank_1*')):\n"
        "        ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(ArithmeticError))\n"
        "        time.sleep(5)\n"
        # The rank itself, and no other process that Python starts for it.
        "if os.environ.get('SLURM_PROCID') == '1' and 'submitit.core._submit' in sys.orig_argv:\n"
        "    threading.Thread(target=wait, daemon=True).start()\n"
    )
    trigger = tmp_path / "now"
    faulty = cluster.with_environment(PYTHONPATH=str(tmp_path), RAISE_WHEN=str(trigger))
    start(faulty, "raising", "checkpointing.save_interval=2", steps=5)
    trigger.touch()
    back(cluster, "raising")
    first = cluster.verdicts("raising")[0]
    assert first is not None
    assert first["verdict"] == "crashed"
    node = RunDirectory(cluster.path("raising")).attempts()[0].hosts()[1]
    assert f"rank 1 on {node}: ArithmeticError" in first["reason"]
    assert len(steps(cluster, "raising")) - len(set(steps(cluster, "raising"))) <= 4


def test_preempted_without_grace_time(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("abrupt")
    start(cluster, "abrupt", "checkpointing.save_interval=2", steps=5)
    cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=0")
    try:
        preempt(cluster)
        back(cluster, "abrupt")
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=30")
    assert attempt_verdicts(cluster, "abrupt")[0] == "preempted"
    assert len(steps(cluster, "abrupt")) - len(set(steps(cluster, "abrupt"))) <= 4


def test_a_hanging_rank(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("hung")
    start(cluster, "hung", "requeue.hang_timeout=10", "checkpointing.save_interval=2", steps=5)
    os.kill(ranks_of(cluster, "hung")[1].pid, signal.SIGSTOP)
    back(cluster, "hung")
    first = cluster.verdicts("hung")[0]
    assert first is not None
    assert first["verdict"] == "hung"
    stacks = (cluster.path("hung") / "attempts" / "0001" / "stacks_rank_0.txt").read_text()
    assert "titan_slurm/train/rank.py" in stacks


def test_requeue_by_the_user(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("requeued")
    status = start(cluster, "requeued", "checkpointing.save_interval=2", steps=5)
    cluster.run("scontrol", "requeue", status["job_id"])
    back(cluster, "requeued")
    assert attempt_verdicts(cluster, "requeued")[0] == "preempted"


def test_preempted_during_start_up(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("early")
    cluster.submit("early", *LONG, nodes=2)
    cluster.wait("early", lambda _: bool(ranks_of(cluster, "early")))
    preempt(cluster, seconds=1)
    back(cluster, "early")
    assert attempt_verdicts(cluster, "early")[0] == "preempted"


def test_a_job_with_a_dependency_preempted_twice_before_its_first_step(
    cluster: Cluster, cancelled_at_the_end: list[str]
) -> None:
    cancelled_at_the_end.append("dependent")
    first = cluster.run("sbatch", "--parsable", "--partition=low", "--output=/dev/null", "--wrap", "sleep 1").stdout
    cluster.submit("dependent", *LONG, f"slurm.sbatch.dependency='afterok:{first.strip()}'", nodes=2)
    # With grace time a rank that starts quickly would do its first step, save it, and leave.
    cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=0")
    try:
        for attempt in (1, 2):
            cluster.wait("dependent", lambda _, attempt=attempt: _is_starting(cluster, "dependent", attempt))
            for rank in ranks_of(cluster, "dependent"):
                rank.suspend()
            preempt(cluster, seconds=1)
        back(cluster, "dependent", attempts=3)
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=30")
    assert attempt_verdicts(cluster, "dependent")[:2] == ["preempted", "preempted"]
    assert {line["attempt"] for line in cluster.metrics("dependent")} == {3}


def test_a_node_that_an_administrator_takes_down(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("down")
    start(cluster, "down", "checkpointing.save_interval=2", steps=5)
    node = cluster.hosts("down")[-1]
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        back(cluster, "down")
    finally:
        # With ReturnToService=2 the node may have come back by itself.
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    assert attempt_verdicts(cluster, "down")[0] == "node_failure"


def test_a_node_whose_slurmd_is_killed(cluster: Cluster, cancelled_at_the_end: list[str]) -> None:
    cancelled_at_the_end.append("node")
    start(cluster, "node", "checkpointing.save_interval=2", steps=5)
    node = cluster.hosts("node")[-1]
    cluster.tool("kill-node", node)
    try:
        cluster.wait("node", lambda _: "down" in cluster.run("sinfo", "-h", "-n", node, "-o", "%t").stdout)
        back(cluster, "node")
    finally:
        cluster.tool("start-node", node)
    # All ranks of that node were dead before Slurm knew; either word for it is right, and the run is back.
    assert attempt_verdicts(cluster, "node")[0] in ("crashed", "preempted", "node_failure")
    assert node not in cluster.hosts("node")


def test_a_crash_that_comes_again_at_every_start_is_not_retried(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"no text": ""}\n')
    cluster.submit("sure", "data.dataset=text", f"data.dataset_path={tmp_path / 'a.jsonl'}")
    status = cluster.wait_for_end("sure")
    assert (status["state"], status["verdict"], status["attempts"]) == ("failed", "crashed", 1)
    assert "this error comes again at every start" in status["reason"]


def test_a_node_without_the_environment_is_left_out(
    cluster: Cluster, cancelled_at_the_end: list[str], tmp_path: Path
) -> None:
    cancelled_at_the_end.append("moved")
    # A virtual environment that some node comes to lose, as one on a file system that is not mounted any more.
    (tmp_path / "bin").mkdir()
    (tmp_path / "lost").touch()
    (tmp_path / "bin" / "activate").write_text(f'[ "$SLURMD_NODENAME" != "$(cat {tmp_path}/lost)" ]\n')
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (cluster.home / "clusters").mkdir()
    (cluster.home / "clusters" / "own.toml").write_text(f'[setup]\nvenv = "{tmp_path}"\n')
    cluster.submit("moved", *LONG, "checkpointing.save_interval=2", more=("--cluster", "own"))
    status = cluster.wait("moved", lambda status: status["step"] >= 3)
    [lost] = set(cluster.hosts("moved"))
    (tmp_path / "lost").write_text(lost)
    cluster.run("scontrol", "requeue", status["job_id"])
    back(cluster, "moved")
    assert lost not in cluster.hosts("moved")
    assert cluster.status("moved")["excluded_nodes"] == [lost]
    assert attempt_verdicts(cluster, "moved")[0] == "preempted"


def test_a_spent_budget_ends_the_run_and_says_so(cluster: Cluster) -> None:
    cluster.submit("spent", *LONG, "requeue.crashed=1", nodes=1)
    for attempt in (1, 2):
        cluster.wait("spent", lambda _, attempt=attempt: _steps_of_attempt(cluster, "spent", attempt) >= 1)
        ranks_of(cluster, "spent")[0].kill()
    status = cluster.wait_for_end("spent")
    assert (status["state"], status["verdict"], status["attempts"]) == ("failed", "crashed", 2)
    assert "[requeue] crashed = 1" in status["reason"]


def test_scancel_ends_a_run_at_any_moment(cluster: Cluster) -> None:
    moments = random.Random(3)
    for batch in range(4):
        names = [f"any-{batch}-{number}" for number in range(5)]
        for name in names:
            # Several at once take longer over each phase of an attempt, so that all of them are hit.
            cluster.submit(name, *LONG, "checkpointing.save_interval=5", "slurm.tasks_per_node=1")
        for name in names:
            time.sleep(moments.uniform(0, 6))
            cluster.run("scancel", cluster.status(name)["job_id"])
        for name in names:
            status = cluster.wait_for_end(name)
            assert status["state"] == "cancelled", status
    # None of them rises again.
    assert cluster.run("squeue", "--noheader", "--name", ",".join(names)).stdout == ""


@pytest.fixture
def without_slurm_commands(cluster: Cluster, tmp_path: Path) -> Cluster:
    """The cluster for a user whose jobs run in a container that has none of Slurm's commands."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'SLURM_JOB_ID' in os.environ: os.environ['PATH'] = os.environ['JOB_PATH']\n"
    )
    commands = tmp_path / "bin"
    commands.mkdir()
    return cluster.with_environment(PYTHONPATH=str(tmp_path), JOB_PATH=str(commands))


def test_slurm_brings_back_a_preempted_run_that_cannot_reach_it(
    cluster: Cluster, without_slurm_commands: Cluster, cancelled_at_the_end: list[str]
) -> None:
    cancelled_at_the_end.append("contained")
    start(without_slurm_commands, "contained")
    preempt(cluster)
    back(cluster, "contained")
    first = cluster.verdicts("contained")[0]
    assert first is not None
    assert first["verdict"] == "preempted"
    assert "`scontrol requeue " in first["why"]
    done = steps(cluster, "contained")
    assert done == list(range(1, len(done) + 1))


def test_a_run_that_cannot_reach_slurm_says_what_to_do_after_a_time_limit(
    cluster: Cluster, without_slurm_commands: Cluster
) -> None:
    status = start(without_slurm_commands, "helpless")
    cluster.run("scancel", "--signal=USR2", status["job_id"])
    status = cluster.wait_for_end("helpless")
    assert (status["state"], status["verdict"]) == ("failed", "time_limit")
    assert f"`scontrol requeue {status['job_id']}` brings the run back" in status["reason"]


def _is_starting(cluster: Cluster, name: str, attempt: int) -> bool:
    return len(RunDirectory(cluster.path(name)).attempts()) == attempt and bool(ranks_of(cluster, name))


def _steps_of_attempt(cluster: Cluster, name: str, attempt: int) -> int:
    if not (cluster.path(name) / "metrics.jsonl").exists():
        return 0
    return sum(line["attempt"] == attempt for line in cluster.metrics(name))
