"""DeepSpeed's JSON. Its fields and their defaults: deepspeed/runtime/{config,constants,lr_schedules}.py and
runtime/zero/{config,offload_config}.py of DeepSpeed 0.19."""

from dataclasses import dataclass
from typing import Any

from titan_slurm.recipe.convert.common import (
    AUTO,
    Conversion,
    Fields,
    SourceField,
    clip_gradients,
    mixed_precision,
    replicate,
    truth,
    whole,
)

_DEFAULT = "DeepSpeed's default"
_OFF: tuple[Any, ...] = (False, None, 0, "none", "off", "", [], {})

_BY_ITSELF = (
    "DeepSpeed's tuning of its own communication and memory; FSDP2 shards layer by layer and overlaps by itself"
)
_SWAPPING = "how DeepSpeed moves what it offloads; torchtitan offloads through pinned host memory"
_LOSS_SCALE = "only fp16 needs a loss scale"
_FUSED = "[optimizer] implementation is fused, unless the recipe says otherwise"
_LOGGED = "every logged step has its loss, time, memory and MFU, in metrics.jsonl of the run and in wandb"
_CHECKPOINTS = "checkpoints are torch's distributed ones (DCP): any number of ranks can load them"

# Why nothing is missed, by field or table.
_NOT_NEEDED = {
    "$schema": "for an editor",
    "_comment": "for readers",
    **dict.fromkeys(
        (
            f"zero_optimization.{name}"
            for name in (
                "allgather_partitions",
                "allgather_bucket_size",
                "overlap_comm",
                "reduce_scatter",
                "reduce_bucket_size",
                "use_multi_rank_bucket_allreduce",
                "contiguous_gradients",
                "compute_grad_norm",
                "sub_group_size",
                "round_robin_gradients",
                "parameter_alignment",
                "memory_efficient_linear",
                "override_module_apply",
                "pipeline_loading_checkpoint",
                "log_trace_cache_warnings",
                "enable_sanity_checks",
                "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold",
                "stage3_model_persistence_threshold",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
                "stage3_module_granularity_threshold",
                "stage3_use_all_reduce_for_fetch_params",
                "stage3_allgather_sequential",
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
            )
        ),
        _BY_ITSELF,
    ),
    **dict.fromkeys(
        (
            f"zero_optimization.{table}.{name}"
            for table in ("offload_param", "offload_optimizer")
            for name in (
                "pin_memory",
                "nvme_path",
                "buffer_count",
                "buffer_size",
                "max_in_cpu",
                "pipeline_read",
                "pipeline_write",
                "pipeline",
                "fast_init",
                "cpuadam_cores_perc",
            )
        ),
        _SWAPPING,
    ),
    "zero_optimization.cpu_offload_use_pin_memory": _SWAPPING,
    "aio": _SWAPPING,
    "zero_optimization.ignore_unused_parameters": "torchtitan's models use all of their parameters",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "checkpoint.tag_validation": _CHECKPOINTS,
    "checkpoint.load_universal": _CHECKPOINTS,
    "checkpoint.parallel_write": _CHECKPOINTS,
    **dict.fromkeys(
        (
            f"fp16.{name}"
            for name in (
                "loss_scale",
                "loss_scale_window",
                "initial_scale_power",
                "hysteresis",
                "consecutive_hysteresis",
                "min_loss_scale",
            )
        ),
        _LOSS_SCALE,
    ),
    "bf16.check_overflow": _LOSS_SCALE,
    "bf16.immediate_grad_update": _BY_ITSELF,
    "optimizer.legacy_fusion": _FUSED,
    "optimizer.params.torch_adam": _FUSED,
    "optimizer.params.fused": _FUSED,
    "optimizer.params.foreach": _FUSED,
    "scheduler.params.last_batch_iteration": "a run goes on where it stopped",
    "zero_allow_untested_optimizer": "the optimizer is torch's own",
    "zero_force_ds_cpu_optimizer": "the optimizer is torch's own",
    "wall_clock_breakdown": _LOGGED,
    "memory_breakdown": _LOGGED,
    "flops_profiler": _LOGGED,
    "csv_monitor": _LOGGED,
    "timers": _LOGGED,
    "log_level": _LOGGED,
    "dump_state": "titan-slurm recipes show prints every value and where it came from",
    "dataloader_drop_last": "only whole batches are trained on",
    "disable_python_gc": "torchtitan collects at an interval: [torchtitan] training.gc_freq",
    "managed_gradient_accumulation": "torchtitan accumulates by itself",
    "prescale_gradients": "gradients are averaged over all ranks",
    "gradient_predivide_factor": "gradients are averaged over all ranks",
    "disable_allgather": _BY_ITSELF,
    "elasticity": "a run goes on with the same samples on any number of nodes: submit --resume --nodes N",
    "tensor_parallel.tp_overlap_comm": "[torchtitan] compile.enable_async_tensor_parallel overlaps it, if compiled",
}

