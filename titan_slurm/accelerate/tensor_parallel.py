"""Tensor parallelism for models of transformers, by the plan that each of them brings along."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from titan_slurm.errors import bad_input


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank of `mesh` its part of the model's weights, which all of them have whole and alike, and let the
    layers communicate. In place. Raises BadInputError for a model that says not how.

    Accelerate takes a model that transformers has sharded while loading it; it cannot do so itself.
    """
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    if not plan:
        what = f"{type(model).__name__} has no tensor-parallel plan: only models of transformers bring one along"
        raise bad_input("parallelism.tensor_parallel", what, "tensor_parallel = 1")
    anything: Any = model
    expanded = anything._expand_parallel_plan(plan)
    # Of tied weights there is one parameter: it is sharded where it comes first, and tied again below.
    parameters = {name for name, _ in model.named_parameters()}
    twice = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters
    apply_tensor_parallelism(anything, mesh, {name: style for name, style in expanded.items() if name not in twice})
    if twice:
        anything.tie_weights()
