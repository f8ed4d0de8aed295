"""torchtitan's Trainer, with what a run on this toolkit needs on top of it."""

import contextlib
import functools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torchtitan.trainer
from torchtitan.tools import utils

from titan_slurm.run import events
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.events import NO_EVENTS, EventLog
from titan_slurm.run.plan import Plan
from titan_slurm.train import committed, cpu
from titan_slurm.train.agreement import PendingAnswer, agreement
from titan_slurm.train.config import trainer_config
from titan_slurm.train.data import tokenizer_folder
from titan_slurm.train.export import export
from titan_slurm.train.hf_configs import hf_config
from titan_slurm.train.metrics import MetricsProcessor
from titan_slurm.train.models import model_spec
from titan_slurm.train.stop import StopRequest
from titan_slurm.train.watchdog import Watchdog

T = TypeVar("T")


class Trainer(torchtitan.trainer.Trainer):
    """torchtitan's training loop, which stops at a step when it is asked to, and saves if there is time."""

    # build() makes the class in whose body Config stands, so a subclass needs its own.
    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan.trainer.Trainer.Config):
        metrics: MetricsProcessor.Config = field(default_factory=MetricsProcessor.Config)

    def __init__(self, config: Config) -> None:
        with cpu.SameValuesOnAnyRanks() if utils.device_type == "cpu" else contextlib.nullcontext():
            super().__init__(config)
        if self.device.type == "cpu":
            cpu.reduce_by_sums(self.model_parts)
        for optimizer in self.optimizers.optimizers:
            optimizer.step = self.metrics_processor.timed_optimizer(optimizer.step)
        self.stopped = False
        self.last_step: int | None = None
        """The last step that ended in this attempt."""
        self._stop: StopRequest | None = None
        self._watchdog: Watchdog | None = None
        self._events = NO_EVENTS
        self._pending: PendingAnswer | None = None
        agreement()

    def attend(self, attempt: Attempt, stop: StopRequest, watchdog: Watchdog, log: EventLog) -> None:
        """Listen to `stop`, and report to `watchdog` and `log` while training."""
        self._stop, self._watchdog = stop, watchdog
        self._events = self.checkpointer.events = log
        self.checkpointer.run = str(attempt.path.parents[1])
        self.checkpointer.save = _patiently(watchdog, self.checkpointer.save)
        if self.config.validator.enable:
            self.validator.validate = _patiently(watchdog, self._noted(self.validator.validate))

    def should_continue_training(self) -> bool:
        """Called by torchtitan's loop before each step, after the save and the validation of the one before.

        The ranks agree without waiting: what is asked at one step is answered at the next, when the slowest rank has
        long sent its part.
        """
        assert self._stop is not None and self._watchdog is not None
        if self._pending:
            self._watchdog.step_ended(self.step)
            if self.last_step is None:
                self._events.add(events.FIRST_STEP, step=self.step)
            self.last_step = self.step
        else:
            self.metrics_processor.begin()
        asked = self._pending.result() if self._pending else 0
        if asked and self.step < self.config.training.steps:
            self.stopped = True
            self._pending = None
            save = functools.partial(self.checkpointer.save, self.step, last_step=True)
            self._stop.leave(signal.Signals(asked).name, self.step, self._why_not_save, save)
            return False
        self._pending = agreement().ask_largest(self._stop.asked)
        return bool(super().should_continue_training())

    def train_step(self, data_iterator: Any) -> None:
        """As torchtitan's."""
        with self.metrics_processor.step():
            super().train_step(data_iterator)

    def export(self, run: RunDirectory, plan: Plan) -> None:
        """Write the weights in Hugging Face's format into the run, unless this step's are there. Collective."""
        # What training has changed in the model's own configuration, the length of its sequences, is not the model's.
        config = hf_config(model_spec(plan.model).model)
        export(self.checkpointer, run, self.step, config=config, tokenizer=Path(tokenizer_folder(run, plan)))

    def close(self) -> None:
        """As torchtitan's, which leaves its data workers behind."""
        iterator: Any = getattr(getattr(self, "dataloader", None), "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        super().close()

    def _noted(self, validate: Callable[..., T]) -> Callable[..., T]:
        """The same function, with its time among the events."""

        def call(*arguments: Any, **options: Any) -> T:
            began = time.monotonic()
            result = validate(*arguments, **options)
            self._events.add(events.VALIDATED, step=self.step, seconds=time.monotonic() - began)
            return result

        return call

    def _why_not_save(self) -> str:
        """Why the save would not be complete before Slurm kills the job, on all ranks; empty if it would."""
        assert self._stop is not None and self._watchdog is not None
        with self._watchdog.patience():
            if not self.checkpointer.finish(agreement().from_rank_0(self._stop.seconds_left())):
                return "an earlier save is still under way"
        return committed.why_not_save(Path(self.checkpointer.folder), self._stop)


def _patiently(watchdog: Watchdog, function: Callable[..., T]) -> Callable[..., T]:
    """The same function, during which the watchdog expects no step."""

    def call(*arguments: Any, **options: Any) -> T:
        with watchdog.patience():
            return function(*arguments, **options)

    return call


def build_trainer(plan: Plan, run: RunDirectory, attempt: Attempt) -> Trainer:
    """The trainer for a plan, built and ready to `train()`. Raises what torchtitan raises for a bad configuration."""
    config = trainer_config(Trainer.Config, plan, run, attempt)
    config.metrics.metrics_file = str(run.metrics_file)
    config.metrics.tensorboard_folder = str(run.tensorboard_folder)
    config.metrics.attempt = attempt.number
    config.metrics.computes_in = config.training.mixed_precision_param
    config.metrics.optimizer_on_host = plan.device == "cpu" or config.training.enable_cpu_offload
    config.metrics.tokens_per_step = plan.layout.global_batch_size * int(plan.torchtitan["training.seq_len"])
    return Trainer(config)
