"""Many runs on a real cluster: jobs that never start, and one that trains and is requeued."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.slurm.conftest import NO_WANDB, Cluster, brought_up
from titan_slurm.run.directory import RunDirectory

COUNTED = ("squeue", "sacct", "scancel")


@pytest.fixture
def counted(cluster: Cluster, tmp_path: Path) -> tuple[Cluster, Path]:
    """The cluster, and a file with a line for each call of Slurm's commands."""
    calls = tmp_path / "calls"
    calls.touch()
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in COUNTED:
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\nexec {shutil.which(name)} "$@"\n')
        (folder / name).chmod(0o755)
    return cluster.with_environment(PATH=f"{folder}:{os.environ['PATH']}"), calls


def test_held_jobs_are_seen_cancelled_and_resumed(counted: tuple[Cluster, Path]) -> None:
    cluster, calls = counted
    names = [f"many-{number}" for number in range(3)]
    for name in names:
        cluster.submit(name, NO_WANDB, "slurm.sbatch.hold=true")
    calls.write_text("")

    def states() -> dict[str, str]:
        found = json.loads(cluster.titan_slurm("status", "--name", "many-*", "--json").stdout)
        return {each["name"]: each["state"] for each in found}

    assert states() == dict.fromkeys(names, "queued")
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["squeue"]

    refused = cluster.titan_slurm("runs", "rm", "many-0", "--yes", check=False)
    assert (refused.returncode, "is queued as job" in refused.stderr) == (2, True)
    ids = [RunDirectory(cluster.path(name)).jobs()[-1]["job_id"] for name in names]
    done = cluster.titan_slurm("cancel", "many-0", "many-2").stdout.splitlines()
    assert [line.split(" (")[0] for line in done] == ["cancelled run many-0", "cancelled run many-2"]
    assert [line for line in calls.read_text().splitlines() if line.startswith("scancel")] == [
        f"scancel {ids[0]} {ids[2]}"
    ]
    assert states() == {"many-0": "cancelled", "many-1": "queued", "many-2": "cancelled"}

    # Alone, with the job's script as it was.
    script = (cluster.path("many-2") / "job.sh").read_text()
    cluster.titan_slurm("resume", "many-2")
    assert states() == {"many-0": "cancelled", "many-1": "queued", "many-2": "queued"}
    assert (cluster.path("many-2") / "job.sh").read_text() == script
    cluster.titan_slurm("cancel", "--name", "many-*", "--yes")
    assert cluster.titan_slurm("runs", "rm", *names, "--yes").stdout.count("removed run many-") == 3
    assert not any(cluster.path(name).exists() for name in names)


def test_a_requeued_run_stops_saves_and_comes_back(cluster: Cluster) -> None:
    settings = ("training.max_steps=600", "checkpointing.save_interval=1000", "slurm.tasks_per_node=1", NO_WANDB)
    cluster.submit("asked", *settings)
    cluster.wait("asked", lambda status: status["step"] >= 2)
    assert "is to stop, save, and start again" in cluster.titan_slurm("requeue", "asked").stdout
    try:
        cluster.wait("asked", lambda status: status["attempts"] == 2 and status["state"] == "running")
        first = cluster.verdicts("asked")[0]
        assert first is not None
        assert (first["verdict"], first["again"]) == ("preempted", True)
        # All that was done is saved.
        assert first["saved_step"] == cluster.metrics("asked")[-1]["step"]
        assert f"; stopped and saved at step {first['saved_step']}" in first["reason"]
        assert first["reason"].startswith("requeued by ")
    finally:
        cluster.titan_slurm("cancel", "asked")
    assert cluster.wait_for_end("asked")["state"] == "cancelled"


def test_a_run_that_another_cluster_has_is_left_alone(cluster: Cluster) -> None:
    cluster.submit("theirs", NO_WANDB, "slurm.sbatch.hold=true")
    [job] = RunDirectory(cluster.path("theirs")).jobs()
    with brought_up("--nodes", "1") as other:
        # A login node that sees the same file system, and asks another controller.
        here = Cluster(other.folder, other.environment, cluster.home)
        status = here.status("theirs")
        assert (status["state"], status["verdict"]) == ("queued", None)
        assert status["reason"].startswith(f"its job is one of Slurm cluster {job['slurm_cluster']}, and only there")
        for verb in ("cancel", "resume", "runs rm"):
            done = here.titan_slurm(*verb.split(), "theirs", *(["--yes"] if verb != "resume" else []), check=False)
            assert done.returncode != 0, verb
        done = here.titan_slurm("ensure", "theirs", check=False)
        assert (done.returncode, f"Slurm cluster {job['slurm_cluster']}" in done.stderr) == (75, True)
        assert here.run("squeue", "--noheader").stdout == ""
    assert RunDirectory(cluster.path("theirs")).jobs() == [job]
    assert cluster.status("theirs")["reason"] == "JobHeldUser"
    cluster.titan_slurm("cancel", "theirs")
    assert cluster.status("theirs")["state"] == "cancelled"
