"""The proof in short: a training under interruptions of four kinds ends with the bits of one that was left alone, and
has one curve."""

import subprocess
import sys

import pytest

from tests.slurm.conftest import REPOSITORY


@pytest.mark.usefixtures("cluster")
def test_a_short_soak() -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "soak", "--seed", "8",
         "--kinds", "preempted", "sigkill", "time_limit", "scancel"],
        capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal to the undisturbed run, bit for bit" in done.stdout
