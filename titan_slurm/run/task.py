"""What submitit pickles: the path of the run directory, and by name where a rank's life begins."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from titan_slurm.run.directory import RunDirectory


@dataclass(frozen=True)
class RankTask:
    """Called once in every rank's process, on the node."""

    run: str

    def __call__(self) -> None:
        # By name: whoever submits must not import torch, and the run directory knows nothing of training.
        importlib.import_module(RunDirectory(Path(self.run)).plan().life).live(self.run)
