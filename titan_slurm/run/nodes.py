"""Which nodes have failed a run, and which its next attempts must not use."""

import time
from typing import Any

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_json

# One failure may be chance; a node that failed twice fails again.
_FAILURES_TO_EXCLUDE = 2


def failures(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    """The failures of each node that has any: [{"attempt", "verdict", "time"}]."""
    return dict(read_json(run.nodes_file) or {})


def excluded(run: RunDirectory) -> list[str]:
    """The nodes that the next attempts must not use."""
    return sorted(node for node, known in failures(run).items() if len(known) >= _FAILURES_TO_EXCLUDE)


def blame(run: RunDirectory, nodes: list[str], attempt: int, verdict: str) -> None:
    """Write down that these nodes made an attempt fail."""
    known = failures(run)
    for node in nodes:
        known.setdefault(node, []).append({"attempt": attempt, "verdict": verdict, "time": time.time()})
    write_json(run.nodes_file, known)


def let_back(run: RunDirectory, node: str) -> bool:
    """Forget a node's failures. Returns whether it had any."""
    known = failures(run)
    had = known.pop(node, None) is not None
    if had:
        write_json(run.nodes_file, known)
    return had