# What torchtitan does not do, by field or table. Switched off, it is not missed.
_MISSING = {
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ keeps a second shard within a node; [parallelism] "
    "data_parallel_replicate = the number of nodes (HSDP) keeps gathering within a node too, for more memory",
    "zero_optimization.mics_shard_size": "MiCS shards within groups of ranks: so does [parallelism] "
    "data_parallel_replicate = the number of groups (HSDP)",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS gathers in two stages; FSDP2 does not",
    "zero_optimization.zero_quantized_weights": "torchtitan quantizes weights for communication in float8 only",
    "zero_optimization.zero_quantized_nontrainable_weights": "torchtitan trains all weights",
    "zero_optimization.zero_quantized_gradients": "torchtitan does not quantize gradients for communication",
    "zero_optimization.zenflow": "torchtitan has no ZenFlow: it offloads all or nothing, and waits for it",
    "zero_optimization.leaf_module": "FSDP2 wraps each transformer layer",
    "zero_optimization.legacy_stage1": "FSDP2 shards optimizer states and gradients",
    "zero_optimization.offload_optimizer.super_offload": "torchtitan has no SuperOffload",
    "optimizer.params.bias_correction": "AdamW corrects the bias",
    "optimizer.params": "a setting of DeepSpeed's own optimizer",
    "optimizer.params.amsgrad": "torchtitan's AdamW has no AMSGrad variant",
    "activation_checkpointing": "torchtitan recomputes the activations of a layer where they are needed, without "
    "DeepSpeed's own handling; with [parallelism] tensor_parallel they are sharded along the sequence",
    "communication_data_type": "torchtitan reduces gradients in fp32",
    "seq_parallel_communication_data_type": "torchtitan decides the precision of this communication",
    "gradient_allreduce_op": "gradients are averaged over all ranks",
    "data_types": "the precision of weights, gradients and optimizer states is [training] dtype",
    "amp": "torchtitan computes in [training] mixed_precision, by FSDP2",
    "torch_autocast": "torchtitan computes in [training] mixed_precision, by FSDP2",
    "fp16": "torchtitan has no fp16",
    "bf16": "the precision of the computation is [training] mixed_precision, of everything else [training] dtype",
    "checkpoint": _CHECKPOINTS,
    "sparse_gradients": "torchtitan's gradients are dense",
    "sparse_attention": "torchtitan has no such attention",
    "tensor_parallel": "torchtitan knows how to split the layers of its own models",
    "expert_parallel": "torchtitan's models bring their own settings of experts",
    "pipeline": "[parallelism] pipeline_parallel splits the model by layers",
    "autotuning": "titan-slurm has no tuner of its own",
    "compression_training": "torchtitan neither prunes nor quantizes for inference",
    "quantize_training": "torchtitan neither prunes nor quantizes for inference",
    "weight_quantization": "torchtitan neither prunes nor quantizes for inference",
    "progressive_layer_drop": "torchtitan trains every layer in every step",
    "eigenvalue": "torchtitan computes no eigenvalues",
    "data_efficiency": "torchtitan has no curriculum and no sampling by difficulty",
    "curriculum_learning": "torchtitan has no curriculum and no sampling by difficulty",
    "hybrid_engine": "torchtitan only trains; it generates nothing",
    "comms_logger": "[torchtitan] profiler.enable_profiling shows all communication",
    "tensorboard": "TensorBoard's files are in the run's folder, in tensorboard",
    "comet": "wandb is what runs are logged to",
    "wandb": "no such setting of wandb",
    "compile": "[compile] has enabled and backend",
    "elasticity.enabled": "a run does not change its batch by itself; it goes on with the same samples on "
    "any number of nodes: submit --resume --nodes N",
    "vocabulary_size": "[model] has it",
    "use_data_before_expert_parallelism": "torchtitan orders the ranks itself",
}


