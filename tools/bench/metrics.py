#!/usr/bin/env python3
"""What metrics, events and an offline wandb add to a step, as a ratio to the same step without them.

    python tools/bench/metrics.py [--steps 60] [--skip 10] [--set section.key=value …]

Trains llama3_debug with two ranks and every step logged, and takes the time that rank 0 spends in all this out of the
time of its steps: both are of one run, so the machine's speed cancels out. Exit code 1 where the ratio is above 1.01.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from titan_slurm.cli import options
from titan_slurm.launch import create
from titan_slurm.run import leave
from titan_slurm.run.attempt import ATTEMPT_VARIABLE

LIMIT = 1.01
SETTINGS = (
    "slurm.tasks_per_node=2",
    "training.log_interval=1",
    "wandb.mode=offline",
    "checkpointing.save_interval=1000",
)


class Clock:
    """Seconds spent in some functions, the first ones of each left out."""

    def __init__(self, skip: int) -> None:
        self.seconds = 0.0
        self._skip = skip

    def watch(self, owner: Any, name: str) -> None:
        """Count a method of a class."""
        function, calls = getattr(owner, name), 0

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                calls += 1
                if calls > self._skip:
                    self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def be_rank(run: Path, skip: int) -> None:
    """Train as one rank, and print the seconds of its steps and of what is measured."""
    from titan_slurm.train import cpu, rank

    cpu.install()
    from titan_slurm.run.events import EventLog
    from titan_slurm.train import metrics
    from titan_slurm.train.spread import Spread
    from titan_slurm.train.trainer import Trainer

    steps, ours = Clock(skip), Clock(skip)
    steps.watch(Trainer, "train_step")
    for owner, name in (
        (metrics._StepLogger, "log"),
        (metrics.MetricsProcessor, "_take_times"),
        (Spread, "exchange"),
        (EventLog, "add"),
    ):
        ours.watch(owner, name)
    rank.live(str(run))
    print(steps.seconds, ours.seconds, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=10, help="first steps not counted")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        be_rank(arguments.rank_of, arguments.skip)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"training.max_steps={arguments.steps}", *arguments.set]
        prepared = options.prepare("llama3_debug", None, settings, "local", "bench", Path(folder))
        create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
        attempt = leave.begin(prepared.run)
        ranks = []
        for rank in range(2):
            variables = {"GLOBALID": rank, "LOCALID": rank, "NTASKS": 2}
            environment = os.environ | {f"SUBMITIT_LOCAL_{name}": str(value) for name, value in variables.items()}
            environment |= {ATTEMPT_VARIABLE: str(attempt.path), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, "--rank-of", prepared.run.path, "--skip", str(arguments.skip)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        printed = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            return 1
    steps, ours = map(float, printed[0].splitlines()[-1].split())
    ratio = steps / (steps - ours)
    print(f"{steps:.2f} s of steps, {1000 * ours:.1f} ms of them for metrics, events and wandb")
    print(f"ratio of a step with them to one without: {ratio:.4f}")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
