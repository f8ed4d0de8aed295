"""Every logged step, also into the run directory, for `status` and `logs` to read. How it is shown lives there."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
import torchtitan.components.metrics as torchtitan_metrics
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from titan_slurm.run.files import append_json_line

# What torchtitan's memory monitor and peak-FLOPS table say of a CPU is nonsense.
_ONLY_ON_GPU = ("memory/", "mfu", "tflops")


class MetricsProcessor(torchtitan_metrics.MetricsProcessor):
    """torchtitan's metrics, with `metrics.jsonl` beside TensorBoard and wandb."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_metrics.MetricsProcessor.Config):
        metrics_file: str = ""
        """The run's `metrics.jsonl`."""
        attempt: int = 0
        """Number of the attempt, from 1."""
        tokens_per_step: int = 0
        """Of the whole run; torchtitan's own count goes wrong when the number of ranks changes."""

    def _build_metric_logger(self, **kwargs: Any) -> Any:
        others = super()._build_metric_logger(**kwargs)
        parallel_dims = kwargs["parallel_dims"]
        rank = torchtitan_metrics._get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=kwargs["pp_schedule"])
        if torch.distributed.get_rank() != rank:
            return others
        config = kwargs["config"]
        return _StepLogger(others, config, parallel_dims.world_size)

    def log(self, *args: Any, **kwargs: Any) -> None:
        if device_type != "cpu":
            super().log(*args, **kwargs)
            return
        # torchtitan's own line shows memory and MFU; _StepLogger prints one without.
        logger.disabled = True
        try:
            super().log(*args, **kwargs)
        finally:
            logger.disabled = False
        if isinstance(self.logger, _StepLogger) and self.logger.last:
            logger.info(
                "step: {step:2}  loss: {loss:8.5f}  grad_norm: {grad_norm:7.4f}  "
                "tokens/s: {tokens_per_second:,.0f}".format(**self.logger.last)
            )


class _StepLogger(torchtitan_metrics.BaseLogger):
    """Writes a step to `metrics.jsonl`, then to the loggers that torchtitan built (wandb, TensorBoard)."""

    def __init__(self, others: Any, config: MetricsProcessor.Config, world_size: int) -> None:
        self.others: list[Any] = list(getattr(others, "_loggers", []))
        self.config = config
        self.world_size = world_size
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if device_type == "cpu":
            metrics = {name: value for name, value in metrics.items() if not name.startswith(_ONLY_ON_GPU)}
        if "loss_metrics/global_avg_loss" in metrics:
            self.last = self._record(metrics, step)
            append_json_line(Path(self.config.metrics_file), self.last)
        self._each("log", metrics, step)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        """Call the other loggers. One that fails is left out from then on: wandb's own process gets the SIGTERM of a
        preemption too, and dies of it while the ranks have yet to save."""
        for other in list(self.others):
            try:
                getattr(other, method)(*arguments)
            except Exception as error:
                logger.warning(f"{type(other).__name__} is gone ({type(error).__name__}: {error}); going on without it")
                self.others.remove(other)

    def _record(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        rates = [value for name, value in metrics.items() if name.startswith("lr")]
        return {
            "step": step,
            "time": time.time(),
            "attempt": self.config.attempt,
            "loss": metrics["loss_metrics/global_avg_loss"],
            "grad_norm": metrics["grad_norm"],
            "lr": rates[0] if rates else None,
            # torchtitan counts per device; a run has one speed.
            "tokens_per_second": metrics["throughput(tps)"] * self.world_size,
            "tokens": step * self.config.tokens_per_step,
        }
