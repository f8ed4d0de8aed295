"""Every logged step, also into the run directory. What is in a line is said in `titan_slurm.run.metrics`; how it is
shown lives with `status` and `logs`."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed
import torchtitan.components.metrics as torchtitan_metrics
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type, get_peak_flops

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.files import append_json_line
from titan_slurm.run.metrics import TORCHTITANS_NAMES, highest_step
from titan_slurm.train.spread import OptimizerTimes, Spread

# What torchtitan's memory monitor and peak-FLOPS table say of a CPU is nonsense.
_ONLY_ON_GPU = ("memory/", "validation_metrics/memory/", "mfu", "tflops")
# What torchtitan takes for the peak of a GPU that it does not know: the A100's.
_UNKNOWN_PEAK = 312e12


class MetricsProcessor(torchtitan_metrics.MetricsProcessor):
    """torchtitan's metrics, with `metrics.jsonl` beside TensorBoard. What is sent to wandb is read from that file, by a
    process of its own: see titan_slurm.train.wandb_courier."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_metrics.MetricsProcessor.Config):
        metrics_file: str = ""
        """The run's `metrics.jsonl`."""
        attempt: int = 0
        """Number of the attempt, from 1."""
        tokens_per_step: int = 0
        """Of the whole run; torchtitan's own count goes wrong when the number of ranks changes."""
        computes_in: str = "bfloat16"
        """What the forward and the backward pass compute in: bfloat16 or float32."""
        optimizer_on_host: bool = False
        """Whether the optimizer computes on the CPU."""
        tensorboard_folder: str = ""
        """The run's; one for all its attempts."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        name = self.device_memory_monitor.device_name
        peak = None if device_type == "cpu" else peak_flops(name, config.computes_in)
        if peak is None:
            # For torchtitan the one reason not to show an MFU.
            self.has_quantization = True
        else:
            self.gpu_peak_flops = peak
        self._optimizer = OptimizerTimes(on_host=config.optimizer_on_host)
        self._spread = Spread(torch.distributed.get_rank())
        self._steps, self._seconds, self._step_began = 0, 0.0, 0.0

    def timed_optimizer(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """An optimizer's `step`, whose time counts."""
        return self._optimizer.timed(step)

    def begin(self) -> None:
        """Training begins: what came before is not of the first step."""
        self.time_last_log = time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around every step."""
        self._steps, self._step_began = self._steps + 1, time.perf_counter()
        yield
        self._seconds += time.perf_counter() - self._step_began

    def _take_times(self) -> dict[str, float]:
        """This rank's seconds per step since the last call, from inside a step."""
        now = time.perf_counter()
        totals = {
            "step_seconds": self._seconds + now - self._step_began,
            "data_seconds": sum(self.data_loading_times),
            "optimizer_seconds": self._optimizer.take(),
        }
        steps = max(1, self._steps)
        self._steps, self._seconds, self._step_began = 0, 0.0, now
        return {name: total / steps for name, total in totals.items()}

    def _build_metric_logger(self, **kwargs: Any) -> Any:
        config = kwargs["config"]
        # Those of torchtitan would begin a new curve with every attempt, and wandb's would be in this process.
        own = dataclasses.replace(config, enable_wandb=False, enable_tensorboard=False)
        others = super()._build_metric_logger(**kwargs | {"config": own})
        parallel_dims = kwargs["parallel_dims"]
        rank = torchtitan_metrics._get_metrics_rank(parallel_dims=parallel_dims, pp_schedule=kwargs["pp_schedule"])
        if torch.distributed.get_rank() != rank:
            return others
        Attempt(Path(kwargs["dump_folder"])).set_configuration(_plain(kwargs["config_dict"]))
        return _StepLogger(config, parallel_dims.world_size)

    def log(self, step: int, *args: Any, **kwargs: Any) -> None:
        """Called by torchtitan on every rank at a logged step, when the device has come to its end."""
        times = self._take_times()
        apart = self._spread.exchange(step, times)
        mine = self.logger if isinstance(self.logger, _StepLogger) else None
        if mine:
            mine.times, mine.apart = times, apart
        with _torchtitans_own_line(hidden=device_type == "cpu"):
            super().log(step, *args, **kwargs)
        if device_type == "cpu" and mine and mine.last:
            logger.info(
                "step: {step:2}  loss: {loss:8.5f}  grad_norm: {grad_norm:7.4f}  "
                "tokens/s: {tokens_per_second:,.0f}".format(**mine.last)
            )

    def log_validation(self, loss: float, step: int, *args: Any, **kwargs: Any) -> None:
        """As torchtitan's."""
        with _torchtitans_own_line(hidden=device_type == "cpu"):
            super().log_validation(loss, step, *args, **kwargs)
        if device_type == "cpu":
            logger.info(f"validate step: {step:2}  loss: {loss:7.4f}")


