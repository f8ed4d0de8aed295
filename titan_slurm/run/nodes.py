"""Which nodes have failed a run, and which its next attempts must not use."""

import time
from typing import Any

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import read_json, write_json
from titan_slurm.run.plan import Plan

# One failure may be chance; a node that failed twice fails again.
_FAILURES_TO_EXCLUDE = 2


def failures(run: RunDirectory) -> dict[str, list[dict[str, Any]]]:
    """The failures of each node that has any: [{"attempt", "verdict", "time"}], and "is_sure" where that was
    seen on the node itself."""
    return dict(read_json(run.nodes_file) or {})


def excluded(run: RunDirectory) -> list[str]:
    """The nodes that the next attempts must not use."""
    return sorted(_excluded(failures(run)))


def _excluded(known: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        node
        for node, failed in known.items()
        if len(failed) >= _FAILURES_TO_EXCLUDE or any(each.get("is_sure") for each in failed)
    ]


def to_exclude(run: RunDirectory, plan: Plan) -> list[str]:
    """What to tell Slurm: the nodes that the user excludes, as it was written (n[1-4], say), and those that failed."""
    own = plan.slurm["sbatch"].get("exclude")
    return [*([own] if own else []), *excluded(run)]


def blame(
    run: RunDirectory, nodes: list[str], attempt: int, verdict: str, most: int | None, *, is_sure: bool = False
) -> None:
    """Write down that these nodes made an attempt fail. `most`: how many the run can do without, None if unknown; of
    more, those that failed longest ago are let back: a job that leaves out too many never starts. `is_sure`: it was no
    chance, and they are left out at once."""
    known = failures(run)
    for node in nodes:
        failed = {"attempt": attempt, "verdict": verdict, "time": time.time()}
        known.setdefault(node, []).append(failed | ({"is_sure": True} if is_sure else {}))
    out = sorted(_excluded(known), key=lambda node: known[node][-1]["time"])
    for node in out[: max(len(out) - most, 0)] if most is not None else []:
        del known[node]
    write_json(run.nodes_file, known)


def let_back(run: RunDirectory, node: str) -> bool:
    """Forget a node's failures. Returns whether it had any."""
    known = failures(run)
    had = known.pop(node, None) is not None
    if had:
        write_json(run.nodes_file, known)
    return had
