"""`doctor` and the preflight of a run on a real cluster that is broken on purpose, each node in a way of its own."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.slurm.conftest import TOOL, Cluster, brought_up
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.preflight import result

COUNT = 9
# The nodes are one machine: what differs from node to node is in their slurmds' own view of the file system, in the
# environment that a prolog makes, and in a stand-in for the one program that cannot be had here.
NVIDIA_SMI = """\
#!/bin/bash
case "$1 $SLURMD_NODENAME" in
  --query-gpu=*event_reasons*) echo 'Field "clocks_event_reasons.hw_slowdown" is not a valid field' >&2; exit 2 ;;
  --query-remapped*) echo 'No valid query' >&2; exit 2 ;;
  --query-gpu=*{missing}) printf '%s\\n' "0, NVIDIA H100 80GB HBM3, 580.1, 0, No, Not Active, Not Active" ;;
  --query-gpu=*{faulty})
    printf '%s, NVIDIA H100 80GB HBM3, 580.1, %s, No, Not Active, %s\\n' 0 0 'Not Active' 1 7 Active ;;
  --query-gpu=*) printf '%s, NVIDIA H100 80GB HBM3, 580.1, 0, No, Not Active, Not Active\\n' 0 1 ;;
esac
"""


@dataclass
class Site:
    """A cluster with a fault on all of its nodes but the first."""

    cluster: Cluster
    nodes: list[str]

    @property
    def base(self) -> Path:
        """Where a user of the cluster works, with the folders of runs and of profiles in it."""
        return self.cluster.home

    def profile(self, name: str, **tables: Any) -> str:
        """Make a profile. Returns its name."""
        path = self.base / "clusters" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(tomli_w.dumps(tables))
        return name

    def doctor(self, *arguments: str) -> tuple[int, list[str]]:
        """The exit code of `doctor`, and its lines."""
        done = self.cluster.titan_slurm("doctor", *arguments, check=False)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout.splitlines()

    def restart(self, number: int, *commands: str, start: str = "exec") -> None:
        """Start a node again, in a view of the file system that these commands change for it alone."""
        node = self.nodes[number - 1]
        self.cluster.tool("kill-node", node)
        spool = self.cluster.folder / "spool" / node
        script = " && ".join([*commands, f"cd {spool}", f"{start} slurmd -D -N {node}"])
        subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            env={name: self.cluster.environment[name] for name in ("PATH", "SLURM_CONF")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.cluster.folder / "log" / f"{node}.again").open("wb"),
            start_new_session=True,
        )

    def wait_until_idle(self) -> None:
        """Wait for all nodes."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            states = self.cluster.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").stdout.split()
            if states == ["idle"] * COUNT:
                return
            time.sleep(0.2)
        pytest.fail(f"nodes are {states}")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A cluster whose first node is well."""
    faketime = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if faketime is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Debian's package faketime")
    with brought_up("--nodes", str(COUNT), "--requeue-wait", "6") as cluster:
        nodes = sorted(set(cluster.run("sinfo", "-h", "-N", "-o", "%N").stdout.split()))
        made = Site(cluster, nodes)
        commands = made.base / "commands"
        commands.mkdir()
        (commands / "nvidia-smi").write_text(NVIDIA_SMI.format(missing=nodes[6], faulty=nodes[7]))
        (commands / "nvidia-smi").chmod(0o755)
        made.cluster = cluster.with_environment(PATH=f"{commands}:{cluster.environment['PATH']}")
        _break(made, faketime)
        yield made


def _break(site: Site, faketime: Path) -> None:
    base, nodes = site.base, site.nodes
    prolog = base / "prolog"
    prolog.write_text(
        f'#!/bin/sh\nif [ "$SLURMD_NODENAME" = {nodes[2]} ]; then\n'
        f"  echo export LD_PRELOAD={faketime}\n  echo export FAKETIME=+5\nfi\n"
    )
    prolog.chmod(0o755)
    conf = site.cluster.folder / "etc" / "slurm.conf"
    conf.write_text(f"{conf.read_text()}TaskProlog={prolog}\n")
    site.cluster.run("scontrol", "reconfigure")

    (base / "runs").mkdir()
    site.restart(2, f"mount -t tmpfs none {base}/runs")
    [metadata] = [file for file in importlib.metadata.files("torch") or [] if file.name == "METADATA"]
    other = base / "METADATA"
    installed = Path(str(metadata.locate()))
    theirs = f"Version: {importlib.metadata.version('torch')}"
    other.write_text(installed.read_text().replace(theirs, "Version: 2.13.0"))
    site.restart(4, f"mount --bind {other} {installed}")
    site.restart(5, start="exec prlimit --nofile=1000:1000")
    hosts = base / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n255.255.255.255 {nodes[0]} {socket.gethostname()}\n")
    site.restart(6, f"mount --bind {hosts} /etc/hosts")
    site.wait_until_idle()
    site.cluster.run("scontrol", "update", f"NodeName={nodes[8]}", "State=DRAIN", "Reason=its disk is noisy")


def failing(lines: list[str], node: str = "") -> list[str]:
    """The lines that are not ok; with `node`, those about it, without its name."""
    bad = [line for line in lines if not line.startswith("ok ")]
    return [line.replace(f" {node} ", " ", 1) for line in bad if f" {node} " in line] if node else bad


def test_every_fault_of_a_node_is_found_by_one_job(site: Site) -> None:
    name = site.profile("gpus", slurm={"partition": "low"}, nodes={"gpus": 2, "gpu_type": "h100"})
    code, lines = site.doctor("--cluster", name, "--job")
    assert code == 1
    text = "\n".join(lines)
    found = {number: failing(lines, node) for number, node in enumerate(site.nodes, start=1)}
    assert found[1] == [], text
    for number, expected in {
        2: "FAIL shared folder: {base}/runs/doctor-",
        3: "warn clock: 5.0 s ahead of the others (1 s may be) — have chrony",
        4: "FAIL versions: torch 2.13.0, and {torch} on 7 other nodes — install the same one",
        5: "warn open files: at most 1000 in a process — ",
        6: "FAIL network: cannot connect to {first}: ",
        7: "FAIL GPUs: 1 of 2 GPUs are here: NVIDIA H100 80GB HBM3 — drain the node",
        9: "warn node: is drained in partition low: its disk is noisy — ",
    }.items():
        [line] = found[number]
        start = expected.format(base=site.base, torch=importlib.metadata.version("torch"), first=site.nodes[0])
        assert line.startswith(start), text
    assert "is not seen here as the first node has it" in found[2][0]
    assert [line.partition(" — ")[0] for line in found[8]] == [
        "FAIL GPU health: GPU 1: 7 memory errors that ECC could not correct",
        "FAIL GPU health: GPU 1: slowed down by its power supply",
    ], text
    assert "not measured: the ranks were not started on these nodes" in text


def test_a_site_that_is_well(site: Site) -> None:
    others = ",".join(site.nodes[1:4] + site.nodes[5:8])
    name = site.profile("well", slurm={"sbatch": {"exclude": others}}, nodes={"gpus": 0}, wandb={"mode": "offline"})
    before = set((site.base / "runs").iterdir())
    done = site.cluster.titan_slurm("doctor", "--cluster", name, "--job", "--nodes", "2", "--json")
    findings = json.loads(done.stdout)
    assert {each["level"] for each in findings} == {"ok", "warn"}
    warned = {(each["name"], *each["nodes"]) for each in findings if each["level"] == "warn"}
    # The cluster's own, a node that takes no jobs, and one that a run can do with.
    assert warned == {("requeue",), ("node", site.nodes[8]), ("open files", site.nodes[4])}
    [measured] = [each for each in findings if each["name"] == "all-reduce"]
    assert "GB/s on 2 nodes, 2 ranks (gloo, 8 MiB; busbw)" in measured["what"]
    [seen] = [each for each in findings if each["what"].startswith("files made there are seen here")]
    assert seen["nodes"] == [site.nodes[0], site.nodes[4]]
    # Nothing is left of what was well.
    assert set((site.base / "runs").iterdir()) == before


def test_a_folder_that_the_first_node_does_not_see(site: Site) -> None:
    name = site.profile("elsewhere", slurm={"sbatch": {"nodelist": site.nodes[1]}}, nodes={"gpus": 0})
    code, lines = site.doctor("--cluster", name, "--job", "--nodes", "1")
    assert code == 1
    [line] = [line for line in failing(lines) if line.startswith("FAIL job: ")]
    assert f"on {site.nodes[1]}, and nothing that it wrote is seen in {site.base}/runs/doctor-" in line


def test_a_job_that_does_not_start_is_not_waited_for(site: Site) -> None:
    name = site.profile("held", slurm={"sbatch": {"hold": True}}, nodes={"gpus": 0})
    code, lines = site.doctor("--cluster", name, "--job", "--nodes", "1", "--wait", "0")
    assert code == 1
    [line] = [line for line in failing(lines) if line.startswith("FAIL job: ")]
    assert line.startswith("FAIL job: has not started within 0 s: JobHeldUser")
    assert site.cluster.run("squeue", "-h").stdout == ""


def test_a_bad_node_ends_the_attempt_and_is_left_out_of_the_next(site: Site) -> None:
    others = ",".join(site.nodes[2:4] + site.nodes[5:])
    site.cluster.submit("preflight", "slurm.preflight=true", f"slurm.sbatch.exclude={others}", nodes=2)
    run = RunDirectory(site.cluster.path("preflight"))
    bad = site.nodes[1]
    site.cluster.wait("preflight", lambda status: status["attempts"] == 2)
    first, second = run.attempts()
    verdict = first.verdict()
    assert verdict is not None
    assert (verdict["verdict"], verdict["again"]) == ("node_failure", True)
    assert verdict["reason"].startswith(f"before the ranks started: {bad}: shared folder: {run.path} is not seen here")
    assert not list(first.path.glob("rank_*"))
    deadline = time.monotonic() + 60
    while not (looked := result(second)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (looked["nodes"], looked["bad"]) == ([site.nodes[0], site.nodes[4]], {})
    shown = site.cluster.titan_slurm("nodes", "list", "preflight").stdout
    assert shown == f"{bad}  excluded  node_failure in attempt 1\n"
    site.cluster.wait("preflight", lambda _: bool(second.log_files()))
    site.cluster.titan_slurm("cancel", "preflight")
    assert site.cluster.wait_for_end("preflight")["state"] == "cancelled"


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own in a folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("ro", "FAIL shared folder: {folder} cannot be written: Read-only file system — another --runs-dir"),
        ("size=1m", "FAIL room: 0.00 GiB are left in {folder} — make room: "),
        ("size=16m,nr_inodes=2", "FAIL shared folder: {folder} cannot be written: No space left on device — make room"),
    ],
)
def test_a_folder_of_runs_that_takes_none(site: Site, options: str, said: str) -> None:
    folder = site.base / "elsewhere"
    with mounted(folder, options):
        code, lines = site.doctor("--runs-dir", str(folder), "--job")
    assert code == 1
    assert [line for line in failing(lines) if line.startswith(said.format(folder=folder))]
    if "FAIL shared folder" in said:
        assert failing(lines)[-1].startswith("warn job: not submitted — mend what fails above first")


def test_a_partition_that_is_not_there(site: Site) -> None:
    code, lines = site.doctor("--cluster", site.profile("nowhere", slurm={"partition": "lwo"}))
    assert code == 1
    assert "FAIL site: partition lwo — there is none; did you mean 'low'?" in lines


def test_a_controller_that_is_down_and_one_that_allows_less(site: Site) -> None:
    # The last test: the cluster is not the same after it.
    status = site.cluster.run(str(TOOL), "status", str(site.cluster.folder), check=False).stdout
    [line] = [line for line in status.splitlines() if line.startswith("slurmctld ")]
    os.kill(int(line.split()[-1]), signal.SIGKILL)
    begun = time.monotonic()
    code, lines = site.doctor("--job")
    assert code == 1
    assert [line for line in lines if line.startswith("FAIL Slurm: slurmctld does not answer: ")]
    assert failing(lines)[-1].startswith("warn job: not submitted — mend what fails above first")
    assert time.monotonic() - begun < 30

    conf = site.cluster.folder / "etc" / "slurm.conf"
    text = conf.read_text().replace("JobRequeue=1", "JobRequeue=0\nAccountingStorageEnforce=associations")
    conf.write_text(text)
    environment = {name: site.cluster.environment[name] for name in ("PATH", "SLURM_CONF")}
    subprocess.Popen(
        ["slurmctld", "-D"],
        cwd=site.cluster.folder / "run",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while " is UP" not in site.cluster.run("scontrol", "ping", check=False).stdout and time.monotonic() < deadline:
        time.sleep(0.2)
    code, lines = site.doctor("--cluster", site.profile("account", slurm={"account": "lab", "qos": "normal"}))
    assert code == 1
    assert [line for line in lines if line.startswith("FAIL site: account lab — not known; ")]
    assert [line for line in lines if line.startswith("warn requeue: JobRequeue=0 — runs ask for it by themselves")]
