"""What a script logs, as lines of its run's `metrics.jsonl`; `titan_slurm.run.metrics` says what is in one."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from titan_slurm.accelerate.session import Session
from titan_slurm.recipe.accelerate import Setup
from titan_slurm.run.files import append_json_line
from titan_slurm.run.metrics import highest_step

# So often at most is a step noted that nothing was logged of.
_QUIET_S = 1.0
_KNOWN = ("loss", "max_loss", "grad_norm", "lr", "validation_loss")

_logger = logging.getLogger()


class StepLog:
    """For the rank that knows the loss."""

    def __init__(self, session: Session, plan: Setup) -> None:
        self._attempt = session.attempt.number
        self._file = session.run.metrics_file
        self._tokens_per_step = plan.layout.global_batch_size * plan.seq_len
        self._reached_before = highest_step(self._file)
        self._last = (session.step, time.monotonic())
        self._script_logs = self._reached_before > 0
        self._noted = (0, float("-inf"))

    def write(self, values: Mapping[str, Any], step: int, data_seconds: float) -> None:
        """Append a line. data_seconds: what was spent waiting for data since the last one."""
        self._script_logs = True
        numbers = {name: _number(value) for name, value in values.items()}
        line = self._bare(step)
        if "loss" in numbers:
            line["replayed"] = step <= self._reached_before
        line |= {name: numbers.pop(name) for name in _KNOWN if name in numbers}
        if "loss" in line:
            line |= self._speed(step, data_seconds)
        self._append(line | {"more": numbers})
        if "loss" in line:
            _logger.info(f"step: {step:2}  loss: {line['loss']:8.5f}")

    def passed(self, step: int, *, is_last: bool) -> None:
        """A step has ended. Of a script that never logs, it is noted how far it has come."""
        (noted, then), now = self._noted, time.monotonic()
        if self._script_logs or step == noted or (now - then < _QUIET_S and not is_last):
            return
        self._noted = (step, now)
        self._append(self._bare(step))

    def _bare(self, step: int) -> dict[str, Any]:
        return {"step": step, "time": time.time(), "attempt": self._attempt}

    def _append(self, line: dict[str, Any]) -> None:
        try:
            append_json_line(self._file, line)
        except OSError as error:
            # A full disk may have room again by the time of the next save, which is what counts.
            _logger.warning(f"{self._file} cannot be written: {error.strerror}; step {line['step']} is not in it")

    def _speed(self, step: int, data_seconds: float) -> dict[str, float]:
        (before, then), now = self._last, time.monotonic()
        self._last = (step, now)
        steps, seconds = max(1, step - before), max(now - then, 1e-9)
        return {
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": steps * self._tokens_per_step / seconds,
            "step_seconds": seconds / steps,
            "data_seconds": data_seconds / steps,
        }


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
