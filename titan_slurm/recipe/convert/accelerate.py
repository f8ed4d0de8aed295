"""Accelerate's YAML, as `accelerate config` writes it. Its fields and their defaults: accelerate/commands/launch.py and
accelerate/utils/dataclasses.py of Accelerate 1.15."""

from pathlib import Path
from typing import Any

from titan_slurm.errors import bad_input
from titan_slurm.recipe.convert import deepspeed
from titan_slurm.recipe.convert.common import (
    Conversion,
    Fields,
    SourceField,
    clip_gradients,
    fields_of,
    mixed_precision,
    replicate,
    truth,
    whole,
)
from titan_slurm.recipe.convert.read import read_tables
from titan_slurm.toml import Key

_RENDEZVOUS = "every rank is a Slurm task of its own, and the ranks find each other"
_TPU = "Slurm gives GPUs or CPUs"
_WRAPPING = "torchtitan wraps each transformer layer of its own models"
_FSDP2 = "FSDP2 does so by itself"
_PRETRAINED = "a model is made on all ranks at once, already sharded; [model] initial_weights are read so too"

# Why nothing is missed, by field or table.
_NOT_NEEDED = {
    "machine_rank": _RENDEZVOUS,
    "main_process_ip": _RENDEZVOUS,
    "main_process_port": _RENDEZVOUS,
    "rdzv_backend": _RENDEZVOUS,
    "rdzv_conf": _RENDEZVOUS,
    "same_network": _RENDEZVOUS,
    "mpirun_config": _RENDEZVOUS,
    "deepspeed_config.deepspeed_multinode_launcher": _RENDEZVOUS,
    "deepspeed_config.deepspeed_hostfile": _RENDEZVOUS,
    "main_training_function": "torchtitan's own training loop is what runs",
    "gpu_ids": "Slurm decides which GPUs a job has",
    "num_cpu_threads_per_process": "[slurm] cpus_per_task is what a rank has",
    "enable_cpu_affinity": "Slurm binds ranks to CPUs",
    "debug": "an error is in the attempt's folder, and the stacks of all ranks of a run that hangs",
    "deepspeed_config.zero3_init_flag": _PRETRAINED,
    "fsdp_config.cpu_ram_efficient_loading": _PRETRAINED,
    "fsdp_config.sync_module_states": _PRETRAINED,
    "fsdp_config.version": "torchtitan has FSDP2",
    "fsdp_config.auto_wrap_policy": _WRAPPING,
    "fsdp_config.transformer_layer_cls_to_wrap": _WRAPPING,
    "fsdp_config.min_num_params": _WRAPPING,
    "fsdp_config.backward_prefetch": _FSDP2,
    "fsdp_config.forward_prefetch": _FSDP2,
    "fsdp_config.use_orig_params": _FSDP2,
    "fsdp_config.limit_all_gathers": _FSDP2,
    "dynamo_config.dynamo_use_fullgraph": "torchtitan compiles each transformer layer as one graph",
    "dynamo_config.dynamo_use_regional_compilation": "torchtitan compiles each transformer layer as one graph",
}

# What has no counterpart, by field or table. Switched off, it is not missed.
_MISSING = {
    "downcast_bf16": _TPU,
    "tpu_name": _TPU,
    "tpu_zone": _TPU,
    "tpu_use_cluster": _TPU,
    "tpu_use_sudo": _TPU,
    "tpu_env": _TPU,
    "tpu_vm": _TPU,
    "command_file": _TPU,
    "commands": _TPU,
    "command": _TPU,
    "deepspeed_config": "titan-slurm starts the ranks, not DeepSpeed's launcher",
    "deepspeed_config.deepspeed_moe_layer_cls_names": _WRAPPING,
    "fsdp_config": "FSDP2 as torchtitan sets it up has no such setting",
    "fsdp_config.activation_checkpointing_offload": "torchtitan recomputes activations and does not offload them",
    "fsdp_config.ignored_modules": "torchtitan shards the whole model",
    "fp8_config": "float8 is torchao's here, with the settings of [float8]",
    "dynamo_config": "torchtitan compiles each transformer layer with torch.compile's default mode",
    "parallelism_config": "torchtitan decides this by itself",
    "megatron_lm_config": "torchtitan is no Megatron-LM; most of its settings belong to a model",
}
_OFF: tuple[Any, ...] = (False, None, 0, "no", "none", "NO", "", [], {}, "default")

# Accelerate's names for DeepSpeed's own fields.
_OF_DEEPSPEED = {
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}

# Megatron-LM's settings that are words of a recipe.
_OF_MEGATRON = {
    "tp_degree": "parallelism.tensor_parallel",
    "pp_degree": "parallelism.pipeline_parallel",
    "context_parallel_size": "parallelism.context_parallel",
    "expert_model_parallel_size": "parallelism.expert_parallel",
    "recompute_granularity": "memory.activation_checkpointing",
}
_SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
# Which table counts with which distributed_type.
_TABLES = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED", "megatron_lm_config": "MEGATRON_LM"}