@dataclass(frozen=True)
class Around:
    """What is known from outside DeepSpeed's own fields."""

    data_parallel: int | None = None
    """Data-parallel ranks."""
    precision: tuple[str, SourceField] | None = None
    """What "auto" in bf16 and fp16 stands for, and the field that says so."""
    by_itself: bool = False
    """Whether the file is all there is: what it does not say is then as DeepSpeed's defaults have it."""


def convert(fields: Fields, conversion: Conversion, around: Around) -> None:
    """Put DeepSpeed's fields into the recipe or into the report."""
    _batch(fields, conversion, around)
    _precision(fields, conversion, around)
    _zero(fields, conversion, around)
    _optimizer(fields, conversion)
    _schedule(fields, conversion)
    _other_words(fields, conversion, around)
    for key, found in fields.items():
        if not conversion.is_settled(found):
            _by_table(fields, conversion, ".".join(key), found)


def _batch(fields: Fields, conversion: Conversion, around: Around) -> None:
    """train_batch_size = micro batch × accumulation steps × data-parallel ranks; any may be left out."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, accumulation = given = [conversion.given(fields.get(name)) for name in names]
    if any(found and (whole(found.value) or 0) < 1 for found in given):
        conversion.lost("a batch and its steps must be whole numbers above 0", *given)
        return
    batch, per_rank, steps = (whole(found.value) if found else None for found in given)
    if batch is None:
        _batch_without_total(fields, conversion, micro, accumulation)
        return
    ranks = around.data_parallel
    if per_rank is None and ranks and batch % (ranks * (steps or 1)) == 0:
        per_rank = batch // (ranks * (steps or 1))
    if per_rank is None:
        conversion.put("training.global_batch_size", batch, total)
        reason = "[training] batch_size is train_batch_size / accumulation steps / data-parallel ranks"
        conversion.lost(reason, accumulation)
        return
    conversion.put("training.batch_size", per_rank, micro or total)
    unit = per_rank * (ranks or 1) * (steps or 1)
    if batch % unit or (ranks and steps and batch != unit):
        reason = f"{batch} is not micro batch {per_rank} × accumulation steps × data-parallel ranks"
        conversion.lost(reason, total, accumulation)
        return
    ranks = ranks or (batch // unit if steps else None)
    remark = f"on {ranks} data-parallel ranks {batch // per_rank // ranks} accumulation steps" if ranks else ""
    conversion.put("training.global_batch_size", batch, total, accumulation, remark=remark)


def _batch_without_total(
    fields: Fields, conversion: Conversion, micro: SourceField | None, accumulation: SourceField | None
) -> None:
    if micro:
        conversion.put("training.batch_size", micro.value, micro)
    if accumulation:
        conversion.put("training.gradient_accumulation_steps", accumulation.value, accumulation)
    elif micro and fields.get("gradient_accumulation_steps") is None and fields.get("train_batch_size") is None:
        conversion.put("training.gradient_accumulation_steps", 1, because=_DEFAULT)


def _precision(fields: Fields, conversion: Conversion, around: Around) -> None:
    _weights(fields, conversion)
    dtype = fields.get("torch_autocast.dtype")
    autocast = "bf16" if dtype is None or "bf" in str(dtype.value) else "fp16"
    switches = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "torch_autocast": autocast}
    there = {found: kind for name, kind in switches.items() if (found := fields.get(f"{name}.enabled"))}
    on = [found for found in there if truth(found.value)]
    off = [found for found in there if truth(found.value) is False]
    automatic = [found for found in there if found.value == AUTO]
    for found in on:
        of_autocast = dtype if found is fields.get("torch_autocast.enabled") else None
        mixed_precision(conversion, there[found], found, of_autocast)
    if around.precision:
        mixed_precision(conversion, *around.precision, *automatic)
    if on or automatic or around.precision:
        conversion.not_needed("off", *off)
    elif off:
        mixed_precision(conversion, "fp32", *off)
    elif not there and around.by_itself:
        conversion.notes.append(
            "Neither bf16 nor fp16: DeepSpeed alone then computes in fp32. This recipe computes in bf16 unless "
            '[training] mixed_precision = "fp32".'
        )


def _weights(fields: Fields, conversion: Conversion) -> None:
    master = fields.get("bf16.bf16_master_weights_and_grads")
    states = fields.get("bf16.bf16_optimizer_states")
    both = [found for found in (master, states) if found]
    if len(both) == 2 and all(truth(found.value) for found in both):
        conversion.put("training.dtype", "bf16", *both)
    elif any(truth(found.value) for found in both):
        reason = 'torchtitan keeps weights, gradients and optimizer states in one precision: [training] dtype = "bf16"'
        conversion.lost(reason, *both)
    elif both:
        conversion.put("training.dtype", "fp32", *both)


def _zero(fields: Fields, conversion: Conversion, around: Around) -> None:
    stage = conversion.given(fields.get("zero_optimization.stage"))
    number = whole(stage.value) if stage else None
    if number in (1, 2):
        remark = f"as ZeRO-{number}, with gathered parameters kept; FSDP2 shards gradients and optimizer states always"
        conversion.put("parallelism.reshard_after_forward", "never", stage, remark=remark)
    elif number == 3:
        conversion.put("parallelism.reshard_after_forward", "always", stage)
    elif number == 0:
        replicate(conversion, around.data_parallel, stage)
    elif stage:
        conversion.lost("ZeRO has stages 0 to 3", stage)
    elif fields.get("zero_optimization.stage") is None and around.by_itself:
        conversion.notes.append(
            "No ZeRO stage: DeepSpeed then keeps whole copies on every rank (DDP). This recipe shards (FSDP) unless "
            "[parallelism] data_parallel_replicate is the number of data-parallel ranks."
        )
    _offload(fields, conversion)
    _export(fields, conversion)


def _offload(fields: Fields, conversion: Conversion) -> None:
    devices: dict[str, list[SourceField]] = {"cpu": [], "nvme": [], "none": []}
    for name in ("offload_param.device", "offload_optimizer.device"):
        found = conversion.given(fields.get(f"zero_optimization.{name}"))
        if found and str(found.value) in devices:
            devices[str(found.value)].append(found)
    for name in ("cpu_offload", "cpu_offload_params", "cpu_offload_param"):
        found = conversion.given(fields.get(f"zero_optimization.{name}"))
        if found:
            devices["cpu" if truth(found.value) else "none"].append(found)
    away = devices["cpu"] + devices["nvme"]
    conversion.lost("torchtitan offloads to host memory, not to NVMe", *devices["nvme"])
    if away:
        remark = "torchtitan offloads parameters, gradients and optimizer states together"
        conversion.put("memory.cpu_offload", True, *away, remark=remark)
        conversion.not_needed("offloaded together with the rest", *devices["none"])
    elif devices["none"]:
        conversion.put("memory.cpu_offload", False, *devices["none"])


def _export(fields: Fields, conversion: Conversion) -> None:
    """Weights that are gathered for a save are what others read: the export."""
    for name in (
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "gather_16bit_weights_on_model_save",
    ):
        found = fields.get(f"zero_optimization.{name}")
        if found and found.value != AUTO:
            conversion.put("checkpointing.export_to_hf", truth(found.value), found)


def _optimizer(fields: Fields, conversion: Conversion) -> None:
    kind = conversion.given(fields.get("optimizer.type"))
    if kind is None:
        return
    name = str(kind.value).lower()
    if name in ("onebitadam", "zerooneadam"):
        conversion.lost(
            "torchtitan does not compress the communication of gradients; AdamW is what comes nearest", kind
        )
    elif name not in ("adam", "adamw"):
        reason = f"torchtitan trains with AdamW or Adam, and what fits {kind.value} need not fit them"
        conversion.lost(reason, *fields.below("optimizer"))
        return
    params = {
        each: conversion.given(fields.get(f"optimizer.params.{each}"))
        for each in ("adam_w_mode", "betas", "eps", "weight_decay", "max_grad_norm")
    }
    mode = params["adam_w_mode"]
    coupled = name == "adam" and mode is not None and truth(mode.value) is False
    remark = 'DeepSpeed\'s "Adam" decays weights as AdamW does, unless adam_w_mode = false' if name == "adam" else ""
    conversion.put("optimizer.name", "adam" if coupled else "adamw", kind, mode, remark="" if mode else remark)
    if params["eps"]:
        conversion.put("optimizer.eps", params["eps"].value, params["eps"])
    _betas_and_decay(fields, conversion, params["betas"], params["weight_decay"])
    if fields.get("gradient_clipping") is None:
        clip_gradients(conversion, params["max_grad_norm"])


def _betas_and_decay(
    fields: Fields, conversion: Conversion, betas: SourceField | None, decay: SourceField | None
) -> None:
    """Both have other defaults in a recipe: those of torchtitan."""
    if betas and isinstance(betas.value, list) and len(betas.value) == 2:
        if conversion.put("optimizer.beta1", betas.value[0], betas):
            conversion.put("optimizer.beta2", betas.value[1], betas)
    elif betas:
        conversion.lost("betas are two numbers", betas)
    elif fields.get("optimizer.params.betas") is None:
        conversion.put("optimizer.beta1", 0.9, because=_DEFAULT)
        conversion.put("optimizer.beta2", 0.999, because=_DEFAULT)
    if decay:
        conversion.put("optimizer.weight_decay", decay.value, decay)
    elif fields.get("optimizer.params.weight_decay") is None:
        torch_adam = fields.get("optimizer.params.torch_adam")
        is_torch = torch_adam is not None and truth(torch_adam.value)
        is_adamw = conversion.get("optimizer.name") == "adamw"
        conversion.put("optimizer.weight_decay", 0.01 if is_torch and is_adamw else 0.0, because=_DEFAULT)


def _schedule(fields: Fields, conversion: Conversion) -> None:
    kind = conversion.given(fields.get("scheduler.type"))
    name = str(kind.value).lower() if kind else ""
    shapes: dict[str, dict[str, Any]] = {
        # decay_ratio 0 is torchtitan's own way to say: stable after the warm-up.
        "warmuplr": {"decay_ratio": 0.0},
        "warmupdecaylr": {"decay_type": "linear", "min_lr_factor": 0.0},
        "warmupcosinelr": {"decay_type": "cosine"},
    }
    if kind and name in shapes:
        for word, value in shapes[name].items():
            conversion.put(f"lr_schedule.{word}", value, kind)
        _warmup(fields, conversion)
        _end_of_schedule(fields, conversion, is_cosine=name == "warmupcosinelr")
    elif kind:
        conversion.lost("torchtitan has a linear warm-up, then stable, then decay", *fields.below("scheduler"))
    _learning_rate(fields, conversion, name if name in shapes else "")


def _warmup(fields: Fields, conversion: Conversion) -> None:
    steps = conversion.given(fields.get("scheduler.params.warmup_num_steps"))
    shape = conversion.given(fields.get("scheduler.params.warmup_type"))
    is_linear = shape is not None and shape.value == "linear"
    remark = "" if is_linear else 'linear here; DeepSpeed\'s warm-up is logarithmic unless warmup_type = "linear"'
    if steps:
        conversion.put("lr_schedule.warmup_steps", steps.value, steps, remark=remark)
    elif fields.get("scheduler.params.warmup_num_steps") is None:
        conversion.put("lr_schedule.warmup_steps", 1000, because=_DEFAULT, remark=remark)
    if shape:
        conversion.lost_if(not is_linear, "torchtitan's warm-up is linear", shape)
    for name in ("warmup_min_lr", "warmup_min_ratio"):
        start = conversion.given(fields.get(f"scheduler.params.{name}"))
        if start:
            conversion.lost_if(start.value != 0, "torchtitan's warm-up begins at 0", start)


def _end_of_schedule(fields: Fields, conversion: Conversion, *, is_cosine: bool) -> None:
    total = conversion.given(fields.get("scheduler.params.total_num_steps"))
    if total and conversion.put("lr_schedule.total_steps", total.value, total):
        conversion.put("training.max_steps", total.value, total)
    lowest = conversion.given(fields.get("scheduler.params.cos_min_ratio"))
    if lowest:
        conversion.put("lr_schedule.min_lr_factor", lowest.value, lowest)
    elif is_cosine and fields.get("scheduler.params.cos_min_ratio") is None:
        conversion.put("lr_schedule.min_lr_factor", 0.0001, because=_DEFAULT)


def _learning_rate(fields: Fields, conversion: Conversion, schedule: str) -> None:
    """The peak is the schedule's, where it has one."""
    peak = conversion.given(fields.get("scheduler.params.warmup_max_lr")) if schedule else None
    optimizer = fields.get("optimizer.type")
    if optimizer and optimizer.value != AUTO and conversion.get("optimizer.name") is None:
        conversion.lost(f"a learning rate for {optimizer.value}", peak)
        return
    rate = conversion.given(fields.get("optimizer.params.lr"))
    if peak:
        conversion.put("optimizer.lr", peak.value, peak)
    elif schedule == "warmupdecaylr" and fields.get("scheduler.params.warmup_max_lr") is None:
        conversion.put("optimizer.lr", 0.001, because=f"{_DEFAULT} of scheduler.params.warmup_max_lr")
    if rate and conversion.get("optimizer.lr") not in (None, rate.value):
        conversion.lost("the schedule rises to its own warmup_max_lr, which the recipe follows", rate)
    elif rate:
        conversion.put("optimizer.lr", rate.value, rate)


