"""torchtitan's TOML job config, which 0.3 has no more. Its fields and their defaults: torchtitan/config_manager.py of
0.1 and torchtitan/config/job_config.py of 0.2; older files differ in names."""

from collections.abc import Iterable
from typing import Any

from titan_slurm.errors import did_you_mean
from titan_slurm.recipe import mapping
from titan_slurm.recipe.convert.common import Conversion, Fields, SourceField, clip_gradients, truth, whole
from titan_slurm.toml import Key

_DEFAULT = "torchtitan's default"
_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
_WORD_OF = {path: f"{section}.{name}" for (section, name), path in mapping.WORDS.items()}

# What tables and fields were called before 0.3; a field's own entry comes before that of its table.
_TABLES = {
    "profiling": "profiler",
    "validation": "validator",
    "training.dataloader": "dataloader",
    "validation.dataloader": "validator.dataloader",
    # Before there was [parallelism].
    "experimental": "parallelism",
}
_RENAMED = {
    "job.print_config": "debug.print_config",
    "job.print_args": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "model.tokenizer_path": "hf_assets_path",
    "training.batch_size": "training.local_batch_size",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "training.debug_moe_force_load_balance": "debug.moe_force_load_balance",
    "training.compile": "compile.enable",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.enable_float8_linear": "float8.enable_float8_linear",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    "experimental.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    "experimental.custom_import": "experimental.custom_import",
    "experimental.custom_args_module": "experimental.custom_args_module",
    "experimental.custom_model_path": "experimental.custom_model_path",
    "validation.enabled": "validator.enable",
    "validation.dataset": "validator.dataloader.dataset",
    "validation.dataset_path": "validator.dataloader.dataset_path",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.initial_load_dequantize": "checkpoint.initial_load_in_hf_quantized",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "activation_checkpoint"
    ".force_recompute_mm_shapes_by_fqns",
    "debug.ac_preserve_rng_state": "activation_checkpoint.preserve_rng_state",
    "debug.ac_determinism_check": "activation_checkpoint.determinism_check",
    "debug.ac_debug": "activation_checkpoint.debug",
    "memory_estimation.enabled": "memory_estimation.enable",
}

# Fields that only count while something is switched on.
_SWITCHES = {
    "validator": "validator.enable",
    "profiler.profile_freq": "profiler.enable_profiling",
    "profiler.profiler_active": "profiler.enable_profiling",
    "profiler.profiler_warmup": "profiler.enable_profiling",
    "profiler.save_traces_folder": "profiler.enable_profiling",
    "profiler.save_memory_snapshot_folder": "profiler.enable_memory_snapshot",
    "metrics.save_tb_folder": "metrics.enable_tensorboard",
    "memory_estimation": "memory_estimation.enable",
    "fault_tolerance": "fault_tolerance.enable",
}

# What converts to float8, which is also the table that says how.
_FLOAT8_TABLES = ("float8", "quantize.linear.float8", "quantize.dense.float8")
_GROUPED_TABLES = ("quantize.grouped_mm.float8", "quantize.moe.float8")
_ROWWISE = "float8 has a scale for each row, and weights are gathered in bf16"

