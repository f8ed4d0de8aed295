"""Trains a run's plan with torchtitan's own Trainer and nothing of ours around it. For throughput.py.

torchrun … plain_torchtitan.py RUN FOLDER
"""

import sys
from pathlib import Path

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.train import cpu


def main() -> None:
    run, folder = RunDirectory(Path(sys.argv[1])), Path(sys.argv[2])
    plan = run.plan()
    if plan.device == "cpu":
        cpu.install()

    import torch.distributed
    import torchtitan.trainer
    from torchtitan.tools.logging import init_logger

    from titan_slurm.train.config import trainer_config

    init_logger()
    plan.torchtitan["checkpoint.folder"] = str(folder / "checkpoints")
    config = trainer_config(torchtitan.trainer.Trainer.Config, plan, run, Attempt(folder))
    trainer = torchtitan.trainer.Trainer(config)
    if plan.device == "cpu":
        cpu.reduce_by_sums(trainer.model_parts)
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
