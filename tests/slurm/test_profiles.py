"""Cluster profiles and templates on a real cluster."""

import shutil
import sys
from pathlib import Path

import pytest
import tomli_w

from tests.conftest import REPOSITORY
from tests.launch.test_script import AWKWARD
from tests.slurm.conftest import SMALL, Cluster


def put(cluster: Cluster, name: str, tables: dict[str, object]) -> None:
    """A profile of that name for whoever works beside the cluster's folder."""
    path = cluster.home / "clusters" / f"{name}.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(tomli_w.dumps(tables))


def test_the_profile_that_init_writes_works_unedited(cluster: Cluster) -> None:
    made = cluster.titan_slurm("cluster", "init", "site", "clusters").stdout.strip()
    assert made == "clusters/site.toml"
    checked = cluster.titan_slurm("cluster", "check", "site").stdout
    assert all(line.startswith("ok    ") for line in checked.splitlines())
    assert "2 h100 GPUs in a node: 4 nodes of partition low" in checked
    assert "sbatch would take a small job, and start it at " in checked

    settings = [word for setting in SMALL for word in ("--set", setting)]
    done = cluster.titan_slurm("submit", "llama3_debug", "--cluster", "site", "--name", "of-the-site", *settings)
    assert "note: would start at " in done.stderr
    status = cluster.wait_for_end("of-the-site")
    assert (status["state"], status["step"]) == ("completed", 6)
    partition = cluster.run("sacct", "-n", "-X", "-P", "-j", status["job_id"], "-o", "Partition").stdout.split()
    assert partition == ["low"]


def test_a_plain_site_trains_and_goes_on_where_it_was(cluster: Cluster) -> None:
    scratch = cluster.home / "my scratch"
    put(
        cluster,
        "plain",
        {
            "cluster": {"template": "plain"},
            "slurm": {"partition": "high", "srun": ["--mpi=none"], "sbatch": {"nice": 7}},
            "environment": {"HOW": "it's $HOME"},
            "paths": {"shared": [str(cluster.home)], "scratch": str(scratch)},
        },
    )
    cluster.submit("plain-site", "training.max_steps=1", more=("--cluster", "plain"))
    assert cluster.wait_for_end("plain-site")["state"] == "completed"
    # The profile's file is not asked again.
    (cluster.home / "clusters" / "plain.toml").unlink()
    recipe = str(cluster.path("plain-site") / "recipe.toml")
    again = ("--name", "plain-site", "--resume", "--set", "training.max_steps=2")
    cluster.titan_slurm("submit", recipe, *again)
    status = cluster.wait_for_end("plain-site")
    assert (status["state"], status["step"]) == ("completed", 2)
    job = cluster.run("scontrol", "show", "job", status["job_id"]).stdout
    assert "Partition=high" in job
    assert "Nice=7" in job
    assert "export HOW='it'\"'\"'s $HOME'" in (cluster.path("plain-site") / "job.sh").read_text()


def test_slurm_reads_a_directive_as_it_was_meant(cluster: Cluster) -> None:
    text = " ".join(AWKWARD)
    recipe = cluster.home / "awkward.toml"
    sbatch = {"hold": True, "mail-type": "END", "mail-user": text}
    recipe.write_text(tomli_w.dumps({"recipe": {"extends": "llama3_debug"}, "slurm": {"sbatch": sbatch}}))
    cluster.titan_slurm("submit", str(recipe), "--name", "awkward")
    job = cluster.run("scontrol", "show", "job", cluster.status("awkward")["job_id"]).stdout
    cluster.titan_slurm("cancel", "awkward")
    assert f"MailUser={text} " in job


def test_validate_asks_slurm(cluster: Cluster) -> None:
    assert "note: would start at " in cluster.titan_slurm("validate", "llama3_debug").stderr
    done = cluster.titan_slurm("validate", "llama3_debug", "--set", "slurm.partition=nowhere", check=False)
    assert done.returncode == 2
    assert "error: sbatch --test-only: invalid partition specified: nowhere" in done.stderr


def test_every_template_is_taken_by_sbatch(cluster: Cluster) -> None:
    out = cluster.titan_slurm("templates", "check", "--cluster", "slurm").stdout
    assert out.count("; sbatch would take ") == 4


@pytest.mark.skipif(shutil.which("apptainer") is None, reason="Debian 12 has no package of Apptainer")
def test_ranks_train_in_an_apptainer_container(cluster: Cluster) -> None:
    base = cluster.home
    # As good as an image with titan-slurm in it: everything but one file comes from this machine.
    image = base / "image"
    for folder in ("dev", "etc", "opt", "proc", "root", "sys", "tmp", "usr"):
        (image / folder).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (image / name).symlink_to(f"usr/{name}")
    for name in ("group", "hosts", "nsswitch.conf", "passwd"):
        shutil.copy(Path("/etc") / name, image / "etc")
    python = image / "opt" / "python"
    python.write_text(f'#!/bin/sh\necho "$APPTAINER_NAME" >> {base}/started-in\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    mounts = ["/usr", sys.prefix, str(REPOSITORY), str(base)]
    container = {"image": str(image), "mounts": mounts, "python": "/opt/python"}
    put(cluster, "apptainer", {"cluster": {"template": "apptainer_modules"}, "container": container})
    cluster.submit("contained", "training.max_steps=10000", nodes=2, more=("--cluster", "apptainer"))
    cluster.wait("contained", lambda status: status["step"] >= 2)
    assert (base / "started-in").read_text().split() == ["image"] * 4
    # A preemption reaches the ranks inside, and the script outside brings the run back.
    cluster.run("sbatch", "--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap=sleep 1")
    status = cluster.wait("contained", lambda status: status["attempts"] == 2 and status["state"] == "running")
    verdict = cluster.verdicts("contained")[0]
    assert verdict is not None
    assert (verdict["verdict"], verdict["saved_step"] >= 2) == ("preempted", True)
    cluster.titan_slurm("cancel", "contained")
    assert cluster.wait_for_end(status["name"])["state"] == "cancelled"
