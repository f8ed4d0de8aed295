"""What torchtitan 0.3.0 needs to train on a CPU with gloo. `install` must run before torchtitan is imported."""

from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.cpu
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode


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
    # Of this one, the backend of mixture-of-experts models only knows that it is in torch.distributed.
    dist.all_to_all = _all_to_all


def _all_to_all(
    outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """As torch's, which gloo has only for tensors of one size: experts get different numbers of tokens."""
    received = torch.empty(sum(each.numel() for each in outputs), dtype=inputs[0].dtype)
    sizes = ([each.numel() for each in tensors] for tensors in (outputs, inputs))
    dist.all_to_all_single(received, torch.cat([each.flatten() for each in inputs]), *sizes, group=group)
    for output, part in zip(outputs, received.split([each.numel() for each in outputs]), strict=True):
        output.copy_(part.view_as(output))


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


class SameValuesOnAnyRanks(TorchDispatchMode):
    """Within it, random values of a DTensor are those that the whole tensor would get on one rank.

    For GPUs torch has a generator that knows of shards. On a CPU every rank draws the same values for its own, so that
    the halves of a weight on two ranks would be equal to begin with.
    """

    _RANDOM = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._RANDOM or not isinstance(args[0], DTensor):
            return func(*args, **(kwargs or {}))
        part = args[0]
        whole = func(torch.empty(part.shape, dtype=part.dtype), *args[1:], **(kwargs or {}))
        # No rank is the source: all have the whole, and take their part of it.
        shard = distribute_tensor(whole, part.device_mesh, part.placements, src_data_rank=None)
        part.to_local().copy_(shard.to_local())
        return part
