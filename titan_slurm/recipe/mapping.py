"""What the recipe's words are called in torchtitan's configuration, and what `[torchtitan]` may set beside them."""

import functools
import json
from pathlib import Path
from typing import Any

from titan_slurm.errors import did_you_mean
from titan_slurm.recipe.schema import Recipe
from titan_slurm.run.plan import Layout

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}

# Fields that mean the same in both; the values are converted by `_DTYPES` where they are names of number types.
WORDS: dict[tuple[str, str], str] = {
    ("data", "dataset"): "dataloader.dataset",
    ("data", "num_workers"): "dataloader.num_workers",
    ("data", "infinite"): "dataloader.infinite",
    ("training", "batch_size"): "training.local_batch_size",
    ("training", "seq_len"): "training.seq_len",
    ("training", "max_steps"): "training.steps",
    ("training", "max_grad_norm"): "training.max_norm",
    ("training", "dtype"): "training.dtype",
    ("training", "mixed_precision"): "training.mixed_precision_param",
    ("training", "seed"): "debug.seed",
    ("training", "deterministic"): "debug.deterministic",
    ("training", "log_interval"): "metrics.log_freq",
    ("parallelism", "tensor_parallel"): "parallelism.tensor_parallel_degree",
    ("parallelism", "pipeline_parallel"): "parallelism.pipeline_parallel_degree",
    ("parallelism", "context_parallel"): "parallelism.context_parallel_degree",
    ("parallelism", "expert_parallel"): "parallelism.expert_parallel_degree",
    ("parallelism", "data_parallel_replicate"): "parallelism.data_parallel_replicate_degree",
    ("parallelism", "sequence_parallel"): "parallelism.enable_sequence_parallel",
    ("parallelism", "pipeline_schedule"): "parallelism.pipeline_parallel_schedule",
    ("parallelism", "pipeline_microbatch_size"): "parallelism.pipeline_parallel_microbatch_size",
    ("parallelism", "reshard_after_forward"): "parallelism.fsdp_reshard_after_forward",
    ("parallelism", "async_tensor_parallel"): "compile.enable_async_tensor_parallel",
    ("parallelism", "fsdp_symmetric_memory"): "parallelism.enable_fsdp_symm_mem",
    ("lr_schedule", "decay_type"): "lr_scheduler.decay_type",
    ("lr_schedule", "decay_ratio"): "lr_scheduler.decay_ratio",
    ("lr_schedule", "min_lr_factor"): "lr_scheduler.min_lr_factor",
    ("lr_schedule", "total_steps"): "lr_scheduler.total_steps",
    ("checkpointing", "save_interval"): "checkpoint.interval",
    ("checkpointing", "keep_latest"): "checkpoint.keep_latest_k",
    ("checkpointing", "async_mode"): "checkpoint.async_mode",
    ("memory", "cpu_offload"): "training.enable_cpu_offload",
    ("compile", "enabled"): "compile.enable",
    ("compile", "backend"): "compile.backend",
    ("compile", "components"): "compile.components",
    ("wandb", "enabled"): "metrics.enable_wandb",
}

# Datasets of this toolkit beside torchtitan's: tokenized once into a file, in which every sample has a number.
MAP_STYLE_DATASETS = ("python_docs", "text", "tokens")

# Paths that other words of the recipe decide, and which.
_DECIDED_BY = {
    "dataloader.dataset_path": "[data] dataset_path",
    "hf_assets_path": "[data] tokenizer",
    "training.global_batch_size": "[training] global_batch_size",
    "parallelism.data_parallel_shard_degree": "[parallelism] data_parallel and data_parallel_replicate",
    "lr_scheduler.warmup_steps": "[lr_schedule] warmup_steps",
    "optimizer.implementation": "[optimizer] implementation",
    "checkpoint.folder": "[checkpointing] save_dir",
    "checkpoint.initial_load_path": "[checkpointing] resume_from_checkpoint",
    "checkpoint.initial_load_model_only": "[checkpointing] resume_from_checkpoint",
    "checkpoint.initial_load_in_hf": "[model] initial_weights",
    **{path: f"[{section}] {field}" for (section, field), path in WORDS.items()},
}

# Paths that would break what a run promises: resuming, and one folder for everything.
_NOT_FOR_RECIPES = {
    "dump_folder": "it is the attempt's folder",
    "checkpoint.enable": "a run without checkpoints cannot come back",
    "checkpoint.last_save_model_only": "a run could not go on from a checkpoint without optimizer state",
    "checkpoint.last_save_in_hf": "a run could not go on from a checkpoint without optimizer state",
    "checkpoint.load_only": "a run without checkpoints cannot come back",
    "checkpoint.load_step": "a run goes on from its newest checkpoint",
    "checkpoint.create_seed_checkpoint": "it ends before the first step",
    "comm.mode": "a run trains for real",
    "loss.loss_fn.global_vocab_size": "it follows from the model",
    "debug.batch_invariant": "torchtitan refuses it in pre-training",
}

# A day: longer than any step, save or compilation.
_NEVER_S = 86400
_TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