# What 0.3 or a recipe does not have, by field or table: the value that asks for nothing else, and what to say.
_GONE: dict[str, tuple[Any, str]] = {
    "job.config_file": (None, "it named this file"),
    "job.use_for_integration_test": (None, "for torchtitan's own tests"),
    "job.custom_config_module": ("", "titan-slurm runs torchtitan's models with fields that a recipe can name"),
    "experimental.custom_args_module": ("", "titan-slurm runs torchtitan's models with fields that a recipe can name"),
    "experimental.custom_import": ("", "titan-slurm runs torchtitan's own models, and those of Hugging Face"),
    "experimental.custom_model_path": ("", "titan-slurm runs torchtitan's own models, and those of Hugging Face"),
    "model.print_after_conversion": (False, "torchtitan 0.3 does not print a model"),
    "model.norm_type": ("rmsnorm", "torchtitan 0.3 has the norm that belongs to the model"),
    "optimizer.early_step_in_backward": (False, "torchtitan 0.3 steps after the backward pass, and clips gradients"),
    "parallelism.disable_loss_parallel": (False, "torchtitan 0.3 computes the loss in parallel wherever it can"),
    "parallelism.enable_compiled_autograd": (False, "torchtitan 0.3 has no compiled autograd"),
    "parallelism.expert_tensor_parallel_degree": (1, "torchtitan 0.3 takes the ranks of experts out of data × tensor"),
    "parallelism.expert_parallel_comm_backend": ("standard", "a model brings its own way for experts to communicate"),
    "parallelism.expert_parallel_a2a_impl": ("default", "a model brings its own way for experts to communicate"),
    "parallelism.context_parallel_rotate_method": ("allgather", "torchtitan 0.3 gathers keys and values"),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (None, "torchtitan 0.3 decides by the schedule"),
    "parallelism.pipeline_parallel_split_points": (
        [],
        "torchtitan 0.3 splits by layers: [torchtitan] parallelism.pipeline_parallel_layers_per_stage",
    ),
    "parallelism.module_fqns_per_model_part": (
        [],
        "torchtitan 0.3 splits by layers: [torchtitan] parallelism.pipeline_parallel_layers_per_stage",
    ),
    "checkpoint.interval_type": ("steps", "[checkpointing] save_interval is in steps"),
    "checkpoint.enable_ft_dataloader_checkpoints": (True, "a run goes on with the same samples after any restart"),
    "activation_checkpoint.early_stop": (False, "torchtitan 0.3 does not let this be chosen"),
    "float8.emulate": (False, "float8 is not emulated"),
    "quantize.linear.float8.emulate": (False, "float8 is not emulated"),
    "float8.force_recompute_fp8_weight_in_bwd": (False, _ROWWISE),
    # No number is neutral: whether it is that of training is not said here.
    "validator.local_batch_size": ("", "torchtitan 0.3 validates with training's batch size"),
    "validator.seq_len": ("", "torchtitan 0.3 validates with training's sequence length"),
    "comm.mode": ("default", "a run trains for real"),
    "fault_tolerance": (False, "a run that loses a rank is started again from its newest checkpoint"),
    "memory_estimation": (False, "titan-slurm validate checks a recipe without a GPU"),
    "mx": (None, "titan-slurm has no MX formats"),
    "quantize.linear.mx": (None, "titan-slurm has no MX formats"),
    "quantize.grouped_mm.mx": (None, "titan-slurm has no MX formats"),
}


def convert(fields: Fields, conversion: Conversion) -> None:
    """Put the fields of a job config into the recipe or into the report."""
    now = _names_of_today(fields)
    _about(now, conversion)
    _model(now, conversion)
    _data(now, conversion)
    _batch(now, conversion)
    _degrees(now, conversion)
    _optimizer(now, conversion)
    _checkpoint(now, conversion)
    _recomputation(now, conversion)
    _quantization(now, conversion)
    if now.get("metrics.enable_wandb") is None and not conversion.has_base:
        conversion.put("wandb.enabled", False, because=f"{_DEFAULT} of metrics.enable_wandb")
    for path, switch in _SWITCHES.items():
        _off_with(now, conversion, path, switch)
    for key, found in now.items():
        if not conversion.is_settled(found):
            _by_path(conversion, ".".join(key), found)


def _names_of_today(fields: Fields) -> Fields:
    """The fields by what 0.3 calls them, where it has them."""

    def rename(key: Key) -> Key:
        path = ".".join(key)
        if path in _RENAMED:
            return tuple(_RENAMED[path].split("."))
        table = next((table for table in _longest_first(_TABLES) if path.startswith(f"{table}.")), None)
        return tuple((_TABLES[table] + path.removeprefix(table)).split(".")) if table else key

    return fields.renamed(rename)


def _longest_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=len, reverse=True)


def _about(now: Fields, conversion: Conversion) -> None:
    description = conversion.given(now.get("job.description"))
    if description:
        conversion.put("recipe.description", description.value, description)
    conversion.not_needed("a run has a folder of its own: submit --runs-dir", now.get("job.dump_folder"))


def _model(now: Fields, conversion: Conversion) -> None:
    name, flavor = conversion.given(now.get("model.name")), conversion.given(now.get("model.flavor"))
    families = mapping.torchtitan_schema()["models"]
    family = str(name.value) if name else "llama3"
    size = str(flavor.value) if flavor else "debugmodel"
    plain = size.removesuffix("_attn").removesuffix("_flex").removesuffix("_varlen")
    if family not in families:
        reason = (
            f"a recipe can name no such model of torchtitan 0.3: [model] is left to you (known: {', '.join(families)})"
        )
        conversion.lost(reason, name, flavor)
        return
    conversion.put("model.name", family, name, because=_DEFAULT)
    if plain not in families[family]:
        conversion.lost(f"{family} has no such flavor ({did_you_mean(plain, families[family])})", flavor)
        return
    remark = "attention is FlexAttention here" if plain != size else ""
    conversion.put("model.flavor", plain, flavor, because=_DEFAULT, remark=remark)


