"""A rank leaves when it is to leave, also where it can write nothing down any more."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

HUNG = """
import time
from titan_slurm.train.watchdog import Watchdog
watchdog = Watchdog(attempt, 0, 0.5)
watchdog.step_ended(1)
"""
# Its step does not end either.
ASKED = """
import os, signal
from titan_slurm.train.stop import StopRequest, block_signals
block_signals()
StopRequest(attempt, 0, lambda: 1)
os.kill(os.getpid(), signal.SIGUSR2)
"""


@pytest.mark.parametrize(("what", "exit_code"), [(HUNG, 86), (ASKED, 85)])
def test_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, exit_code: int) -> None:
    # Outside of a job only the environment knows when the time is over.
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(round(time.time()) + 2))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    there = f"from titan_slurm.run.attempt import Attempt\nattempt = Attempt(Path({str(tmp_path / 'gone/0001')!r}))"
    program = f"import signal\nfrom pathlib import Path\n{there}\n{what}\nwhile True: signal.pause()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120)
    assert done.returncode == exit_code