def _other_words(fields: Fields, conversion: Conversion, around: Around) -> None:
    if fields.get("gradient_clipping"):
        clip_gradients(conversion, fields.get("gradient_clipping"))
    elif conversion.get("training.max_grad_norm") is None and around.by_itself:
        conversion.notes.append(
            "No gradient_clipping: DeepSpeed 0.19 then clips to 1.0, as this recipe does; older ones do not clip "
            "([training] max_grad_norm = 1e9)."
        )
    words = {
        "steps_per_print": "training.log_interval",
        "tensor_parallel.autotp_size": "parallelism.tensor_parallel",
        "tensor_parallel.tp.tp_size": "parallelism.tensor_parallel",
        "tensor_parallel.tp_size": "parallelism.tensor_parallel",
        "wandb.enabled": "wandb.enabled",
        "wandb.project": "wandb.project",
        "wandb.group": "wandb.group",
        "wandb.team": "wandb.entity",
        "compile.enabled": "compile.enabled",
        "compile.backend": "compile.backend",
    }
    for path, word in words.items():
        found = conversion.given(fields.get(path))
        # 0 is how DeepSpeed says that it has none of it.
        if found and (found.value is False or found.value != 0):
            conversion.put(word, found.value, found)
    _experts(fields, conversion)
    # Some configs say it the other way round.
    not_compiled = conversion.given(fields.get("compile.disable"))
    if not_compiled and fields.get("compile.enabled") is None and truth(not_compiled.value) is not None:
        conversion.put("compile.enabled", not truth(not_compiled.value), not_compiled)
    ulysses = conversion.given(fields.get("sequence_parallel_size"))
    if ulysses:
        remark = "context parallelism in place of Ulysses"
        conversion.put("parallelism.context_parallel", ulysses.value, ulysses, remark=remark)
    board = conversion.given(fields.get("tensorboard.enabled"))
    if board and truth(board.value):
        conversion.put_torchtitan("metrics.enable_tensorboard", True, board)
    _recomputation(fields, conversion)


