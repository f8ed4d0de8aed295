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

    def _build_metric_logger(self, **kwargs: Any) -> Any:
        others = super()._build_metric_logger(**kwargs)
        parallel_dims = kwargs["parallel_dims"]
        rank = torchtitan_metrics._get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=kwargs["pp_schedule"])
        if torch.distributed.get_rank() != rank:
            return others
        config = kwargs["config"]
        return _StepLogger(others, Path(config.metrics_file), config.attempt, parallel_dims.world_size)

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
    """Writes a step to `metrics.jsonl`, then to the loggers that torchtitan built."""

    def __init__(self, others: Any, file: Path, attempt: int, world_size: int) -> None:
        self.others = others
        self.file = file
        self.attempt = attempt
        self.world_size = world_size
        self.last: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if device_type == "cpu":
            metrics = {name: value for name, value in metrics.items() if not name.startswith(_ONLY_ON_GPU)}
        if "loss_metrics/global_avg_loss" in metrics:
            self.last = self._record(metrics, step)
            append_json_line(self.file, self.last)
        self.others.log(metrics, step)

    def _record(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        rates = [value for name, value in metrics.items() if name.startswith("lr")]
        return {
            "step": step,
            "time": time.time(),
            "attempt": self.attempt,
            "loss": metrics["loss_metrics/global_avg_loss"],
            "grad_norm": metrics["grad_norm"],
            "lr": rates[0] if rates else None,
            # torchtitan counts per device; a run has one speed.
            "tokens_per_second": metrics["throughput(tps)"] * self.world_size,
            "tokens": metrics.get("n_tokens_seen"),
        }

    def close(self) -> None:
        self.others.close()
