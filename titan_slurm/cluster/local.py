"""Jobs on this machine: a job is the process of its batch script, which leads a process group of its own."""

import contextlib
import os
import signal
from pathlib import Path

import psutil

# Ranks may be in the middle of something; whoever has not left by then is killed.
_GRACE_S = 2.0


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, without importing torch."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def started(process_id: int) -> float:
    """When the process started, in seconds since 1970: with it a process id is unique."""
    return psutil.Process(process_id).create_time()


def is_alive(process_id: int, process_started: float) -> bool:
    """Whether that very process still runs."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(process_id)
        # The kernel counts in ticks of 10 ms.
        return abs(process.create_time() - process_started) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
    return False


def cancel(process_id: int, process_started: float) -> None:
    """End the job and every process that it started: SIGTERM, then SIGKILL."""
    if not is_alive(process_id, process_started):
        return
    group = psutil.Process(process_id)
    members = [group, *group.children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGTERM)
    psutil.wait_procs(members, timeout=_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_id, signal.SIGKILL)
    psutil.wait_procs(members, timeout=_GRACE_S)
