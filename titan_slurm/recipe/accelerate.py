"""What a recipe's words become in Accelerate, and which of them it has no word for. Imports neither torch nor
accelerate."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_slurm.errors import Problem
from titan_slurm.recipe.conflicts import needing_gpus
from titan_slurm.recipe.data import data_values
from titan_slurm.recipe.mapping import activation_checkpointing
from titan_slurm.recipe.resolve import ResolvedRecipe, origin
from titan_slurm.run.plan import Layout
from titan_slurm.toml import Key

_SUBMIT = "only torchtitan's own loop has it: titan-slurm submit, without --script"


@dataclass(frozen=True)
class Setup:
    """How Accelerate is to be set up: the plan of a script, as far as the recipe decides it."""

    layout: Layout
    mixed_precision: str
    """Accelerate's word: bf16 or no."""
    activation_checkpointing: bool
    """Of every layer."""
    cpu_offload: bool
    reshard_after_forward: bool
    compile_backend: str | None
    """Of torch.compile, for each layer of the model; None without it."""
    seed: int
    deterministic: bool
    batch_size: int
    seq_len: int
    max_steps: int
    save_interval: int
    keep_latest: int
    save_dir: str
    resume_from_checkpoint: str
    data: dict[str, Any]
    """As a plan has it."""

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the weights between them, beside tensor and context parallelism."""
        return self.layout.data_parallel // self.layout.data_parallel_replicate


def make_setup(resolved: ResolvedRecipe) -> Setup:
    """The setup for a recipe that `problems_with` finds nothing wrong with."""
    recipe = resolved.recipe
    return Setup(
        layout=resolved.layout,
        mixed_precision="bf16" if recipe.training.mixed_precision == "bf16" else "no",
        activation_checkpointing=activation_checkpointing(recipe) == "full",
        cpu_offload=recipe.memory.cpu_offload,
        reshard_after_forward=recipe.parallelism.reshard_after_forward != "never",
        compile_backend=recipe.compile.backend if recipe.compile.enabled else None,
        seed=recipe.training.seed,
        deterministic=recipe.training.deterministic,
        batch_size=recipe.training.batch_size,
        seq_len=recipe.training.seq_len,
        max_steps=recipe.training.max_steps,
        save_interval=recipe.checkpointing.save_interval,
        keep_latest=recipe.checkpointing.keep_latest,
        save_dir=recipe.checkpointing.save_dir,
        resume_from_checkpoint=recipe.checkpointing.resume_from_checkpoint,
        data=data_values(recipe),
    )


def problems_with(resolved: ResolvedRecipe, *, has_gpus: bool = True) -> list[Problem]:
    """What of a recipe Accelerate cannot do, a problem for each field."""
    problems = [_problem(resolved, field, what, hint) for field, what, hint in _unsupported(resolved)]
    if not has_gpus:
        problems += [
            _problem(resolved, misfit.field, misfit.what, misfit.hint)
            for misfit in needing_gpus(resolved.recipe, "there is none here")
        ]
    return problems


def contradictions(
    resolved: ResolvedRecipe,
    *,
    mixed_precision: str | None,
    gradient_accumulation_steps: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Iterator[Problem]:
    """Where the script, or who launches it, says something else than the recipe.

    mixed_precision, gradient_accumulation_steps: the arguments of `Accelerator`; None where it was given none.
    """
    training, layout = resolved.recipe.training, resolved.layout
    asked = {"Accelerator(mixed_precision=…)": mixed_precision}
    # `accelerate launch` says "no" where its user has said nothing.
    if environment.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        asked["environment ACCELERATE_MIXED_PRECISION"] = environment["ACCELERATE_MIXED_PRECISION"]
    for where, value in asked.items():
        if value in ("fp16", "fp8"):
            hint = "bf16, or no for fp32" if value == "fp16" else _SUBMIT
            yield Problem(where, f"{value}: a recipe computes in bf16 or fp32", hint)
        elif value is not None and value != ("bf16" if training.mixed_precision == "bf16" else "no"):
            at = origin(resolved.values, ("training", "mixed_precision")) or "its default"
            what = f"{value} contradicts training.mixed_precision = {training.mixed_precision} ({at})"
            yield Problem(where, what, "leave it out, or let them agree")
    if gradient_accumulation_steps not in (None, layout.gradient_accumulation_steps):
        yield Problem(
            f"Accelerator(gradient_accumulation_steps={gradient_accumulation_steps})",
            f"contradicts the recipe: global batch {layout.global_batch_size} = batch_size {layout.batch_size} × "
            f"data-parallel degree {layout.data_parallel} × {layout.gradient_accumulation_steps} steps",
            "leave it out: the recipe's batch stays the same on any number of nodes",
        )
    for name, what in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if environment.get(name, "").lower() == "true":
            hint = f"launch without {what}; titan-slurm convert makes a recipe of its configuration"
            yield Problem(f"environment {name}", f"{what} and TorchTitanPlugin exclude each other", hint)
    for name, silent, field, planned in _launched(resolved, environment):
        said = environment.get(name, silent).lower()
        if said not in ("", silent, planned):
            by = ".".join(field)
            if given := origin(resolved.values, field):
                by += f" ({given})"
            what = f"{said} contradicts the recipe, which has {planned} by {by}"
            yield Problem(f"environment {name}", what, "leave it out, or let them agree")


def _launched(resolved: ResolvedRecipe, environment: Mapping[str, str]) -> Iterator[tuple[str, str, Key, str]]:
    """What `accelerate launch` tells a script that the recipe decides: the variable, what it holds where the user of
    `accelerate launch` has said nothing, the field, and its value."""
    recipe, layout = resolved.recipe, resolved.layout
    if recipe.compile.enabled:
        yield "ACCELERATE_DYNAMO_BACKEND", "no", ("compile", "backend"), recipe.compile.backend
    else:
        yield "ACCELERATE_DYNAMO_BACKEND", "no", ("compile", "enabled"), "false"
    steps = str(layout.gradient_accumulation_steps)
    yield "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", ("training", "gradient_accumulation_steps"), steps
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        recomputes = str(activation_checkpointing(recipe) == "full").lower()
        yield "FSDP_ACTIVATION_CHECKPOINTING", "false", ("memory", "activation_checkpointing"), recomputes
        yield "FSDP_OFFLOAD_PARAMS", "false", ("memory", "cpu_offload"), str(recipe.memory.cpu_offload).lower()
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        degrees = {
            "DP_REPLICATE": ("data_parallel_replicate", layout.data_parallel_replicate),
            "DP_SHARD": ("data_parallel", layout.data_parallel // layout.data_parallel_replicate),
            "TP": ("tensor_parallel", layout.tensor_parallel),
            "CP": ("context_parallel", layout.context_parallel),
        }
        for name, (field, degree) in degrees.items():
            yield f"PARALLELISM_CONFIG_{name}_SIZE", "1", ("parallelism", field), str(degree)


def _unsupported(resolved: ResolvedRecipe) -> Iterator[tuple[Key, str, str]]:
    recipe, layout = resolved.recipe, resolved.layout
    parallelism, memory = recipe.parallelism, recipe.memory
    given = resolved.values
    how = activation_checkpointing(recipe)
    asks = {
        ("parallelism", "pipeline_parallel"): parallelism.pipeline_parallel > 1,
        ("parallelism", "expert_parallel"): parallelism.expert_parallel > 1,
        ("parallelism", "async_tensor_parallel"): parallelism.async_tensor_parallel,
        ("parallelism", "fsdp_symmetric_memory"): parallelism.fsdp_symmetric_memory,
        ("float8", "enabled"): recipe.float8.enabled,
        ("checkpointing", "export_to_hf"): recipe.checkpointing.export_to_hf,
    }
    for field, asked in asks.items():
        if asked:
            value = getattr(getattr(recipe, field[0]), field[1])
            yield field, f"Accelerate cannot do {str(value).lower()}", _SUBMIT
    if how == "memory_budget" or (isinstance(memory.activation_checkpointing, str) and how == "selective"):
        yield ("memory", "activation_checkpointing"), f"Accelerate has no {how!r}", 'it has "full" and "none"'
    if parallelism.sequence_parallel and layout.tensor_parallel > 1 and ("parallelism", "sequence_parallel") in given:
        what = "the tensor-parallel plans of Hugging Face's models shard no activations along the sequence"
        yield ("parallelism", "sequence_parallel"), what, "false, or " + _SUBMIT
    if recipe.compile.enabled and "model" not in recipe.compile.components:
        yield ("compile", "components"), "without the model nothing is left: the loss is the script's own", '["model"]'
    if recipe.training.dtype == "bf16":
        what = "Accelerate keeps weights and optimizer states in fp32"
        yield ("training", "dtype"), what, _SUBMIT
    if recipe.model.initial_weights:
        yield ("model", "initial_weights"), "the script loads its model itself", "leave it out, or " + _SUBMIT
    for path in resolved.torchtitan:
        yield ("torchtitan", *path.split(".")), "Accelerate does not use torchtitan's configuration", _SUBMIT
    yield from _degrees(layout)


def _degrees(layout: Layout) -> Iterator[tuple[Key, str, str]]:
    copies = layout.data_parallel_replicate
    if copies > 1 and copies == layout.data_parallel:
        hint = f"1 for FSDP, or for HSDP a divisor of {layout.data_parallel}; or {_SUBMIT}"
        yield ("parallelism", "data_parallel_replicate"), f"{copies} copies for as many ranks are DDP, not FSDP", hint
    elif layout.data_parallel == 1 and layout.tensor_parallel > 1 and layout.context_parallel == 1:
        what = f"{layout.tensor_parallel} on {layout.world_size} ranks leave none for FSDP, which Accelerate needs"
        yield ("parallelism", "tensor_parallel"), what, f"{2 * layout.tensor_parallel} ranks or more, or " + _SUBMIT


def _problem(resolved: ResolvedRecipe, field: Key, what: str, hint: str) -> Problem:
    where = origin(resolved.values, field) or str(resolved.found.path)
    return Problem(where, f"{'.'.join(field)}: {what}", hint)