def convert(tree: Fields, conversion: Conversion, path: Path) -> list[Fields]:
    """Put Accelerate's fields, and those of the DeepSpeed config that it names, into the recipe or into the report.
    Returns the fields of that config, if there is one; `path` is the file that `tree` was read from.

    Raises BadInputError if the DeepSpeed config cannot be read.
    """
    fields = _one_name_each(tree)
    kind = fields.get("distributed_type")
    # YAML reads NO as false.
    strategy = "NO" if kind is None or truth(kind.value) is False else str(kind.value).upper()
    for table, needed in _TABLES.items():
        if strategy != needed:
            conversion.not_needed(f"it has no effect with distributed_type {strategy}", *fields.below(table))
    if str(_value(fields, "mixed_precision")).lower() != "fp8":
        conversion.not_needed("it has no effect unless mixed_precision is fp8", *fields.below("fp8_config"))
    where = conversion.given(fields.get("compute_environment"))
    if where:
        reason = "titan-slurm runs on Slurm, and on this machine"
        conversion.lost_if(where.value != "LOCAL_MACHINE", reason, where)
    processes = _processes(fields, conversion, strategy)
    data_parallel = _degrees(fields, conversion, processes)
    precision = _precision(fields, conversion)
    more: list[Fields] = []
    if strategy == "DEEPSPEED":
        more = _deepspeed(fields, conversion, path, deepspeed.Around(data_parallel, precision))
    elif precision:
        mixed_precision(conversion, *precision)
    if strategy == "FSDP":
        _fsdp(fields, conversion, data_parallel)
        _memory(fields, conversion)
    elif strategy == "MEGATRON_LM":
        _megatron(fields, conversion)
    elif strategy in ("MULTI_GPU", "MULTI_CPU"):
        replicate(conversion, data_parallel, kind)
    elif strategy not in ("NO", "DEEPSPEED"):
        conversion.lost("torchtitan trains on GPUs, and for a trial on CPUs: FSDP, DDP and what goes with them", kind)
    _compile(fields, conversion)
    if conversion.get("training.mixed_precision") is None and fields.get("mixed_precision") is None:
        conversion.notes.append(
            "No mixed_precision: where the training script does not ask for it either, Accelerate computes in fp32. "
            'This recipe computes in bf16 unless [training] mixed_precision = "fp32".'
        )
    for key, found in fields.items():
        if not conversion.is_settled(found):
            _by_table(fields, conversion, ".".join(key), found)
    return more


def _value(fields: Fields, path: str) -> Any:
    found = fields.get(path)
    return found.value if found else None


def _one_name_each(tree: Fields) -> Fields:
    """The fields by one name where there are two: Accelerate takes fsdp_offload_params and offload_params."""
    prefixes = {
        "fsdp_config": "fsdp_",
        "parallelism_config": "parallelism_config_",
        "megatron_lm_config": "megatron_lm_",
    }

    def rename(key: Key) -> Key:
        return (key[0], key[1].removeprefix(prefixes[key[0]]), *key[2:]) if key[0] in prefixes and key[1:] else key

    return tree.renamed(rename)