def _data(now: Fields, conversion: Conversion) -> None:
    dataset = conversion.given(now.get("dataloader.dataset"))
    known = mapping.torchtitan_schema()["datasets"]
    if dataset and dataset.value not in known:
        hint = did_you_mean(str(dataset.value), known)
        conversion.lost(f'torchtitan 0.3 has no such dataset ({hint}); dataset = "text" takes your own files', dataset)
    elif dataset or not conversion.has_base:
        conversion.put("data.dataset", dataset.value if dataset else "c4_test", dataset, because=_DEFAULT)
    path = conversion.given(now.get("dataloader.dataset_path"))
    if path and path.value:
        conversion.put("data.dataset_path", path.value, path)
    else:
        conversion.not_needed("empty", path)
    assets = conversion.given(now.get("hf_assets_path"))
    if assets and str(assets.value).endswith(".model"):
        reason = (
            "a tokenizer of the old format: set [data] tokenizer to a folder with a Hugging Face one (tokenizer.json), "
            "which torchtitan's scripts/download_hf_assets.py fetches"
        )
        conversion.lost(reason, assets)
    elif assets:
        conversion.put("data.tokenizer", assets.value, assets)
    conversion.not_needed("hf_assets_path is what torchtitan looks at", now.get("model.tokenizer_path"))


def _batch(now: Fields, conversion: Conversion) -> None:
    local = conversion.given(now.get("training.local_batch_size"))
    if local or not conversion.has_base:
        conversion.put("training.batch_size", local.value if local else 8, local, because=_DEFAULT)
    total = conversion.given(now.get("training.global_batch_size"))
    size = whole(total.value) if total else -1
    if size is not None and size < 0:
        because = f"{_DEFAULT} of training.global_batch_size"
        conversion.put("training.gradient_accumulation_steps", 1, total, because=because)
    else:
        conversion.put("training.global_batch_size", total and total.value, total)


def _degrees(now: Fields, conversion: Conversion) -> None:
    """The data-parallel degrees: a recipe says the product and the copies."""
    copies = conversion.given(now.get("parallelism.data_parallel_replicate_degree"))
    shards = conversion.given(now.get("parallelism.data_parallel_shard_degree"))
    if copies:
        conversion.put("parallelism.data_parallel_replicate", copies.value, copies)
    if shards and (whole(shards.value) or 0) < 0:
        conversion.not_needed("all remaining ranks; so does a recipe that leaves data_parallel out", shards)
    elif shards:
        product = (whole(shards.value) or 0) * (conversion.get("parallelism.data_parallel_replicate") or 1)
        conversion.put("parallelism.data_parallel", product, copies, shards)
    schedule = conversion.given(now.get("parallelism.pipeline_parallel_schedule"))
    if schedule:
        names = {name.lower(): name for name in mapping.torchtitan_schema()["pipeline_schedules"]}
        name = names.get(str(schedule.value).lower().replace("_", ""))
        if name:
            conversion.put("parallelism.pipeline_schedule", name, schedule)
        else:
            conversion.lost(f"no such schedule ({did_you_mean(str(schedule.value), names.values())})", schedule)


def _optimizer(now: Fields, conversion: Conversion) -> None:
    name = conversion.given(now.get("optimizer.name"))
    if name and str(name.value).lower() in ("adamw", "adam"):
        conversion.put("optimizer.name", str(name.value).lower(), name)
    elif name:
        conversion.lost("torchtitan 0.3 trains with AdamW or Adam", *now.below("optimizer"))
    for field in ("lr", "beta1", "beta2", "eps", "weight_decay", "implementation"):
        found = conversion.given(now.get(f"optimizer.{field}"))
        if found and not conversion.is_settled(found):
            conversion.put(f"optimizer.{field}", found.value, found)
    fused = conversion.given(now.get("optimizer.fused"))
    if fused and not conversion.is_settled(fused):
        conversion.put("optimizer.implementation", "fused" if truth(fused.value) else "for-loop", fused)
    warmup = conversion.given(now.get("lr_scheduler.warmup_steps"))
    if warmup:
        conversion.put("lr_schedule.warmup_steps", warmup.value, warmup)
    clip_gradients(conversion, now.get("training.max_norm"))


