"""Many runs as one job array, runs that wait for others, and chains of jobs, on a real Slurm."""

import json
from pathlib import Path

import pytest

from tests.slurm.conftest import NO_WANDB, Cluster
from titan_slurm.run.directory import RunDirectory

# One rank, and a few steps of the debug model: what is tested is which run does what in which job.
TINY = (
    "training.seq_len=64",
    "training.batch_size=2",
    "training.global_batch_size=4",
    "checkpointing.save_interval=1000",
    "slurm.tasks_per_node=1",
)
# What has as many jobs as it is given, and no more.
ONCE = ("training.max_steps=60", "requeue.enabled=false", NO_WANDB)
# The first two tasks are to be there still when the others come.
STEPS = (60, 3, 3, 3, 3, 3)


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def job_of(cluster: Cluster, name: str) -> str:
    return str(RunDirectory(cluster.path(name)).jobs()[-1]["job_id"])


def wandb_segments(run: Path) -> list[str]:
    """The id of each offline segment that wandb has for a run."""
    return [path.name.split("-", 3)[3] for path in (run / "wandb").glob("offline-run-*")]


@pytest.mark.timeout(1200)
def test_a_grid_of_twelve_runs_and_a_chain_that_waits_for_one_of_them(cluster: Cluster) -> None:
    grid = sets(f"training.max_steps={','.join(map(str, STEPS))}", "optimizer.lr=1e-3,2e-3", "wandb.mode=offline")
    limited = ("--array", "--array-limit", "2")
    said = cluster.titan_slurm("submit", "llama3_debug", "--name", "grid", *limited, *sets(*TINY), *grid).stdout
    assert said.startswith("submitted 12 runs as array job ")
    names = [f"grid-{number:02}" for number in range(12)]
    array = job_of(cluster, "grid-00").partition("_")[0]
    assert [job_of(cluster, name) for name in names] == [f"{array}_{task}" for task in range(12)]

    # One of them ends before it has begun, and no other.
    cluster.titan_slurm("cancel", "grid-02")
    # One that waits for the first, which is preempted in the meantime: that is no end.
    cluster.submit("follower", *TINY, *ONCE, small=False, more=("--after", "grid-00", "--chain", "3"))
    refused = cluster.titan_slurm("submit", "llama3_debug", "--after", "grid-02", "--dry-run", check=False)
    assert refused.returncode == 2
    assert "--after grid-02: it is cancelled, and will not complete" in refused.stderr

    for name in names[:2]:
        cluster.wait(name, lambda status: status["step"] >= 2)
    whole = ("--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null")
    cluster.run("sbatch", *whole, "--wrap", "sleep 1")
    for name in names[:2]:
        cluster.wait(name, lambda _, name=name: cluster.verdicts(name)[0] is not None)

    # The cancelled one goes on by itself, as a job that is in no array.
    alone = ("submit", str(cluster.path("grid-02") / "recipe.toml"), "--name", "grid-02", "--resume")
    cluster.titan_slurm(*alone)
    assert "_" not in job_of(cluster, "grid-02")

    ids = set()
    for number, name in enumerate(names):
        status = cluster.wait_for_end(name, 480)
        steps = STEPS[number // 2]
        assert (status["name"], status["state"], status["step"]) == (name, "completed", steps), status
        # No step is lost or done twice, by any of them, and each is the run's own.
        assert [line["step"] for line in cluster.metrics(name)] == list(range(1, steps + 1))
        attempts = RunDirectory(cluster.path(name)).attempts()
        assert len(attempts) == (2 if number < 2 else 1)
        assert {attempt.facts()["job_id"] for attempt in attempts} == {job_of(cluster, name)}
        plan = json.loads((cluster.path(name) / "plan.json").read_text())
        # One wandb run each, over all attempts.
        assert set(wandb_segments(cluster.path(name))) == {plan["run_id"]}
        ids.add(plan["run_id"])
    assert len(ids) == 12
    first = [verdict and verdict["verdict"] for name in names[:2] for verdict in cluster.verdicts(name)]
    assert first == ["preempted", "completed"] * 2
    cluster.accounting(f"{array}_0", "COMPLETED")

    # The job that follows begins only now, and is to be of a chain.
    chain = [job["job_id"] for job in RunDirectory(cluster.path("follower")).jobs()]
    assert cluster.wait("follower", lambda status: status["step"] >= 3)["job_id"] == chain[0]
    # What a time limit does; none of its jobs may come back.
    cluster.run("scancel", "--signal=USR2", chain[0])
    status = cluster.wait_for_end("follower")
    assert (status["state"], status["step"], status["job_id"]) == ("completed", 60, chain[1])
    assert [verdict and verdict["verdict"] for verdict in cluster.verdicts("follower")] == ["time_limit", "completed"]
    assert [line["step"] for line in cluster.metrics("follower")] == list(range(1, 61))
    # The one that is left over finds nothing to do, and whoever waits for it need not know.
    cluster.accounting(chain[2], "COMPLETED")
    assert cluster.status("follower")["state"] == "completed"
    begun = RunDirectory(cluster.path("follower")).attempts()[0].facts()
    finished = RunDirectory(cluster.path("grid-00")).attempts()[-1].finished()
    assert finished is not None
    assert begun["started"] > finished["time"]
    over = cluster.titan_slurm("submit", "llama3_debug", "--after", "grid-00", "--after-any", "grid-02", "--dry-run")
    assert over.stderr.count("it has ended (completed), nothing is left to wait for") == 2


def test_a_chain_is_cancelled_whole(cluster: Cluster) -> None:
    cluster.submit("unbegun", "slurm.sbatch.begin='now+1hour'", more=("--chain", "3"))
    jobs = [job["job_id"] for job in RunDirectory(cluster.path("unbegun")).jobs()]
    assert cluster.status("unbegun")["state"] == "queued"
    cluster.titan_slurm("cancel", "unbegun")
    assert cluster.wait_for_end("unbegun")["state"] == "cancelled"
    for job_id in jobs:
        cluster.accounting(job_id, "CANCELLED")


@pytest.mark.parametrize("kind", ["array", "chain"])
def test_what_sbatch_refuses_leaves_nothing_behind(cluster: Cluster, kind: str) -> None:
    more = {"array": ("--array", "--set", "optimizer.lr=1,2"), "chain": ("--chain", "2")}[kind]
    given = sets("slurm.partition=nowhere")
    done = cluster.titan_slurm("submit", "llama3_debug", "--name", f"no-{kind}", *more, *given, check=False)
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert not list(cluster.path("x").parent.glob(f"*no-{kind}*"))