def _experts(fields: Fields, conversion: Conversion) -> None:
    """The degree counts only where the section is switched on, which it is not by default."""
    switch = conversion.given(fields.get("expert_parallel.enabled"))
    degree = conversion.given(fields.get("expert_parallel.autoep_size"))
    if switch and truth(switch.value):
        if degree:
            conversion.put("parallelism.expert_parallel", degree.value, degree, switch)
    elif degree:
        conversion.not_needed("expert_parallel.enabled is off", degree, switch)


def _recomputation(fields: Fields, conversion: Conversion) -> None:
    section = fields.below("activation_checkpointing")
    used = [found for found in section if found.value not in (*_OFF, AUTO)]
    if used:
        remark = "the section only says how; whether anything is recomputed is in the code of a model for DeepSpeed"
        conversion.put("memory.activation_checkpointing", "full", *used, remark=remark)
        conversion.lost(_MISSING["activation_checkpointing"], *used)


def _by_table(fields: Fields, conversion: Conversion, path: str, found: SourceField) -> None:
    """Report a field by the entry for it, or for the nearest table around it."""
    for prefix in _prefixes(path):
        if prefix in _NOT_NEEDED:
            conversion.not_needed(_NOT_NEEDED[prefix], found)
            return
        if prefix in _MISSING and conversion.given(found):
            table = path.split(".")[0]
            switch = fields.get(f"{table}.enabled")
            is_off = found.value in _OFF or (switch is not None and truth(switch.value) is False)
            if is_off or (found.value == 1 and prefix.endswith("_size")):
                conversion.not_needed("switched off", found)
            else:
                conversion.lost(_MISSING[prefix], found)
            return


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