@functools.cache
def torchtitan_schema() -> dict[str, Any]:
    """What `tools/generate_torchtitan_schema.py` found in torchtitan: "fields", "datasets", "models", …"""
    text = Path(__file__).with_name("torchtitan.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def problem_with(path: str, value: Any, activation_checkpointing: str | None) -> tuple[str, str] | None:
    """What is wrong with a `[torchtitan]` path and its value, and a hint; None if nothing is.

    `activation_checkpointing` is None where the rest of the recipe does not say which kind it wants.
    """
    if path in _DECIDED_BY:
        return f"torchtitan's {path} has a name of its own in a recipe", f"use {_DECIDED_BY[path]}"
    if path in _NOT_FOR_RECIPES:
        return f"torchtitan's {path} is not for recipes: {_NOT_FOR_RECIPES[path]}", ""
    fields = torchtitan_schema()["fields"]
    if path not in fields:
        return f"torchtitan's configuration has no field {path!r}", did_you_mean(path, fields)
    field = fields[path]
    if activation_checkpointing and activation_checkpointing not in field.get("only_with", [activation_checkpointing]):
        kinds = " or ".join(field["only_with"])
        return f"torchtitan's {path} has no effect here", f"it belongs to [memory] activation_checkpointing = {kinds}"
    if not _has_type(value, field["type"]):
        return f"torchtitan's {path} is of type {field['type']}, not {value!r}", ""
    if "choices" in field and value not in field["choices"]:
        return f"torchtitan's {path} cannot be {value!r}", did_you_mean(str(value), field["choices"])
    return None


def torchtitan_values(recipe: Recipe, layout: Layout, extra: dict[str, Any], *, device: str) -> dict[str, Any]:
    """Every torchtitan path that a run sets, with its value. `extra`: the recipe's `[torchtitan]`, by path."""
    values: dict[str, Any] = {}
    for (section, field), path in WORDS.items():
        value = getattr(getattr(recipe, section), field)
        if value is not None:
            values[path] = _DTYPES.get(value, value) if isinstance(value, str) else value
    values |= {
        "training.global_batch_size": layout.global_batch_size,
        "parallelism.data_parallel_shard_degree": layout.data_parallel // layout.data_parallel_replicate,
        "lr_scheduler.warmup_steps": warmup_steps(recipe),
        "lr_scheduler.total_steps": recipe.lr_schedule.total_steps or recipe.training.max_steps,
        "checkpoint.enable": True,
        "checkpoint.last_save_model_only": False,
        # What hangs is ended by the run's watchdog, which writes the stacks first: torch's own limits come after it.
        "comm.init_timeout_seconds": _NEVER_S,
        "comm.train_timeout_seconds": _NEVER_S,
        # Log files are read by people and by `logs`, which has colours of its own.
        "metrics.disable_color_printing": True,
    }
    # CUDA graphs are on by default in torchtitan, which refuses them with pipeline or expert parallelism. Models of
    # transformers make their attention's mask within the step, and FSDP waits in it for what it copies to the host.
    no_graphs = layout.pipeline_parallel > 1 or layout.expert_parallel > 1 or recipe.model.name == "transformers"
    if device == "cpu" or no_graphs or recipe.memory.cpu_offload:
        values["training.disable_cuda_graphs"] = True
    return values | extra


def float8_values(recipe: Recipe) -> dict[str, Any] | None:
    """What `titan_slurm.train.float8` takes; None where the recipe has no float8."""
    return recipe.float8.model_dump(exclude={"enabled"}) if recipe.float8.enabled else None


def optimizer_values(recipe: Recipe) -> dict[str, Any]:
    """The optimizer, with torch's names for its arguments."""
    optimizer = recipe.optimizer
    kwargs = {
        "lr": learning_rate(recipe),
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    names = {"adamw": "AdamW", "adam": "Adam"}
    return {"name": names[optimizer.name], "implementation": optimizer.implementation, "kwargs": kwargs}


def learning_rate(recipe: Recipe) -> float:
    """The peak learning rate: `optimizer.lr`, or the same under its other name; if neither, torchtitan's 8e-4."""
    return recipe.optimizer.lr or recipe.training.learning_rate or 8e-4


def warmup_steps(recipe: Recipe) -> int:
    """Steps of warm-up: `lr_schedule.warmup_steps`, or the same under its other name; if neither, torchtitan's 200."""
    given = (recipe.lr_schedule.warmup_steps, recipe.training.warmup_steps)
    return next((steps for steps in given if steps is not None), 200)


def activation_checkpointing(recipe: Recipe) -> str:
    """full, selective, memory_budget or none; what the two fields of `[memory]` mean together."""
    memory = recipe.memory
    if isinstance(memory.activation_checkpointing, str):
        return memory.activation_checkpointing
    asked = memory.activation_checkpointing if memory.gradient_checkpointing is None else memory.gradient_checkpointing
    return "selective" if asked is None else "full" if asked else "none"


def _has_type(value: Any, name: str) -> bool:
    if name == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    # bool is an int in Python, and is not one in TOML.
    return isinstance(value, _TYPES[name]) and (name == "bool" or not isinstance(value, bool))