def _processes(fields: Fields, conversion: Conversion, strategy: str) -> int | None:
    """Nodes and ranks per node. Returns how many ranks there are in all, if the file says so."""
    kind = fields.get("distributed_type")
    machines = conversion.given(fields.get("num_machines"))
    processes = conversion.given(fields.get("num_processes"))
    nodes = whole(machines.value) if machines else 1
    count = whole(processes.value) if processes else None
    if strategy == "NO":
        one = [found for found in (machines, processes) if found and whole(found.value) == 1]
        conversion.lost(
            'with distributed_type "NO" there is one process',
            *(found for found in (machines, processes) if found and found not in one),
        )
        _place(fields, conversion, 1, 1, strategy, kind, *one)
        return 1
    if nodes is not None and nodes > 0 and processes is None:
        conversion.put("slurm.nodes", nodes, machines, because="Accelerate's default of num_machines")
        conversion.notes.append("No num_processes: set [slurm] gpus_per_node.")
        return None
    if nodes is None or count is None or min(nodes, count) < 1 or count % nodes:
        reason = "processes must be a multiple of machines: set [slurm] nodes and gpus_per_node"
        conversion.lost(reason, processes, machines)
        return None
    _place(fields, conversion, nodes, count // nodes, strategy, processes, machines)
    return count


def _place(
    fields: Fields, conversion: Conversion, nodes: int, ranks: int, strategy: str, *origins: SourceField | None
) -> None:
    on_cpu = conversion.given(fields.get("use_cpu"))
    cpu = strategy == "MULTI_CPU" or (on_cpu is not None and truth(on_cpu.value) is True)
    conversion.put("slurm.nodes", nodes, *origins)
    conversion.put("slurm.gpus_per_node", 0 if cpu else ranks, *origins, on_cpu)
    conversion.put("slurm.tasks_per_node", ranks, *origins)


def _degrees(fields: Fields, conversion: Conversion, processes: int | None) -> int | None:
    """The degrees of `parallelism_config`. Returns the number of data-parallel ranks, if it is known."""
    words = {
        "tp_size": "tensor_parallel",
        "cp_size": "context_parallel",
        "dp_replicate_size": "data_parallel_replicate",
    }
    for name, word in words.items():
        found = conversion.given(fields.get(f"parallelism_config.{name}"))
        if found:
            conversion.put(f"parallelism.{word}", found.value, found)
    ulysses = conversion.given(fields.get("parallelism_config.sp_size"))
    if ulysses and whole(ulysses.value) != 1:
        remark = "context parallelism in place of Ulysses"
        conversion.put("parallelism.context_parallel", ulysses.value, ulysses, remark=remark)
    tensor = conversion.get("parallelism.tensor_parallel") or 1
    context = conversion.get("parallelism.context_parallel") or 1
    data_parallel = processes // (tensor * context) if processes and processes % (tensor * context) == 0 else None
    shard = conversion.given(fields.get("parallelism_config.dp_shard_size"))
    if shard:
        copies = conversion.get("parallelism.data_parallel_replicate") or 1
        asked = copies * (whole(shard.value) or 0)
        if data_parallel not in (None, asked) or asked < 1:
            conversion.lost("processes must be dp_replicate_size × dp_shard_size × tp_size × cp_size", shard)
        else:
            replicas = fields.get("parallelism_config.dp_replicate_size")
            conversion.put("parallelism.data_parallel", asked, replicas, shard)
            data_parallel = asked
    return data_parallel


def _precision(fields: Fields, conversion: Conversion) -> tuple[str, SourceField] | None:
    found = conversion.given(fields.get("mixed_precision"))
    name = "" if found is None else "no" if truth(found.value) is False else str(found.value).lower()
    old = conversion.given(fields.get("fp16"))
    if old and found is None and truth(old.value):
        return "fp16", old
    conversion.not_needed("mixed_precision is what Accelerate looks at", old)
    if found and name in ("no", "bf16", "fp16"):
        return {"no": "fp32"}.get(name, name), found
    if found and name == "fp8":
        _float8(fields, conversion, found)
    elif found:
        conversion.lost("torchtitan computes in bf16 or fp32", found)
    return None


def _float8(fields: Fields, conversion: Conversion, precision: SourceField) -> None:
    backend = fields.get("fp8_config.backend")
    is_torchao = backend is not None and str(backend.value).upper() in ("AO", "TORCHAO")
    conversion.put("training.mixed_precision", "bf16", precision)
    conversion.put("float8.enabled", True, precision, backend if is_torchao else None)


def _fsdp(fields: Fields, conversion: Conversion, data_parallel: int | None) -> None:
    kind = fields.get("distributed_type")
    version = fields.get("fsdp_config.version")
    names = ["sharding_strategy", "reshard_after_forward"]
    if version and whole(version.value) == 2:
        names.reverse()
    given = [found for name in names if (found := conversion.given(fields.get(f"fsdp_config.{name}")))]
    decides = given[0] if given else None
    sharding = _sharding(decides.value) if decides else "FULL_SHARD"
    if sharding is None:
        conversion.lost(f"a sharding strategy is one of {', '.join(_SHARDING)}", *given, kind)
        return
    same = [found for found in given if _sharding(found.value) == sharding]
    conversion.lost(f"with this version of FSDP {names[0]} decides", *(found for found in given if found not in same))
    because = "Accelerate's default of fsdp_reshard_after_forward"
    if sharding == "NO_SHARD":
        replicate(conversion, data_parallel, kind, *same)
    else:
        policy = "never" if sharding in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") else "always"
        conversion.put("parallelism.reshard_after_forward", policy, *same, because=because)
        copies, remark = conversion.get("parallelism.data_parallel_replicate"), ""
        if copies is None and sharding.startswith("HYBRID"):
            copies, remark = conversion.get("slurm.nodes") or 1, "sharded within a node, a copy on each"
        conversion.put("parallelism.data_parallel_replicate", copies or 1, kind, remark=remark)


def _sharding(value: object) -> str | None:
    """The strategy's name, for its name, its number, or FSDP2's flag."""
    if isinstance(value, bool) or str(value).lower() in ("true", "false"):
        return "FULL_SHARD" if truth(value) else "SHARD_GRAD_OP"
    number = whole(value)
    if number is not None and 1 <= number <= len(_SHARDING):
        return _SHARDING[number - 1]
    return str(value).upper() if str(value).upper() in _SHARDING else None


def _memory(fields: Fields, conversion: Conversion) -> None:
    offload = conversion.given(fields.get("fsdp_config.offload_params"))
    if offload:
        conversion.put("memory.cpu_offload", truth(offload.value), offload)
    recompute = conversion.given(fields.get("fsdp_config.activation_checkpointing"))
    if recompute:
        conversion.put("memory.activation_checkpointing", "full" if truth(recompute.value) else "none", recompute)
    saved = conversion.given(fields.get("fsdp_config.state_dict_type"))
    if saved:
        reason = "checkpoints are sharded; [checkpointing] export_to_hf writes whole weights after the last step"
        conversion.lost_if(saved.value != "SHARDED_STATE_DICT", reason, saved)


def _deepspeed(fields: Fields, conversion: Conversion, path: Path, around: deepspeed.Around) -> list[Fields]:
    """DeepSpeed's settings: those in Accelerate's file, and the file that it may name. Returns that file's fields."""
    kind = fields.get("distributed_type")
    named = conversion.given(fields.get("deepspeed_config.deepspeed_config_file"))
    by_key, files = {}, []
    if named:
        files = [_deepspeed_file(path, named)]
        by_key = dict(files[0].items())
        conversion.not_needed("its fields are converted with the others", named)
    for ours, theirs in _OF_DEEPSPEED.items():
        found = fields.get(f"deepspeed_config.{ours}")
        key = tuple(theirs.split("."))
        if found and key in by_key and by_key[key].value != "auto":
            conversion.lost("the file of DeepSpeed's decides", found)
        elif found:
            conversion.not_needed("Accelerate's file decides", by_key.get(key))
            by_key[key] = found
    if not files and fields.get("deepspeed_config.zero_stage") is None:
        conversion.put("parallelism.reshard_after_forward", "never", because="Accelerate's default of zero_stage, 2")
    deepspeed.convert(Fields(by_key), conversion, around)
    conversion.not_needed("what DeepSpeed does is in the other fields", kind)
    return files


def _deepspeed_file(path: Path, named: SourceField) -> Fields:
    file = path.parent / str(named.value)
    if not file.is_file():
        hint = "a relative path is taken from the folder of this file"
        raise bad_input(str(path), f"{named.name} names {named.value}, which is not there", hint)
    return fields_of(read_tables(file), str(file), said_before=f"{file.name}: ")


def _megatron(fields: Fields, conversion: Conversion) -> None:
    for name, word in _OF_MEGATRON.items():
        found = conversion.given(fields.get(f"megatron_lm_config.{name}"))
        if found:
            conversion.put(word, found.value, found)
    sequence = conversion.given(fields.get("megatron_lm_config.sequence_parallelism"))
    if sequence:
        conversion.put("parallelism.sequence_parallel", truth(sequence.value), sequence)
    recompute = conversion.given(fields.get("megatron_lm_config.recompute_activations"))
    if recompute and conversion.get("memory.activation_checkpointing") is None:
        kind = "selective" if truth(recompute.value) else "none"
        conversion.put("memory.activation_checkpointing", kind, recompute)
    clip_gradients(conversion, fields.get("megatron_lm_config.gradient_clipping"))
    reason = "Megatron-LM's model and data; the parallelism and memory of it are converted"
    conversion.lost(reason, fields.get("distributed_type"))


def _compile(fields: Fields, conversion: Conversion) -> None:
    for path in ("dynamo_config.dynamo_backend", "dynamo_backend"):
        found = conversion.given(fields.get(path))
        if found is None:
            continue
        is_on = truth(found.value) is not False
        conversion.put("compile.enabled", is_on, found)
        if is_on:
            conversion.put("compile.backend", str(found.value).lower(), found)


def _by_table(fields: Fields, conversion: Conversion, path: str, found: SourceField) -> None:
    """Report a field by the entry for it, or for the nearest table around it."""
    table, _, name = path.partition(".")
    if table == "parallelism_config" and name[:3] in ("cp_", "sp_"):
        degree = fields.get(f"{table}.{name[:3]}size")
        if degree is None or whole(degree.value) == 1:
            conversion.not_needed("switched off", found)
            return
    for prefix in (path, table):
        if prefix in _NOT_NEEDED:
            conversion.not_needed(_NOT_NEEDED[prefix], found)
            return
        if prefix in _MISSING and conversion.given(found):
            if found.value in _OFF or truth(found.value) is False:
                conversion.not_needed("switched off", found)
            else:
                conversion.lost(_MISSING[prefix], found)
            return
