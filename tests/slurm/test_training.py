"""The main job on a real cluster: a recipe trains, in every kind of parallelism, and goes on from its checkpoint."""

import json
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster


def test_two_nodes_with_two_tasks_each_complete(cluster: Cluster) -> None:
    cluster.submit("fsdp", nodes=2)
    status = cluster.wait_for_end("fsdp")
    assert (status["state"], status["verdict"], status["step"]) == ("completed", "completed", 6)
    cluster.accounting(status["job_id"], "COMPLETED")
    steps = [(line["step"], line["loss"]) for line in cluster.metrics("fsdp")]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1][1] < steps[0][1]
    assert status["loss"] == steps[-1][1]
    log = cluster.titan_slurm("logs", "fsdp").stdout
    assert f"step:  6  loss: {status['loss']:8.5f}" in log
    listed = json.loads(cluster.titan_slurm("checkpoints", "list", "fsdp", "--json").stdout)
    assert [(each["step"], each["state"]) for each in listed] == [(6, "committed"), (3, "committed")]
    assert len(list((cluster.path("fsdp") / "attempts" / "0001").glob("rank_*.log"))) == 4


def test_a_finished_run_goes_on_with_more_steps(cluster: Cluster) -> None:
    cluster.submit("more", "lr_schedule.total_steps=9")
    assert cluster.wait_for_end("more")["state"] == "completed"
    # Where nothing is left to do, saying so is better than a job that ends at once.
    again = cluster.titan_slurm(
        "submit", str(cluster.path("more") / "recipe.toml"), "--name", "more", "--resume", check=False
    )
    assert again.returncode == 2
    assert "has done all of its 6 steps" in again.stderr
    cluster.submit("more", "lr_schedule.total_steps=9", "training.max_steps=9", more=("--resume",))
    status = cluster.wait_for_end("more")
    assert (status["state"], status["step"], status["attempts"]) == ("completed", 9, 2)
    assert [line["step"] for line in cluster.metrics("more")] == list(range(1, 10))
    # One wandb run over both attempts: the same id in both segments.
    segments = sorted((cluster.path("more") / "wandb").glob("offline-run-*"))
    assert len(segments) == 2
    assert len({segment.name.split("-", 3)[3] for segment in segments}) == 1
    # And the same numbers as a run that was never interrupted.
    cluster.submit("whole", "training.max_steps=9", "lr_schedule.total_steps=9")
    assert cluster.wait_for_end("whole")["state"] == "completed"
    assert [line["loss"] for line in cluster.metrics("more")] == [line["loss"] for line in cluster.metrics("whole")]


@pytest.mark.parametrize(
    "setting",
    ["tensor_parallel=2", "pipeline_parallel=2", "data_parallel_replicate=2"],
)
def test_parallelism(cluster: Cluster, setting: str) -> None:
    name = setting.split("=")[0].replace("_", "-")
    # All ranks of two nodes, so that each kind is combined with FSDP as well.
    cluster.submit(name, f"parallelism.{setting}", nodes=2)
    status = cluster.wait_for_end(name)
    assert status["state"] == "completed", cluster.titan_slurm("logs", name).stdout[-3000:]
    losses = [line["loss"] for line in cluster.metrics(name)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_run_is_named_by_name_job_id_and_path(cluster: Cluster) -> None:
    cluster.submit("named", "slurm.constraint=nowhere", more=("--dry-run",))
    assert not cluster.path("named").exists()
    cluster.submit("named", "training.max_steps=1")
    status = cluster.wait_for_end("named")
    for name in ("named", status["job_id"], status["path"]):
        assert cluster.status(name)["name"] == "named"


def test_what_sbatch_refuses_leaves_nothing_behind(cluster: Cluster) -> None:
    done = cluster.titan_slurm(
        "submit", "llama3_debug", "--name", "refused", "--set", "slurm.partition=nowhere", check=False
    )
    assert done.returncode == 2
    assert "invalid partition specified: nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not cluster.path("refused").exists()


def test_cancel_ends_a_running_and_a_waiting_run(cluster: Cluster) -> None:
    cluster.submit("cancelled", "training.max_steps=10000")
    cluster.wait("cancelled", lambda status: status["step"] >= 1)
    cluster.titan_slurm("cancel", "cancelled")
    status = cluster.wait("cancelled", lambda status: status["state"] not in ("running", "stopping"))
    assert (status["state"], status["verdict"]) == ("cancelled", "cancelled")
    cluster.accounting(status["job_id"], "CANCELLED")
    # More nodes than there are free ones: all are taken by the job before it.
    everything = ("training.global_batch_size=16", "training.max_steps=10000", "slurm.exclusive=true")
    cluster.submit("holder", *everything, nodes=4)
    cluster.submit("waiting", *everything, nodes=4)
    assert cluster.wait("waiting", lambda status: status["reason"] != "")["state"] == "queued"
    cluster.titan_slurm("cancel", "waiting")
    cluster.titan_slurm("cancel", "holder")
    assert cluster.wait_for_end("waiting")["state"] == "cancelled"
    assert cluster.wait_for_end("holder")["state"] == "cancelled"


def test_a_crash_is_told_by_its_cause(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"no text": ""}\n')
    cluster.submit("crashed", "data.dataset=text", f"data.dataset_path={tmp_path / 'a.jsonl'}")
    status = cluster.wait_for_end("crashed")
    assert (status["state"], status["verdict"]) == ("failed", "crashed")
    assert f"{tmp_path}/a.jsonl:1 is not a line of JSON with a field" in status["reason"]
    cluster.accounting(status["job_id"], "FAILED")
    assert "ValueError" in cluster.titan_slurm("logs", "crashed").stdout.split("===")[1]


def test_status_without_accounting(cluster: Cluster) -> None:
    cluster.submit("plain", "training.max_steps=1")
    assert cluster.wait_for_end("plain")["state"] == "completed"
    # A site without slurmdbd answers sacct with an error; nothing may depend on it.
    broken = cluster.with_environment(PATH=f"{_without_sacct(cluster)}:/usr/bin:/bin")
    status = json.loads(broken.titan_slurm("status", "plain", "--json").stdout)
    assert status["state"] == "completed"


def _without_sacct(cluster: Cluster) -> Path:
    folder = cluster.home / "no-accounting"
    folder.mkdir(exist_ok=True)
    sacct = folder / "sacct"
    sacct.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    sacct.chmod(0o755)
    return folder
