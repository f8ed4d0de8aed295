"""What a recipe costs, known at once and without torch: parameters, memory, disk, floating-point operations, time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from titan_slurm.recipe.gpus import Gpu
from titan_slurm.recipe.layout import make_layout, tasks_per_node
from titan_slurm.recipe.memory import Memory, memory
from titan_slurm.recipe.model import model_sizes
from titan_slurm.recipe.schema import Recipe
from titan_slurm.run.plan import Layout

DEFAULT_MFU = 0.4
# Weights and Adam's two averages.
_NUMBERS_PER_PARAMETER = 3
_BYTES = {"bf16": 2, "fp32": 4}
_MOST_NODES = 64


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a recipe costs. None is what cannot be known: of a model of an unknown kind, on CPUs, or without a GPU's
    name."""

    tokens: int
    """Over all steps."""
    parameters: int | None = None
    active_parameters: int | None = None
    """Those that one token meets."""
    checkpoint_bytes: int | None = None
    disk_bytes: int | None = None
    """Of all checkpoints that stand at once: one more than are kept, while it is being written."""
    flops_per_token: int | None = None
    flops: int | None = None
    memory: Memory | None = None
    """On the GPU that takes the most."""
    host_bytes_per_gpu: int = 0
    """What is offloaded to the host's memory, for each GPU."""
    gpu: Gpu | None = None
    mfu: float = DEFAULT_MFU
    """The part of the GPU's peak that is assumed for speed and time."""
    tokens_per_second: float | None = None
    """Of the whole run."""
    seconds: float | None = None
    would_fit: tuple[str, ...] = ()
    """Changes that would make it fit the GPU, each by itself; or, where none does, what helps most."""

    @property
    def fits(self) -> bool | None:
        """Whether it fits the GPU."""
        return self.memory.total <= self.gpu.memory if self.memory and self.gpu else None


def estimate(
    recipe: Recipe,
    layout: Layout,
    gpu: Gpu | None = None,
    *,
    mfu: float = DEFAULT_MFU,
    torchtitan: dict[str, Any] | None = None,
) -> Estimate:
    """The cost of a checked recipe on its layout. `torchtitan`: the recipe's `[torchtitan]`, by path. Pure."""
    tokens = layout.global_batch_size * recipe.training.seq_len * recipe.training.max_steps
    sizes = model_sizes(recipe)
    if sizes is None:
        return Estimate(tokens=tokens, gpu=gpu, mfu=mfu)
    state = sizes.parameters * _NUMBERS_PER_PARAMETER * _BYTES[recipe.training.dtype]
    known: dict[str, Any] = {
        "tokens": tokens,
        "parameters": sizes.parameters,
        "active_parameters": sizes.active_parameters,
        "checkpoint_bytes": state,
        "disk_bytes": state * _checkpoints_at_once(recipe),
        "flops_per_token": sizes.training_flops(recipe.training.seq_len),
        "flops": sizes.training_flops(recipe.training.seq_len) * tokens,
        "mfu": mfu,
    }
    if recipe.slurm.gpus_per_node == 0:
        return Estimate(**known)
    taken = memory(recipe, layout, sizes, torchtitan or {})
    if recipe.memory.cpu_offload:
        gradients = sizes.parameters * _BYTES[recipe.training.dtype]
        known["host_bytes_per_gpu"] = (state + gradients) * layout.data_parallel_replicate // layout.world_size
    if gpu is not None:
        peak = gpu.bf16 if recipe.training.mixed_precision == "bf16" else gpu.fp32
        speed = layout.world_size * peak * mfu / known["flops_per_token"]
        known |= {"tokens_per_second": speed, "seconds": tokens / speed}
        if taken.total > gpu.memory:
            known["would_fit"] = tuple(_what_would_help(recipe, layout, gpu, torchtitan or {}))
    return Estimate(**known, memory=taken, gpu=gpu)


def _checkpoints_at_once(recipe: Recipe) -> int:
    """Checkpoints on disk at the worst moment: those that are kept, and the one that is being written."""
    checkpointing = recipe.checkpointing
    all_of_them = -(-recipe.training.max_steps // checkpointing.save_interval)
    return min(checkpointing.keep_latest + 1, all_of_them) if checkpointing.keep_latest else all_of_them


def _what_would_help(recipe: Recipe, layout: Layout, gpu: Gpu, torchtitan: dict[str, Any]) -> list[str]:
    """The changes that make it fit by themselves, the cheapest of each kind first; else the one that leaves the least
    to miss."""
    tried: dict[str, list[tuple[int, str]]] = {}
    for kind, text, changed in _changes(recipe, layout):
        new_layout, misfits = make_layout(changed, torchtitan)
        sizes = model_sizes(changed)
        if new_layout is not None and sizes is not None and not misfits:
            total = memory(changed, new_layout, sizes, torchtitan).total
            tried.setdefault(kind, []).append((total, text))
    enough = [next((text for total, text in each if total <= gpu.memory), None) for each in tried.values()]
    found = [text for text in enough if text]
    if found or not tried:
        return found
    total, text = min(each for one_kind in tried.values() for each in one_kind)
    return [f"not by one change; {text} comes nearest, with {total / 2**30:.0f} GiB"]


def _changes(recipe: Recipe, layout: Layout) -> Iterator[tuple[str, str, Recipe]]:
    """Recipes with one change each, by the kind of change and how a user would write it. The batch of a step stays."""
    training = {"global_batch_size": layout.global_batch_size, "gradient_accumulation_steps": None}
    same = _with(recipe, training=training, parallelism={"data_parallel": None})
    for mode in ("selective", "full"):
        changed = _with(same, memory={"activation_checkpointing": mode, "gradient_checkpointing": None})
        yield "checkpointing", f'memory.activation_checkpointing = "{mode}"', changed
    batch = recipe.training.batch_size
    while layout.pipeline_parallel == 1 and batch > 1:
        batch //= 2
        yield "batch", f"training.batch_size = {batch}", _with(same, training={"batch_size": batch})
    nodes = 2 * recipe.slurm.nodes
    while nodes <= max(_MOST_NODES, 8 * recipe.slurm.nodes):
        yield "nodes", f"slurm.nodes = {nodes}", _with(same, slurm={"nodes": nodes})
        nodes *= 2
    tensor = 2 * layout.tensor_parallel
    while tensor <= tasks_per_node(recipe):
        changed = _with(same, parallelism={"tensor_parallel": tensor})
        yield "tensor", f"parallelism.tensor_parallel = {tensor}", changed
        tensor *= 2


def _with(recipe: Recipe, **changes: dict[str, Any]) -> Recipe:
    """The recipe with other values in some sections."""
    sections = {name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    return recipe.model_copy(update=sections)
