"""Has torchtitan build a plan, in a process of its own: this one loads no torch. How it is built lives in
`titan_slurm.train.deep`."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.plan import Plan

_COMMAND = (sys.executable, "-m", "titan_slurm.train.deep")


def check(prepared: Prepared) -> dict[str, Any]:
    """What torchtitan built, as `titan_slurm.train.deep.check` tells it. Raises BadInputError with what it refuses."""
    [found] = build([prepared.plan])
    if found["problems"]:
        path = str(prepared.resolved.found.path)
        raise BadInputError(Problem(path, f"torchtitan does not build it: {problem}") for problem in found["problems"])
    return found


def build(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """What `titan_slurm.train.deep.check` found of each plan. Raises BadInputError if it could not look."""
    done = subprocess.run(
        _COMMAND,
        input=json.dumps([plan.to_dict() for plan in plans]),
        capture_output=True,
        text=True,
        check=False,
        # It must neither wait for a GPU nor take memory on one.
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if len(found) != len(plans):
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise bad_input("--deep", f"torchtitan could not be asked: {lines[-1]}")
    return found
