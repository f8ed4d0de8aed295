"""How an estimate looks: a short block for people, plain values for programs."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_slurm.recipe.estimate import Estimate
    from titan_slurm.recipe.resolve import ResolvedRecipe

_GIB = 2**30
# What the parts of Memory are called for people.
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "fsdp": "gathered by FSDP",
    "activations": "activations",
    "loss": "loss",
    "runtime": "CUDA, NCCL, allocator",
}


def estimated(resolved: "ResolvedRecipe", gpu: str | None = None, mfu: float | None = None) -> "Estimate":
    """The estimate of a recipe. `gpu`: the value of --gpu; if None, the recipe's slurm.gpu_type, where it is known.

    Raises BadInputError for a --gpu that is not known.
    """
    from titan_slurm.recipe.estimate import DEFAULT_MFU, estimate
    from titan_slurm.recipe.gpus import find_gpu, named_gpu

    asked = resolved.recipe.slurm.gpu_type
    # A site may call its GPUs what it likes; only a user's own word has to be one of ours.
    found = named_gpu(gpu, f"--gpu {gpu}") if gpu else find_gpu(asked) if asked else None
    layout, extra = resolved.layout, resolved.torchtitan
    return estimate(resolved.recipe, layout, found, mfu=DEFAULT_MFU if mfu is None else mfu, torchtitan=extra)


def lines(estimate: "Estimate") -> list[str]:
    """The block for people, a line for each kind of cost."""
    found = [("tokens", _amount(estimate.tokens) + (_flops(estimate.flops) if estimate.flops else ""))]
    if estimate.parameters is None or estimate.checkpoint_bytes is None or estimate.disk_bytes is None:
        found.append(("model", "of a kind whose sizes are not known: no estimate of memory, disk and time"))
    else:
        active = _amount(estimate.active_parameters or 0)
        of_them = "" if estimate.active_parameters == estimate.parameters else f", {active} active per token"
        found.insert(0, ("parameters", _amount(estimate.parameters) + of_them))
        disk = f"{_size(estimate.checkpoint_bytes)} each, {_size(estimate.disk_bytes)} of disk at most"
        found.append(("checkpoint", disk))
    if estimate.memory:
        parts = [f"{_PARTS[name]} {size / _GIB:.1f}" for name, size in estimate.memory.parts().items() if size]
        found += [("memory", _memory(estimate)), ("", ", ".join(parts))]
    if estimate.host_bytes_per_gpu:
        found.append(("host memory", f"{estimate.host_bytes_per_gpu / _GIB:.1f} GiB for each GPU"))
    if estimate.seconds and estimate.tokens_per_second and estimate.gpu:
        speed = f"{estimate.tokens_per_second:,.0f} tokens/s, {_duration(estimate.seconds)}"
        found.append(("speed", f"{speed}, if it reaches {estimate.mfu:.0%} of the {estimate.gpu.name}'s peak"))
    return [f"  {name:<12}{text}".rstrip() for name, text in found]


def misfit(estimate: "Estimate") -> str | None:
    """What to tell a user whose recipe does not fit the GPU; None where it does, or nobody knows."""
    if estimate.fits is not False or estimate.memory is None or estimate.gpu is None:
        return None
    needs, has = estimate.memory.total / _GIB, estimate.gpu.memory / _GIB
    help_ = f"; would fit with: {', or '.join(estimate.would_fit)}" if estimate.would_fit else ""
    return f"about {needs:.0f} GiB per GPU do not fit the {has:.0f} GiB of an {estimate.gpu.name}{help_}"


def values(estimate: "Estimate") -> dict[str, Any]:
    """The estimate for JSON. Sizes are in bytes."""
    made = dataclasses.asdict(estimate) | {"fits": estimate.fits}
    if estimate.memory:
        made["memory"]["total"] = estimate.memory.total
    return made


def _memory(estimate: "Estimate") -> str:
    assert estimate.memory is not None
    text = f"about {estimate.memory.total / _GIB:.0f} GiB per GPU"
    if estimate.gpu:
        text += f" of {estimate.gpu.memory / _GIB:.0f} ({estimate.gpu.name})"
    return text


def _amount(number: int) -> str:
    """1.24 B, 350 M."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,}"


def _flops(number: int) -> str:
    return f", {number:.2e} floating-point operations"


def _size(number: int) -> str:
    """96.4 GB: disks are sold in powers of ten."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:,.0f} {unit}"
    return f"{number:,} bytes"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{seconds / 60:.1f} minutes"
