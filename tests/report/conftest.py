"""A run for reports: what a real training left behind, recorded once and kept in `data/`."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_slurm.report.report import State
from titan_slurm.run.directory import RunDirectory

# The debug recipe, 240 steps with a checkpoint every 40, on one machine: asked to stop by SIGTERM at step 57, a rank
# killed by SIGKILL after 110, a rank stopped for ever after 150, cancelled after 207 and resumed by hand 20 s later.
# Numbers are cut to six digits.
RECORDED = Path(__file__).parent / "data" / "interrupted"
# By the clock of the process that submitted and interrupted it, and polled for its end.
WALL_SECONDS = 297.8
SETTINGS = ("training.max_steps=240", "training.seq_len=64", "training.global_batch_size=16")


@pytest.fixture
def interrupted(make_run: Callable[..., RunDirectory]) -> RunDirectory:
    """The recorded run."""
    run = make_run(*SETTINGS, name="interrupted", cluster="local")
    shutil.copytree(RECORDED, run.path, dirs_exist_ok=True)
    return run


@pytest.fixture
def ended() -> State:
    """How that run stands now."""
    return State("completed", "all 240 steps done", 1.8e9, active=False)