def _checkpoint(now: Fields, conversion: Conversion) -> None:
    enable = conversion.given(now.get("checkpoint.enable"))
    if enable:
        tell = conversion.not_needed if truth(enable.value) else conversion.lost
        tell(
            "a run always saves checkpoints, which it goes on from; [checkpointing] save_interval says how often",
            enable,
        )
    folder = conversion.given(now.get("checkpoint.folder"))
    if folder and str(folder.value).startswith("/"):
        conversion.put("checkpointing.save_dir", folder.value, folder)
    else:
        conversion.not_needed("checkpoints are in the run's folder", folder)
    only_model = conversion.given(now.get("checkpoint.last_save_model_only"))
    in_hf = conversion.given(now.get("checkpoint.last_save_in_hf"))
    if in_hf:
        conversion.put("checkpointing.export_to_hf", truth(in_hf.value), in_hf)
    if only_model:
        reason = "the last save is whole too; [checkpointing] export_to_hf also writes the weights alone"
        exports = in_hf is not None and truth(in_hf.value)
        saves = enable is not None and truth(enable.value)
        conversion.lost_if(truth(only_model.value) and saves and not exports, reason, only_model)
    step = conversion.given(now.get("checkpoint.load_step"))
    if step:
        conversion.lost_if(step.value != -1, "a run goes on from its newest checkpoint", step)
    for field in ("create_seed_checkpoint", "load_only"):
        found = conversion.given(now.get(f"checkpoint.{field}"))
        if found:
            conversion.lost_if(truth(found.value), "a run trains, and saves checkpoints", found)
    _initial_load(now, conversion)


def _initial_load(now: Fields, conversion: Conversion) -> None:
    path = conversion.given(now.get("checkpoint.initial_load_path"))
    in_hf, quantized, only_model = (
        conversion.given(now.get(f"checkpoint.{name}"))
        for name in ("initial_load_in_hf", "initial_load_in_hf_quantized", "initial_load_model_only")
    )
    if path is None or not path.value:
        conversion.not_needed("there is no checkpoint.initial_load_path", path, in_hf, quantized, only_model)
        return
    if in_hf and truth(in_hf.value):
        conversion.put("model.initial_weights", path.value, path, in_hf)
        conversion.not_needed("[model] initial_weights are only weights", only_model)
    elif only_model and truth(only_model.value) is False:
        remark = "torchtitan 0.3 may not be able to load what an older one has saved"
        conversion.put("checkpointing.resume_from_checkpoint", path.value, path, only_model, remark=remark)
        conversion.not_needed("off", in_hf)
    else:
        reason = "convert these weights to Hugging Face's format with that torchtitan, and set [model] initial_weights"
        conversion.lost(reason, path, in_hf, only_model)
    if quantized:
        conversion.lost_if(truth(quantized.value), "[model] initial_weights are not quantized", quantized)


def _recomputation(now: Fields, conversion: Conversion) -> None:
    mode = conversion.given(now.get("activation_checkpoint.mode"))
    if mode:
        conversion.put("memory.activation_checkpointing", mode.value, mode)
    option = conversion.given(now.get("activation_checkpoint.selective_ac_option"))
    if option:
        is_selective = mode is None or mode.value == "selective"
        reason = "selective is by operation: torchtitan 0.3 has no activation checkpointing of every n-th layer"
        conversion.lost_if(is_selective and option.value != "op", reason, option)
    kind = conversion.get("memory.activation_checkpointing")
    for path, field in mapping.torchtitan_schema()["fields"].items():
        if kind and path.startswith("activation_checkpoint.") and kind not in field.get("only_with", [kind]):
            conversion.not_needed(f"it has no effect with activation_checkpoint.mode {kind}", now.get(path))


