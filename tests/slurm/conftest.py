"""A real Slurm for the tests in this folder: four nodes on this machine, one cluster for the whole session, and a home
in it for each file."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from titan_slurm.cluster.state import status
from titan_slurm.run.directory import RunDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "slurm-cluster"
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")

# A few steps of the debug model: what is tested is the way there and back, not the learning.
SMALL = (
    "training.max_steps=6",
    "training.seq_len=64",
    "training.batch_size=2",
    "training.global_batch_size=8",
    "checkpointing.save_interval=3",
)
# Where wandb is not what is tested: its own process takes as long to start as the training.
NO_WANDB = "wandb.enabled=false"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


class Cluster:
    """The cluster, and titan-slurm as a user of it."""

    def __init__(self, folder: Path, environment: dict[str, str], home: Path) -> None:
        self.folder = folder
        self.environment = environment | {"HOME": str(home)}
        self.home = home

    def with_environment(self, **more: str) -> "Cluster":
        """The same cluster, for a user with more in the environment."""
        return Cluster(self.folder, self.environment | more, self.home)

    def of_user(self, name: str) -> "Cluster":
        """The same cluster, for a user who starts with nothing: no runs, profiles or templates."""
        home = self.folder.parent / name
        home.mkdir()
        return Cluster(self.folder, self.environment, home)

    def clear(self) -> None:
        """End every job, and wait until it has left the nodes."""
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + 120
        while left := self.run("squeue", "--noheader").stdout:
            assert time.monotonic() < deadline, left
            time.sleep(0.3)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command that can reach the cluster."""
        done = subprocess.run(command, env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def titan_slurm(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the command line."""
        return self.run(sys.executable, "-m", "titan_slurm", *arguments, check=check)

    def submit(self, name: str, *settings: str, nodes: int = 1, small: bool = True, more: tuple[str, ...] = ()) -> None:
        """Submit the debug recipe as a run called `name`."""
        given = [*(SMALL if small else ()), *settings]
        options = [word for setting in given for word in ("--set", setting)]
        self.titan_slurm("submit", "llama3_debug", "--name", name, "--nodes", str(nodes), *options, *more)

    def status(self, name: str) -> dict[str, Any]:
        """What `status --json` says of a run."""
        value: dict[str, Any] = json.loads(self.titan_slurm("status", name, "--json").stdout)
        return value

    def _status(self, name: str) -> dict[str, Any]:
        """The same without a process of its own: while a test waits, the ranks need the cores."""
        with mock.patch.dict(os.environ, self.environment, clear=True):
            return status(RunDirectory(self.path(name))).to_dict()

    def wait(self, name: str, until: Callable[[dict[str, Any]], bool], seconds: float = 240) -> dict[str, Any]:
        """The status of a run once it is as asked; fails with what the run said if it does not come to that."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self._status(name)
            if until(status):
                return status
            time.sleep(0.3)
        logs = self.titan_slurm("logs", name, check=False).stdout[-3000:]
        pytest.fail(f"after {seconds} s: {status}\n{logs}")

    def wait_for_end(self, name: str, seconds: float = 240) -> dict[str, Any]:
        """The status of a run that the scheduler has no more work with."""
        ended = {"completed", "cancelled", "failed"}
        return self.wait(name, lambda status: status["state"] in ended, seconds)

    def accounting(self, job_id: str, state: str) -> None:
        """Wait until sacct, which hears of things some seconds later, gives that state for a job."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done = self.run(
                "sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, "--format", "State"
            )
            if done.stdout.split()[:1] == [state]:
                return
            time.sleep(0.5)
        pytest.fail(f"sacct says {done.stdout!r} of job {job_id}, not {state}")

    def path(self, name: str) -> Path:
        """The run's directory."""
        return self.home / "runs" / name

    def tool(self, verb: str, *arguments: str) -> None:
        """Call tools/slurm-cluster for this cluster."""
        self.run(str(TOOL), verb, str(self.folder), *arguments)

    def verdicts(self, name: str) -> list[dict[str, Any] | None]:
        """The verdict of each attempt, oldest first; None for one that has none yet."""
        return [attempt.verdict() for attempt in RunDirectory(self.path(name)).attempts()]

    def hosts(self, name: str) -> list[str]:
        """The node of each rank of the newest attempt."""
        return RunDirectory(self.path(name)).attempts()[-1].hosts()

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The logged steps of a run, in the order of logging."""
        return [json.loads(line) for line in (self.path(name) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster of four nodes with two CPU ranks each; taken down, with every job on it, at the end."""
    with brought_up("--nodes", "4") as made:
        yield made


@pytest.fixture(scope="module")
def cluster(slurm: Cluster, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster as it is for the tests of one file, which find no run, profile, template or job of another's."""
    made = slurm.of_user(request.module.__name__.rpartition(".")[2])
    yield made
    made.clear()


@contextlib.contextmanager
def brought_up(*options: str) -> Iterator[Cluster]:
    """A cluster by these options of tools/slurm-cluster, for a session or a module."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.getuid() != 0:
        reason = f"needs root and Slurm's packages; missing: {', '.join(missing) or 'root'}"
        # A machine that cannot run them must not look like one where they pass.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    # Sockets have short names, which pytest's own temporary folders have not.
    base = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))
    folder = base / "slurm"
    try:
        up = subprocess.run([TOOL, "up", folder, *options], capture_output=True, text=True, timeout=120)
        assert up.returncode == 0, up.stderr
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SRUN", "WANDB", "TITAN_SLURM", "TORCHTITAN"))
        }
        exports = dict(line.removeprefix("export ").split("=", 1) for line in up.stdout.splitlines())
        exports = {name: shlex.split(value)[0] for name, value in exports.items()}
        yield Cluster(folder, clean | exports | {"OMP_NUM_THREADS": "1"}, base)
    finally:
        subprocess.run([TOOL, "down", folder], capture_output=True, timeout=60, check=False)
        shutil.rmtree(base, ignore_errors=True)