def peak_flops(device_name: str, computes_in: str = "bfloat16") -> float | None:
    """The most that a GPU can compute per second in bf16, without sparsity; None where nobody has said, and of what is
    not computed in bf16: in fp32 it depends on whether PyTorch may round to TF32."""
    if computes_in != "bfloat16":
        return None
    # torchtitan, which asks lspci as well, takes an H20 for an H100 and an H200 NVL for an H200, and does not know an
    # L40S by this name. Of the H200 NVL NVIDIA's data sheet says 1,671 TFLOPS with sparsity, twice the dense value.
    known = {"H20": 148e12, "L40S": 362e12, "H200 NVL": 835e12}
    for name, peak in known.items():
        if f" {name} " in f" {device_name} " or f"{name}-" in device_name:
            return peak
    peak = get_peak_flops(device_name)
    return peak if peak != _UNKNOWN_PEAK or "A100" in device_name else None


@contextlib.contextmanager
def _torchtitans_own_line(*, hidden: bool) -> Iterator[None]:
    """torchtitan's line shows memory and MFU, on a CPU as well."""
    logger.disabled = hidden
    try:
        yield
    finally:
        logger.disabled = False


class _TensorBoard:
    """One curve over all attempts, in one folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if self._writer is None:
            # From its first step on an attempt takes the place of those before it, which may have come further.
            self._writer = torchtitan_metrics.SummaryWriter(self._folder, purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        # A step that is still in memory when the rank is killed is in no curve.
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _StepLogger(torchtitan_metrics.BaseLogger):
    """Writes a step to `metrics.jsonl`, then to TensorBoard where the recipe asks for it."""

    def __init__(self, config: MetricsProcessor.Config, world_size: int) -> None:
        self.config = config
        self.world_size = world_size
        self.last: dict[str, Any] = {}
        self.times: dict[str, float] = {}
        self.apart: dict[str, Any] | None = None
        self._file = Path(config.metrics_file)
        self._reached_before = highest_step(self._file)
        self._board = _TensorBoard(config.tensorboard_folder) if config.enable_tensorboard else None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if device_type == "cpu":
            metrics = {name: value for name, value in metrics.items() if not name.startswith(_ONLY_ON_GPU)}
        if "loss_metrics/global_avg_loss" in metrics:
            self.last = self._training(metrics, step)
            self._append(self.last)
        elif "validation_metrics/loss" in metrics:
            self._append(self._any(step) | _same(metrics) | {"more": _rest(metrics)})
        self._on_board("log", metrics, step)

    def close(self) -> None:
        self._on_board("close")

    def _on_board(self, method: str, *arguments: Any) -> None:
        """TensorBoard's writer raises in the end where its disk is full, and is left out from then on."""
        try:
            if self._board:
                getattr(self._board, method)(*arguments)
        except Exception as error:
            logger.warning(f"TensorBoard is gone ({type(error).__name__}: {error}); going on without it")
            self._board = None

    def _append(self, line: dict[str, Any]) -> None:
        try:
            append_json_line(self._file, line)
        except OSError as error:
            # A full disk may have room again by the time of the next save, which is what counts.
            logger.warning(f"{self._file} cannot be written: {error.strerror}; step {line['step']} is not in it")

    def _any(self, step: int) -> dict[str, Any]:
        return {"step": step, "time": time.time(), "attempt": self.config.attempt}

    def _training(self, metrics: dict[str, Any], step: int) -> dict[str, Any]:
        rates = [value for name, value in metrics.items() if name.startswith("lr")]
        line = self._any(step) | {
            "replayed": step <= self._reached_before,
            **_same(metrics),
            "lr": rates[0] if rates else None,
            # torchtitan counts per device; a run has one speed.
            "tokens_per_second": metrics["throughput(tps)"] * self.world_size,
            "tokens": step * self.config.tokens_per_step,
            "step_seconds": self.times["step_seconds"],
            "data_seconds": self.times["data_seconds"],
        }
        return line | ({"ranks": self.apart} if self.apart else {}) | {"more": _rest(metrics)}


def _plain(configuration: dict[str, Any]) -> dict[str, Any]:
    """torchtitan's configuration without what JSON cannot hold, such as functions."""
    plain: dict[str, Any] = json.loads(json.dumps(configuration, default=repr))
    return plain


def _same(metrics: dict[str, Any]) -> dict[str, Any]:
    """What has a name of its own in `metrics.jsonl`, by that."""
    return {name: metrics[other] for name, other in TORCHTITANS_NAMES.items() if metrics.get(other) is not None}


def _rest(metrics: dict[str, Any]) -> dict[str, Any]:
    """What has none."""
    named = set(TORCHTITANS_NAMES.values())
    return {name: value for name, value in metrics.items() if name not in named}