def _quantization(now: Fields, conversion: Conversion) -> None:
    """float8: what converts linear layers and experts, and how. MX formats are among what is gone."""
    converters = conversion.given(now.get("model.converters"))
    names = _names(converters.value) if converters else []
    of_linear = [name for name in names if name in _FLOAT8_TABLES]
    of_experts = [name for name in names if name in _GROUPED_TABLES]
    old_switch = conversion.given(now.get("float8.enable_float8_linear"))
    linear_by_switch = old_switch is not None and truth(old_switch.value)
    if of_linear or linear_by_switch:
        conversion.put("float8.enabled", True, converters, old_switch)
        _float8(now, conversion, of_linear[0] if of_linear else "float8")
    if of_experts:
        chosen = conversion.given(now.get(f"{of_experts[0]}.fqns"))
        any_chosen = chosen is not None and bool(_names(chosen.value))
        if any_chosen:
            alone = not (of_linear or linear_by_switch)
            remark = "a recipe has experts in float8 only with the linear layers" if alone else ""
            conversion.put("float8.enabled", True, converters, remark=remark)
        conversion.put("float8.grouped_experts", any_chosen, converters, chosen)
    others = [name for name in names if name not in of_linear + of_experts]
    if others:
        settings = [found for name in others for found in now.below(name)]
        conversion.lost(f"a recipe cannot have {' and '.join(others)}", converters, *settings)
    elif not names:
        conversion.not_needed("none", converters)
    for table in (*_FLOAT8_TABLES, *_GROUPED_TABLES):
        left = [found for found in now.below(table) if not conversion.is_settled(found)]
        if table not in names and not (table == "float8" and linear_by_switch):
            conversion.not_needed("it has no effect without its name in model.converters", *left)


def _float8(now: Fields, conversion: Conversion, table: str) -> None:
    scaling = conversion.given(now.get(f"{table}.recipe_name"))
    if scaling and scaling.value != "tensorwise":
        conversion.put("float8.recipe", scaling.value, scaling)
    elif scaling:
        conversion.lost(_ROWWISE, scaling)
    elif now.get(f"{table}.recipe_name") is None:
        conversion.notes.append(f"No {table}.recipe_name: torchtitan then scaled by tensor. Here: {_ROWWISE}.")
    for field in ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp"):
        found = conversion.given(now.get(f"{table}.{field}"))
        if found:
            conversion.lost_if(truth(found.value), _ROWWISE, found)
    skipped = conversion.given(now.get(f"{table}.filter_fqns"))
    if skipped:
        names = ["lm_head" if name == "output" else name for name in _names(skipped.value)]
        remark = "torchtitan 0.3 calls the output layer lm_head" if "lm_head" in names else ""
        conversion.put("float8.filter_fqns", names, skipped, remark=remark)
    elif now.get(f"{table}.filter_fqns") is None:
        conversion.put("float8.filter_fqns", [], because=f"{_DEFAULT} of {table}.filter_fqns")
    experts = conversion.given(now.get(f"{table}.moe_fqns"))
    if experts:
        conversion.put("float8.grouped_experts", bool(_names(experts.value)), experts)


def _names(value: Any) -> list[str]:
    """Names in a list, or separated by commas."""
    given = value if isinstance(value, list) else str(value).split(",")
    return [name for each in given if (name := str(each).strip())]


def _off_with(now: Fields, conversion: Conversion, path: str, switch: str) -> None:
    """Report the fields that have no effect, because the one that switches them on does not."""
    on = now.get(switch)
    if on is None or truth(on.value) is False:
        for found in now.below(path):
            if found is not on and not conversion.is_settled(found):
                conversion.not_needed(f"{switch.split('.')[-1]} is off", found)


def _by_path(conversion: Conversion, path: str, found: SourceField) -> None:
    """The rest: what has a word in a recipe, what has a path in 0.3, and what has neither."""
    if conversion.given(found) is None:
        return
    if path in _WORD_OF:
        value = _DTYPES.get(found.value, found.value) if isinstance(found.value, str) else found.value
        conversion.put(_WORD_OF[path], value, found)
        return
    table = next((name for name in _longest_first(_GONE) if path == name or path.startswith(f"{name}.")), None)
    if table:
        neutral, reason = _GONE[table]
        conversion.lost_if(neutral is not None and found.value not in (neutral, False), reason, found)
        return
    wrong = mapping.problem_with(path, found.value, conversion.get("memory.activation_checkpointing"))
    if wrong is None:
        conversion.put_torchtitan(path, found.value, found)
    elif path in mapping.torchtitan_schema()["fields"]:
        what, hint = wrong
        conversion.lost(f"{what} ({hint})" if hint else what, found)
