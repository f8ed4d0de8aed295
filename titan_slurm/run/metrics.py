"""What a run has logged: `metrics.jsonl`, one line for each logged step, appended and never changed.

A line of a training step has

    step, time, attempt            `time` in seconds since 1970, on the rank that knows the loss
    replayed                       an earlier attempt had come as far: after a fall-back, steps are done again
    loss, max_loss                 over all ranks' tokens; the largest of any rank
    grad_norm, lr                  before clipping; of the first parameter group
    tokens                         consumed by the run up to and with this step
    tokens_per_second              of the whole run, since the line before, saves and validations included
    step_seconds, data_seconds     per step since the line before: all of it, and waiting for data; on one rank
    mfu                            percent of the GPU's peak; only on a GPU whose peak is known, in bf16
    memory_active_gib, memory_reserved_gib, alloc_retries
                                   the most since the line before; only on a GPU
    ranks                          how far apart the ranks were, up to the line before; see titan_slurm.train.spread
    more                           what else torchtitan logs, under its own names

and a line of a validation `step`, `time`, `attempt`, `validation_loss` and `more`. A script that uses an Accelerator
logs what it likes; while it has logged nothing, some of its steps have a line of `step`, `time` and `attempt` alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_slurm.run.files import last_json_line, read_json_lines, recent_json_lines

# What these fields are called by torchtitan, and so in TensorBoard and wandb.
TORCHTITANS_NAMES = {
    "loss": "loss_metrics/global_avg_loss",
    "max_loss": "loss_metrics/global_max_loss",
    "grad_norm": "grad_norm",
    "mfu": "mfu(%)",
    "memory_active_gib": "memory/max_active(GiB)",
    "memory_reserved_gib": "memory/max_reserved(GiB)",
    "alloc_retries": "memory/num_alloc_retries",
    "validation_loss": "validation_metrics/loss",
}


def logged(path: Path) -> Iterator[dict[str, Any]]:
    """All logged training steps in the order of logging."""
    return (line for line in read_json_lines(path) if "loss" in line)


def curve(path: Path) -> list[dict[str, Any]]:
    """The run as one curve, by step: of a step that was done more than once, what the newest attempt logged."""
    newest: dict[int, dict[str, Any]] = {}
    for line in logged(path):
        if line["attempt"] >= newest.get(line["step"], line)["attempt"]:
            newest[line["step"]] = line
    return [newest[step] for step in sorted(newest)]


def validations(path: Path) -> list[dict[str, Any]]:
    """The validations by step, of each what the newest attempt logged."""
    newest = {line["step"]: line for line in read_json_lines(path) if "validation_loss" in line}
    return [newest[step] for step in sorted(newest)]


def last(path: Path) -> dict[str, Any]:
    """The newest logged training step, or an empty dict; the cost does not grow with the run."""
    return last_json_line(path, having="loss") or {}


def last_step(path: Path) -> dict[str, Any]:
    """The newest line of any kind, which says how far the run has come, or an empty dict."""
    return last_json_line(path, having="step") or {}


def recent(path: Path, attempt: int) -> Iterator[dict[str, Any]]:
    """The newest steps that an attempt has logged, oldest first: at least the last hundred or so, at a cost that does
    not grow with the run."""
    return (line for line in recent_json_lines(path) if "loss" in line and line["attempt"] == attempt)


def highest_step(path: Path) -> int:
    """The highest step that any attempt has logged; 0 before there is one."""
    return max((line["step"] for line in logged(path)), default=0)
