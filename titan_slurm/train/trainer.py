"""torchtitan's Trainer, with what a run on this toolkit needs on top of it."""

from dataclasses import dataclass, field

import torchtitan.trainer

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.train import cpu
from titan_slurm.train.config import trainer_config
from titan_slurm.train.metrics import MetricsProcessor


class Trainer(torchtitan.trainer.Trainer):
    """torchtitan's training loop; differs only in its metrics, and on a CPU in how gradients are reduced."""

    # build() makes the class in whose body Config stands, so a subclass needs its own.
    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan.trainer.Trainer.Config):
        metrics: MetricsProcessor.Config = field(default_factory=MetricsProcessor.Config)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.device.type == "cpu":
            cpu.reduce_by_sums(self.model_parts)


def build_trainer(plan: Plan, run: RunDirectory, attempt: Attempt) -> Trainer:
    """The trainer for a plan, built and ready to `train()`. Raises what torchtitan raises for a bad configuration."""
    config = trainer_config(Trainer.Config, plan, run, attempt)
    config.metrics.metrics_file = str(run.metrics_file)
    config.metrics.attempt = attempt.number
    return Trainer(config)
