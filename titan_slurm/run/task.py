"""What submitit pickles: the path of the run directory, and by name where a rank's life begins."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class RankTask:
    """Called once in every rank's process, on the node."""

    run: str

    def __call__(self) -> None:
        # By name: whoever submits must not import torch, and the run directory knows nothing of training.
        importlib.import_module("titan_slurm.train.rank").live(self.run)
