"""Real trainings on this machine, through the command line, for the tests in this folder."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from titan_slurm.cluster.state import RunStatus, status
from titan_slurm.run.directory import RunDirectory

# A step takes a third of a second on two cores. The schedule's end is fixed, so that a run may be given more steps.
SMALL = (
    "training.seq_len=64",
    "training.batch_size=2",
    "training.global_batch_size=4",
    "lr_schedule.total_steps=20",
    "requeue.enabled=false",
    # Where it is not what is tested: it is a process of its own, on the ranks' cores.
    "wandb.enabled=false",
)
# torch itself puts where it compiles to into the environment of the tests.
_NOT_OURS = ("TORCHTITAN_", "TITAN_SLURM_", "SLURM_", "WANDB_", "FORCE_COLOR", "TORCHINDUCTOR_", "TRITON_")


class LocalRun:
    """A run of a debug recipe with two ranks."""

    def __init__(self, path: Path, *settings: str, recipe: str = "llama3_debug") -> None:
        self.run = RunDirectory(path)
        self.recipe = recipe
        self.settings = [*SMALL, *settings]
        self.environment: dict[str, str] = {}
        """What the command line has beside the clean environment."""

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.run.checkpoints_folder

    @property
    def steps(self) -> list[int]:
        """The steps that have a committed checkpoint, by what is on the disk."""
        return sorted(
            int(path.parent.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*/commit.json")
        )

    def titan_slurm(self, *arguments: str, code: int = 0) -> str:
        """Run the command line, which must end with `code`. Returns what it printed."""
        # What follows "--" is a script's own.
        own = arguments.index("--") if "--" in arguments else len(arguments)
        arguments = (*arguments[:own], "--runs-dir", str(self.run.path.parent), *arguments[own:])
        clean = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
        done = subprocess.run(
            [sys.executable, "-m", "titan_slurm", *arguments],
            env=clean | {"OMP_NUM_THREADS": "1"} | self.environment,
            cwd=self.run.path.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

    def start(self, *settings: str) -> None:
        """Submit it, or go on with it if it exists; `settings` hold from now on."""
        self.settings += settings
        self.submit(*(["--resume"] if self.run.exists() else []))

    def submit(self, *options: str, code: int = 0) -> str:
        """Submit it with its settings so far."""
        settings = [word for setting in self.settings for word in ("--set", setting)]
        place = ("--cluster", "local", "--name", self.run.name)
        return self.titan_slurm("submit", self.recipe, *place, *settings, *options, code=code)

    def wait(self, seconds: float = 240) -> RunStatus:
        """Its status, once it has ended."""
        deadline = time.monotonic() + seconds
        while (now := status(self.run)).is_active:
            assert time.monotonic() < deadline, f"{now}\n{self.log()[-3000:]}"
            time.sleep(0.2)
        return now

    def train(self, *settings: str) -> RunStatus:
        """Start it, wait for its end, and expect it to be complete."""
        self.start(*settings)
        ended = self.wait()
        assert ended.state == "completed", f"{ended}\n{self.log()[-3000:]}"
        return ended

    def log(self) -> str:
        """What rank 0 printed in the newest attempt."""
        attempts = self.run.attempts()
        return attempts[-1].log_file(0).read_text() if attempts else ""

    def losses(self, attempt: int | None = None) -> dict[int, float]:
        """The loss of each step; of one attempt, or as the whole run has it."""
        return {line["step"]: line["loss"] for line in self.run.metrics() if attempt in (None, line["attempt"])}

    def processes(self) -> list[psutil.Process]:
        """The job's process and all that it started."""
        job: dict[str, Any] = self.run.jobs()[-1]
        leader = psutil.Process(int(job["job_id"]))
        return [leader, *leader.children(recursive=True)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 110 MiB, which a checkpoint of 72 MiB fits on once."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=110m", "titan-slurm-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        # A machine that cannot run this must not look like one where it passes.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
