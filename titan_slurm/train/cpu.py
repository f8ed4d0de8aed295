"""What torchtitan 0.3.0 needs to train on a CPU with gloo. `install` must run before torchtitan is imported."""

from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.cpu
from torch import nn
from torch.distributed.fsdp import FSDPModule


def install() -> None:
    """Make torchtitan take the CPU for its device, and give `torch.cpu` what torchtitan asks of a device module."""
    torch._utils._get_available_device_type = lambda: "cpu"
    # torchtitan's memory monitor only prints these; titan_slurm.train.metrics leaves them out on a CPU.
    shims: dict[str, Any] = {
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1),
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
    }
    for name, function in shims.items():
        setattr(torch.cpu, name, function)


def use_attention_with_backward(model_config: Any) -> None:
    """Replace FlexAttention and varlen attention, which have no backward on a CPU, by scaled dot-product attention.

    It is causal only: documents packed into one sequence see each other.
    """
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention

    for kind in (FlexAttention.Config, VarlenAttention.Config):
        for _, _, parent, field in list(model_config.traverse(kind)):
            setattr(parent, field, ScaledDotProductAttention.Config())


def reduce_by_sums(model_parts: list[nn.Module]) -> None:
    """Let FSDP sum and divide: gloo cannot average (no PREMUL_SUM)."""
    for part in model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
