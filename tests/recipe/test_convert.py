"""Configs of DeepSpeed, Accelerate and torchtitan as recipes: what becomes of their fields, and that none gets lost."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
import yaml

from tests.conftest import REPOSITORY
from titan_slurm.errors import BadInputError
from titan_slurm.fields import check_sections
from titan_slurm.recipe.convert.convert import Converted, convert
from titan_slurm.recipe.resolve import resolve
from titan_slurm.recipe.schema import sections

DATA = REPOSITORY / "tests" / "data" / "convert"
# What accelerate/own_deepspeed_file.yaml names.
NAMED = DATA / "deepspeed" / "llamafactory_z3_offload.json"
FILES = sorted(path for kind in ("deepspeed", "accelerate", "torchtitan") for path in (DATA / kind).glob("*.*"))
LOST, UNKNOWN, AUTO, NOT_NEEDED = "To look at", "Unknown", "Decided by the Trainer", "Not needed here"


def read(path: Path) -> dict[str, Any]:
    """A file as nested tables."""
    text = path.read_text()
    match path.suffix:
        case ".json":
            tree = json.loads(text)
        case ".yaml":
            tree = yaml.safe_load(text)
        case _:
            tree = tomli.loads(text)
    assert isinstance(tree, dict)
    return tree


def write(path: Path, tree: dict[str, Any]) -> Path:
    """Nested tables in the format that the ending says."""
    formats: dict[str, Callable[[Any], str]] = {".json": json.dumps, ".yaml": yaml.safe_dump, ".toml": tomli_w.dumps}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(formats[path.suffix](tree))
    return path


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no table, by its dotted name."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def missing(tree: dict[str, Any], text: str) -> list[str]:
    """The fields of which the recipe's text says nothing."""
    comments = [line.partition("# ")[2] for line in text.splitlines()]
    shown = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in leaves(tree)]
    return [each for each in shown if not any(each in comment for comment in comments)]


def tables(text: str) -> dict[str, Any]:
    """The recipe's tables, which all have fields and values of a recipe."""
    recipe = tomli.loads(text)
    given: dict[tuple[str, ...], tuple[Any, str]] = {
        (section, name): (value, "") for section, table in recipe.items() for name, value in table.items()
    }
    assert check_sections(sections(), given)[1] == []
    return recipe


def fates(report: list[str]) -> dict[str, str]:
    """The report: each `name = value` with the heading that it stands under."""
    found, heading = {}, ""
    for line in report:
        if line and not line.startswith(" "):
            heading = line.split(":")[0].split(" (")[0]
        elif line.startswith("    ") and heading != "Not said in the file":
            found[line.strip()] = heading
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
class TestFiles:
    """What must hold of every file."""

    def test_no_field_is_lost(self, path: Path) -> None:
        text = convert(path).text
        assert missing(read(path), text) == []
        assert tables(text)["recipe"]["name"] == path.stem

    def test_a_field_that_nobody_knows_is_reported(self, path: Path, tmp_path: Path) -> None:
        dice = random.Random(path.name)
        tree = read(path)
        added = {}
        for number, table in enumerate([table for _, table in _tables(tree)] * 2):
            name = f"unheard_of_{number}"
            value = dice.choice([True, 3, 0.5, "auto", "text", [1, 2], {}, ["a"], "ün\tï"])
            table[name] = {f"inner_{number}": value} if dice.random() < 0.3 else value
            added[number] = value
        target = tmp_path / "kind" / path.name
        _take_along(path, tmp_path)
        converted = convert(write(target, tree))
        assert missing(tree, converted.text) == []
        reported = " ".join(fates(converted.report))
        assert all(f"_{number} = " in reported for number in added)
        # Nothing that nobody knows changes what the recipe says.
        assert tables(converted.text) == tables(convert(path).text)

    def test_values_of_any_kind_break_nothing(self, path: Path, tmp_path: Path) -> None:
        dice = random.Random(path.name)
        _take_along(path, tmp_path)
        for _ in range(30):
            tree = read(path)
            for table in [table for _, table in _tables(tree)]:
                for name in [name for name, value in table.items() if not isinstance(value, dict)]:
                    if dice.random() < 0.3 and name not in ("distributed_type", "deepspeed_config_file"):
                        table[name] = dice.choice(
                            [-1, 0, 1, 1e30, 2.5, True, False, "auto", "", "x", "1e-3", "no", [], [1], ["a", "b"], {}]
                        )
            converted = convert(write(tmp_path / "kind" / path.name, tree))
            assert missing(tree, converted.text) == []
            tables(converted.text)

    def test_on_a_base_it_is_valid_at_once(self, path: Path, tmp_path: Path) -> None:
        base = tmp_path / "base.toml"
        experts = '[model]\nname = "qwen3"\nflavor = "30B-A3B"\n' if path.stem == "own_experts" else ""
        base.write_text(f'[recipe]\nextends = "llama3_8b"\n{experts}')
        target = tmp_path / "recipes" / "mine.toml"
        target.parent.mkdir()
        target.write_text(convert(path, extends=str(base), to=target).text)
        assert "To fill in" not in target.read_text()
        resolved = resolve(str(target), environment={})
        assert resolved.name == "mine"
        assert resolved.values[("recipe", "extends")].value == "../base.toml"

    def test_it_is_recognised(self, path: Path) -> None:
        said = {"deepspeed": "a DeepSpeed config", "accelerate": "an Accelerate config", "torchtitan": "a job config"}
        assert convert(path).kind.startswith(said[path.parent.name])
        assert convert(path, kind=path.parent.name).text == convert(path).text


def _tables(tree: dict[str, Any], name: str = "") -> list[tuple[str, dict[str, Any]]]:
    below = [found for key, value in tree.items() if isinstance(value, dict) for found in _tables(value, key)]
    return [(name, tree), *below]


def _take_along(path: Path, to: Path) -> None:
    """The DeepSpeed config that one of Accelerate's names, at the same place beside it."""
    if path.stem == "own_deepspeed_file":
        write(to / "deepspeed" / NAMED.name, read(NAMED))


def test_the_fields_of_a_config_that_is_named_are_not_lost() -> None:
    text = convert(DATA / "accelerate" / "own_deepspeed_file.yaml").text
    assert missing({f"{NAMED.name}: {name}": value for name, value in read(NAMED).items()}, text) == []


@pytest.mark.parametrize("version", ["0_1_0", "0_2_2"])
def test_every_field_that_an_old_torchtitan_had_is_known(version: str, tmp_path: Path) -> None:
    tree = read(DATA / "torchtitan" / f"defaults_{version}.toml")
    assert UNKNOWN not in fates(convert(write(tmp_path / "off.toml", tree)).report).values()
    for _, table in _tables(tree):
        table.update({name: True for name, value in table.items() if value is False})
    assert UNKNOWN not in fates(convert(write(tmp_path / "on.toml", tree)).report).values()


@dataclass(frozen=True)
class Case:
    """A config, and what of it must be in the recipe and in the report."""

    what: str
    tree: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    """By `section.field`; None for a field that the recipe must not have."""
    report: dict[str, str] = field(default_factory=dict)
    """Fields, as `name = value`, and the headings that they stand under."""
    says: tuple[str, ...] = ()


def check(case: Case, converted: Converted) -> None:
    recipe = tables(converted.text)
    for word, value in case.recipe.items():
        section, _, name = word.partition(".")
        assert recipe.get(section, {}).get(name) == value, word
    found = fates(converted.report)
    assert {each: found.get(each) for each in case.report} == case.report
    for part in case.says:
        assert part in " ".join(converted.text.replace("#", " ").split())


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}}


DEEPSPEED = (
    Case("ZeRO-1", zero(stage=1), {"parallelism.reshard_after_forward": "never"}),
    Case("ZeRO-2", zero(stage=2), {"parallelism.reshard_after_forward": "never"}),
    Case("ZeRO-3", zero(stage=3), {"parallelism.reshard_after_forward": "always"}),
    Case(
        "ZeRO-0 is DDP, on a number of ranks that DeepSpeed's file does not have",
        zero(stage=0),
        {"parallelism.data_parallel_replicate": None},
        {"zero_optimization.stage = 0": LOST},
        ("set [parallelism] data_parallel_replicate to the number of data-parallel ranks",),
    ),
    Case("no stage", {"bf16": {"enabled": True}}, says=("No ZeRO stage", "(DDP)")),
    Case("a stage that is none", zero(stage=4), report={"zero_optimization.stage = 4": LOST}),
    Case(
        "one of two offloaded",
        zero(stage=3, offload_param={"device": "none"}, offload_optimizer={"device": "cpu"}),
        {"memory.cpu_offload": True},
        {'zero_optimization.offload_param.device = "none"': NOT_NEEDED},
        ("torchtitan offloads parameters, gradients and optimizer states together",),
    ),
    Case(
        "offloaded to NVMe",
        zero(stage=3, offload_param={"device": "nvme", "nvme_path": "/scratch"}),
        {"memory.cpu_offload": True},
        {'zero_optimization.offload_param.device = "nvme"': LOST},
    ),
    Case("offloaded, as it was said once", zero(stage=2, cpu_offload=True), {"memory.cpu_offload": True}),
    Case(
        "fp16",
        {"fp16": {"enabled": True, "loss_scale": 0}},
        {"training.mixed_precision": "bf16"},
        {"fp16.enabled = true": LOST, "fp16.loss_scale = 0": NOT_NEEDED},
    ),
    Case(
        "bf16, and fp16 off",
        {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
        {"training.mixed_precision": "bf16"},
        {"fp16.enabled = false": NOT_NEEDED},
    ),
    Case("both off", {"bf16": {"enabled": False}}, {"training.mixed_precision": "fp32"}),
    Case(
        "weights and states in bf16",
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
        {"training.dtype": "bf16"},
    ),
    Case(
        "autocast to fp16",
        {"torch_autocast": {"enabled": True, "dtype": "float16"}, "train_batch_size": 8},
        {"training.mixed_precision": "bf16"},
        {"torch_autocast.enabled = true": LOST},
    ),
    Case(
        "the batch in full",
        {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
        {"training.batch_size": 2, "training.global_batch_size": 64, "training.gradient_accumulation_steps": None},
        says=("on 8 data-parallel ranks 4 accumulation steps",),
    ),
    Case(
        "a batch that is no multiple",
        {"train_batch_size": 60, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4},
        {"training.batch_size": 8, "training.global_batch_size": None},
        {"train_batch_size = 60": LOST, "gradient_accumulation_steps = 4": LOST},
    ),
    Case(
        "the batch by its parts",
        {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
        {"training.batch_size": 2, "training.gradient_accumulation_steps": 4},
    ),
    Case(
        "the micro batch alone",
        {"train_micro_batch_size_per_gpu": 2},
        {"training.batch_size": 2, "training.gradient_accumulation_steps": 1},
    ),
    Case("the whole batch alone", {"train_batch_size": 64}, {"training.global_batch_size": 64}),
    Case(
        "a batch without a micro batch",
        {"train_batch_size": 64, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": "auto"},
        {"training.global_batch_size": 64, "training.batch_size": None},
        {"gradient_accumulation_steps = 4": LOST, 'train_micro_batch_size_per_gpu = "auto"': AUTO},
    ),
    Case(
        "a batch that is none",
        {"train_batch_size": 0, "train_micro_batch_size_per_gpu": 2},
        {"training.global_batch_size": None, "training.batch_size": None},
        {"train_batch_size = 0": LOST, "train_micro_batch_size_per_gpu = 2": LOST},
    ),
    Case(
        "AdamW with DeepSpeed's defaults, not torchtitan's",
        zero() | optimizer("AdamW", lr=1e-4),
        {
            "optimizer.name": "adamw",
            "optimizer.lr": 1e-4,
            "optimizer.beta1": 0.9,
            "optimizer.beta2": 0.999,
            "optimizer.weight_decay": 0.0,
        },
    ),
    Case("torch's AdamW", zero() | optimizer("AdamW", torch_adam=True), {"optimizer.weight_decay": 0.01}),
    Case("Adam that is AdamW", zero() | optimizer("Adam", weight_decay=0.1), {"optimizer.name": "adamw"}),
    Case("Adam", zero() | optimizer("Adam", adam_w_mode=False), {"optimizer.name": "adam"}),
    Case(
        "OneBitAdam",
        zero() | optimizer("OneBitAdam", lr=1e-4, freeze_step=400),
        {"optimizer.name": "adamw", "optimizer.lr": 1e-4},
        {'optimizer.type = "OneBitAdam"': LOST, "optimizer.params.freeze_step = 400": LOST},
    ),
    Case(
        "Lamb, whose learning rate is no other's",
        zero() | optimizer("Lamb", lr=1e-2) | scheduler("WarmupLR", warmup_max_lr=1e-2, warmup_num_steps=10),
        {"optimizer.name": None, "optimizer.lr": None, "lr_schedule.warmup_steps": 10},
        {"optimizer.params.lr = 0.01": LOST, "scheduler.params.warmup_max_lr = 0.01": LOST},
    ),
    Case(
        "a peak that is the schedule's",
        zero() | optimizer("AdamW", lr=1e-4) | scheduler("WarmupLR", warmup_max_lr=2e-4, warmup_num_steps=10),
        {"optimizer.lr": 2e-4, "lr_schedule.warmup_steps": 10, "lr_schedule.decay_ratio": 0.0},
        {"optimizer.params.lr = 0.0001": LOST},
        ("DeepSpeed's warm-up is logarithmic",),
    ),
    Case(
        "a schedule that decays",
        zero() | scheduler("WarmupDecayLR", total_num_steps=1000, warmup_num_steps=100, warmup_type="linear"),
        {
            "training.max_steps": 1000,
            "lr_schedule.total_steps": 1000,
            "lr_schedule.warmup_steps": 100,
            "lr_schedule.decay_type": "linear",
            "lr_schedule.min_lr_factor": 0.0,
            "optimizer.lr": 0.001,
        },
        {'scheduler.params.warmup_type = "linear"': NOT_NEEDED},
    ),
    Case(
        "a cosine",
        zero() | scheduler("WarmupCosineLR", total_num_steps=1000.0, cos_min_ratio=0.1, warmup_min_ratio=0.2),
        {"training.max_steps": 1000, "lr_schedule.decay_type": "cosine", "lr_schedule.min_lr_factor": 0.1},
        {"scheduler.params.warmup_min_ratio = 0.2": LOST},
    ),
    Case(
        "another schedule",
        zero() | scheduler("OneCycle", cycle_min_lr=1e-5),
        report={'scheduler.type = "OneCycle"': LOST, "scheduler.params.cycle_min_lr = 1e-05": LOST},
    ),
    Case(
        "experts",
        zero() | {"expert_parallel": {"enabled": True, "autoep_size": 4}},
        {"parallelism.expert_parallel": 4},
    ),
    Case(
        "experts that nothing switches on",
        zero() | {"expert_parallel": {"autoep_size": 4}},
        {"parallelism.expert_parallel": None},
        {"expert_parallel.autoep_size = 4": NOT_NEEDED},
    ),
    Case("compiled, as not disabled", {"compile": {"disable": False}, "fp16": {}}, {"compile.enabled": True}),
    Case("not compiled, as disabled", {"compile": {"disable": True}, "fp16": {}}, {"compile.enabled": False}),
    Case("clipping", {"gradient_clipping": 0.5}, {"training.max_grad_norm": 0.5}),
    Case("no clipping", {"gradient_clipping": 0.0}, {"training.max_grad_norm": 1e9}),
    Case(
        "activation checkpointing",
        zero() | {"activation_checkpointing": {"partition_activations": True, "profile": False}},
        {"memory.activation_checkpointing": "full"},
        {
            "activation_checkpointing.partition_activations = true": LOST,
            "activation_checkpointing.profile = false": NOT_NEEDED,
        },
    ),
    Case(
        "parallelism and logs",
        zero()
        | {
            "tensor_parallel": {"autotp_size": 4},
            "sequence_parallel_size": 2,
            "steps_per_print": 5,
            "wandb": {"enabled": True, "project": "p", "team": "t"},
            "tensorboard": {"enabled": True, "output_path": "out"},
        },
        {
            "parallelism.tensor_parallel": 4,
            "parallelism.context_parallel": 2,
            "training.log_interval": 5,
            "wandb.enabled": True,
            "wandb.project": "p",
            "wandb.entity": "t",
            "torchtitan.metrics": {"enable_tensorboard": True},
        },
        {'tensorboard.output_path = "out"': LOST},
    ),
    Case(
        "what is switched off",
        zero(zero_quantized_weights=False, zero_hpz_partition_size=1)
        | {"flops_profiler": {"enabled": False, "profile_step": 1}, "curriculum_learning": {"enabled": False, "x": 1}},
        report={
            "zero_optimization.zero_quantized_weights = false": NOT_NEEDED,
            "zero_optimization.zero_hpz_partition_size = 1": NOT_NEEDED,
            "flops_profiler.profile_step = 1": NOT_NEEDED,
            "curriculum_learning.x = 1": NOT_NEEDED,
        },
    ),
    Case(
        "what is not there",
        zero(zero_quantized_weights=True, mics_shard_size=8)
        | {"curriculum_learning": {"enabled": True, "x": 1}, "autotuning": {"enabled": True}},
        report={
            "zero_optimization.zero_quantized_weights = true": LOST,
            "zero_optimization.mics_shard_size = 8": LOST,
            "curriculum_learning.x = 1": LOST,
            "autotuning.enabled = true": LOST,
        },
    ),
    Case(
        "names that are misspelt",
        zero(satge=3) | {"train_micro_batch_size": 4, "fp16": {"loss_scala": 1}},
        report={
            "zero_optimization.satge = 3": UNKNOWN,
            "train_micro_batch_size = 4": UNKNOWN,
            "fp16.loss_scala = 1": LOST,
        },
    ),
    Case(
        "values that a recipe does not take",
        {"gradient_clipping": "a lot", "steps_per_print": -1},
        {"training.max_grad_norm": None, "training.log_interval": None},
        {'gradient_clipping = "a lot"': LOST, "steps_per_print = -1": LOST},
        ("training.log_interval = -1: must be greater than 0",),
    ),
)


@pytest.mark.parametrize("case", DEEPSPEED, ids=lambda case: case.what.replace(" ", "_"))
def test_deepspeed(case: Case, tmp_path: Path) -> None:
    check(case, convert(write(tmp_path / "ds.json", case.tree)))


def local(kind: Any, processes: Any = 8, **more: Any) -> dict[str, Any]:
    return {"distributed_type": kind, "num_processes": processes, **more}


def fsdp(**settings: Any) -> dict[str, Any]:
    return {"fsdp_config": {f"fsdp_{name}": value for name, value in settings.items()}}


ACCELERATE = (
    Case(
        "machines and processes",
        local("FSDP", 32, num_machines=4, main_process_ip="10.0.0.1", machine_rank=2),
        {"slurm.nodes": 4, "slurm.gpus_per_node": 8, "slurm.tasks_per_node": 8},
        {'main_process_ip = "10.0.0.1"': NOT_NEEDED, "machine_rank = 2": NOT_NEEDED},
    ),
    Case(
        "processes that are no multiple of machines",
        local("FSDP", 9, num_machines=2),
        {"slurm.nodes": None},
        {"num_processes = 9": LOST, "num_machines = 2": LOST},
    ),
    Case("no processes", {"distributed_type": "FSDP"}, {"slurm.nodes": 1}, says=("set [slurm] gpus_per_node",)),
    Case(
        "one process",
        local("NO", 4, use_cpu=True),
        {"slurm.nodes": 1, "slurm.gpus_per_node": 0, "slurm.tasks_per_node": 1},
        {"num_processes = 4": LOST},
    ),
    Case("NO, which YAML reads as false", local(False, 1), {"slurm.gpus_per_node": 1}),
    Case("CPUs", local("MULTI_CPU", 4), {"slurm.gpus_per_node": 0, "slurm.tasks_per_node": 4}),
    Case("DDP", local("MULTI_GPU"), {"parallelism.data_parallel_replicate": 8}),
    Case("a TPU", local("XLA"), report={'distributed_type = "XLA"': LOST}),
    Case(
        "SageMaker",
        local("NO", 1, compute_environment="AMAZON_SAGEMAKER", ec2_instance_type="p4d"),
        report={'compute_environment = "AMAZON_SAGEMAKER"': LOST, 'ec2_instance_type = "p4d"': UNKNOWN},
    ),
    Case(
        "full sharding",
        local("FSDP") | fsdp(sharding_strategy="FULL_SHARD"),
        {"parallelism.reshard_after_forward": "always", "parallelism.data_parallel_replicate": 1},
    ),
    Case(
        "sharding by its number",
        local("FSDP") | fsdp(sharding_strategy=2),
        {"parallelism.reshard_after_forward": "never"},
    ),
    Case("no sharding", local("FSDP") | fsdp(sharding_strategy="NO_SHARD"), {"parallelism.data_parallel_replicate": 8}),
    Case(
        "hybrid sharding",
        local("FSDP", 16, num_machines=2) | fsdp(sharding_strategy="HYBRID_SHARD_ZERO2"),
        {"parallelism.data_parallel_replicate": 2, "parallelism.reshard_after_forward": "never"},
    ),
    Case(
        "sharding by FSDP2's flag",
        local("FSDP") | fsdp(version=2, reshard_after_forward=False),
        {"parallelism.reshard_after_forward": "never"},
    ),
    Case(
        "two that contradict",
        local("FSDP") | fsdp(version=2, reshard_after_forward=True, sharding_strategy="SHARD_GRAD_OP"),
        {"parallelism.reshard_after_forward": "always"},
        {'fsdp_config.fsdp_sharding_strategy = "SHARD_GRAD_OP"': LOST},
    ),
    Case(
        "a strategy that is none",
        local("FSDP") | fsdp(sharding_strategy="HALF"),
        report={'fsdp_config.fsdp_sharding_strategy = "HALF"': LOST},
    ),
    Case(
        "names without and with their prefix",
        local("FSDP") | {"fsdp_config": {"offload_params": True, "fsdp_offload_params": False}},
        {"memory.cpu_offload": True},
        {"fsdp_config.fsdp_offload_params = false": NOT_NEEDED},
    ),
    Case(
        "memory",
        local("FSDP") | fsdp(offload_params="true", activation_checkpointing=True, state_dict_type="FULL_STATE_DICT"),
        {"memory.cpu_offload": True, "memory.activation_checkpointing": "full"},
        {'fsdp_config.fsdp_state_dict_type = "FULL_STATE_DICT"': LOST},
    ),
    Case(
        "settings of another strategy",
        local("MULTI_GPU") | fsdp(offload_params=True),
        {"memory.cpu_offload": None},
        {"fsdp_config.fsdp_offload_params = true": NOT_NEEDED},
    ),
    Case(
        "parallelism_config",
        local("FSDP", 16)
        | {
            "parallelism_config": {
                "parallelism_config_tp_size": 2,
                "parallelism_config_cp_size": 2,
                "parallelism_config_dp_replicate_size": 2,
                "parallelism_config_dp_shard_size": 2,
            }
        },
        {
            "parallelism.tensor_parallel": 2,
            "parallelism.context_parallel": 2,
            "parallelism.data_parallel": 4,
            "parallelism.data_parallel_replicate": 2,
        },
    ),
    Case(
        "degrees that are not the processes",
        local("FSDP", 16) | {"parallelism_config": {"tp_size": 2, "dp_shard_size": 2}},
        {"parallelism.tensor_parallel": 2, "parallelism.data_parallel": None},
        {"parallelism_config.dp_shard_size = 2": LOST},
    ),
    Case(
        "Ulysses",
        local("FSDP")
        | {"parallelism_config": {"sp_size": 4, "sp_backend": "deepspeed", "cp_comm_strategy": "alltoall"}},
        {"parallelism.context_parallel": 4},
        {
            'parallelism_config.sp_backend = "deepspeed"': LOST,
            'parallelism_config.cp_comm_strategy = "alltoall"': NOT_NEEDED,
        },
    ),
    Case("bf16", local("FSDP", mixed_precision="bf16"), {"training.mixed_precision": "bf16"}),
    Case("no, which YAML reads as false", local("FSDP", mixed_precision=False), {"training.mixed_precision": "fp32"}),
    Case(
        "fp16",
        local("FSDP", mixed_precision="fp16"),
        {"training.mixed_precision": "bf16"},
        {'mixed_precision = "fp16"': LOST},
    ),
    Case(
        "fp16, as it was said once",
        local("FSDP", fp16=True),
        {"training.mixed_precision": "bf16"},
        {"fp16 = true": LOST},
    ),
    Case(
        "fp8",
        local("FSDP", mixed_precision="fp8", fp8_config={"backend": "AO", "pad_inner_dim": True}),
        {"float8.enabled": True, "training.mixed_precision": "bf16"},
        {"fp8_config.pad_inner_dim = true": LOST},
    ),
    Case("no precision", local("FSDP"), {"training.mixed_precision": None}, says=("No mixed_precision",)),
    Case(
        "dynamo",
        local("FSDP", dynamo_config={"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"}),
        {"compile.enabled": True, "compile.backend": "inductor"},
        {'dynamo_config.dynamo_mode = "max-autotune"': LOST},
    ),
    Case("no dynamo", local("FSDP", dynamo_backend="NO"), {"compile.enabled": False, "compile.backend": None}),
    Case(
        "DeepSpeed, in Accelerate's words",
        local(
            "DEEPSPEED",
            mixed_precision="bf16",
            deepspeed_config={
                "zero_stage": 3,
                "offload_param_device": "cpu",
                "gradient_accumulation_steps": 4,
                "gradient_clipping": "1e-1",
                "zero3_save_16bit_model": True,
                "deepspeed_hostfile": "hosts",
                "deepspeed_moe_layer_cls_names": "Moe",
            },
        ),
        {
            "parallelism.reshard_after_forward": "always",
            "memory.cpu_offload": True,
            "training.gradient_accumulation_steps": 4,
            "training.max_grad_norm": 0.1,
            "training.mixed_precision": "bf16",
            "checkpointing.export_to_hf": True,
        },
        {
            'deepspeed_config.deepspeed_hostfile = "hosts"': NOT_NEEDED,
            'deepspeed_config.deepspeed_moe_layer_cls_names = "Moe"': LOST,
        },
    ),
    Case("ZeRO-0", local("DEEPSPEED", deepspeed_config={"zero_stage": 0}), {"parallelism.data_parallel_replicate": 8}),
    Case("DeepSpeed's stage by default", local("DEEPSPEED"), {"parallelism.reshard_after_forward": "never"}),
    Case(
        "Megatron-LM",
        local(
            "MEGATRON_LM",
            megatron_lm_config={
                "megatron_lm_tp_degree": 2,
                "megatron_lm_pp_degree": 4,
                "megatron_lm_sequence_parallelism": "true",
                "megatron_lm_recompute_activations": True,
                "megatron_lm_num_micro_batches": 8,
            },
        ),
        {
            "parallelism.tensor_parallel": 2,
            "parallelism.pipeline_parallel": 4,
            "parallelism.sequence_parallel": True,
            "memory.activation_checkpointing": "selective",
        },
        {"megatron_lm_config.megatron_lm_num_micro_batches = 8": LOST},
    ),
)


@pytest.mark.parametrize("case", ACCELERATE, ids=lambda case: case.what.replace(" ", "_"))
def test_accelerate(case: Case, tmp_path: Path) -> None:
    check(case, convert(write(tmp_path / "accelerate.yaml", case.tree)))


def test_a_precision_of_accelerates_decides_what_deepspeed_leaves_to_it(tmp_path: Path) -> None:
    write(
        tmp_path / "ds" / "ds.json",
        {
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 2,
            "train_batch_size": 64,
            "zero_optimization": {"stage": 2},
        },
    )
    path = write(
        tmp_path / "accelerate.yaml",
        local(
            "DEEPSPEED",
            mixed_precision="bf16",
            deepspeed_config={
                "deepspeed_config_file": "ds/ds.json",
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 1.0,
            },
        ),
    )
    case = Case(
        "",
        {},
        {
            "training.mixed_precision": "bf16",
            # 64 of 8 ranks in 2 steps.
            "training.batch_size": 4,
            "training.global_batch_size": 64,
            "training.max_grad_norm": 1.0,
            "parallelism.reshard_after_forward": "never",
        },
        {"deepspeed_config.gradient_accumulation_steps = 4": LOST, "ds.json: fp16.enabled = false": NOT_NEEDED},
        ('mixed_precision = "bf16", ds.json: bf16.enabled = "auto"',),
    )
    check(case, convert(path))


def job(**tables_: dict[str, Any]) -> dict[str, Any]:
    return {"model": {"name": "llama3", "flavor": "8B"}, **tables_}


TORCHTITAN = (
    Case(
        "torchtitan's defaults where a recipe's differ",
        {"job": {"description": "what for"}},
        {
            "recipe.description": "what for",
            "model.flavor": "debugmodel",
            "data.dataset": "c4_test",
            "training.batch_size": 8,
            "training.gradient_accumulation_steps": 1,
            "wandb.enabled": False,
        },
    ),
    Case(
        "the batch",
        job(training={"local_batch_size": 2, "global_batch_size": 64}),
        {"training.batch_size": 2, "training.global_batch_size": 64, "training.gradient_accumulation_steps": None},
    ),
    Case(
        "the new name of two counts",
        job(training={"batch_size": 4, "local_batch_size": 2}),
        {"training.batch_size": 2},
        {"training.batch_size = 4": UNKNOWN},
    ),
    Case(
        "a flavor that says its attention", {"model": {"name": "llama3", "flavor": "8B_flex"}}, {"model.flavor": "8B"}
    ),
    Case(
        "a flavor that is none",
        {"model": {"name": "llama3", "flavor": "9B"}},
        {"model.flavor": None},
        {'model.flavor = "9B"': LOST},
    ),
    Case(
        "a family that is none",
        {"model": {"name": "flux", "flavor": "flux-dev"}},
        {"model.name": None},
        {'model.name = "flux"': LOST, 'model.flavor = "flux-dev"': LOST},
    ),
    Case(
        "degrees of data parallelism",
        job(parallelism={"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 4}),
        {"parallelism.data_parallel": 8, "parallelism.data_parallel_replicate": 2},
    ),
    Case(
        "all remaining ranks",
        job(parallelism={"data_parallel_shard_degree": -1}),
        {"parallelism.data_parallel": None},
        {"parallelism.data_parallel_shard_degree = -1": NOT_NEEDED},
    ),
    Case(
        "degrees where they once were",
        job(
            training={"tensor_parallel_degree": 2},
            experimental={
                "pipeline_parallel_degree": 4,
                "pipeline_parallel_schedule": "interleaved_1f1b",
                "enable_async_tensor_parallel": True,
            },
        ),
        {
            "parallelism.tensor_parallel": 2,
            "parallelism.pipeline_parallel": 4,
            "parallelism.pipeline_schedule": "Interleaved1F1B",
            "parallelism.async_tensor_parallel": True,
        },
    ),
    Case(
        "a schedule that is none",
        job(parallelism={"pipeline_parallel_schedule": "2F2B"}),
        report={'parallelism.pipeline_parallel_schedule = "2F2B"': LOST},
    ),
    Case(
        "precision",
        job(training={"dtype": "bfloat16", "mixed_precision_param": "float32"}),
        {"training.dtype": "bf16", "training.mixed_precision": "fp32"},
    ),
    Case(
        "other paths of torchtitan's",
        job(
            training={"gc_freq": 10, "dataloader": {"pin_memory": True, "num_workers": 2}},
            comm={"init_timeout_seconds": 5},
            profiling={"enable_profiling": True, "profile_freq": 7},
        ),
        {
            "torchtitan.training": {"gc_freq": 10},
            "torchtitan.dataloader": {"pin_memory": True},
            "torchtitan.comm": {"init_timeout_seconds": 5},
            "torchtitan.profiler": {"enable_profiling": True, "profile_freq": 7},
            "data.num_workers": 2,
        },
    ),
    Case(
        "a value of another type",
        job(comm={"trace_buf_size": "big"}),
        {"torchtitan.comm": None},
        {'comm.trace_buf_size = "big"': LOST},
    ),
    Case(
        "validation",
        job(validation={"enable": True, "freq": 5, "dataset": "c4_validation", "local_batch_size": 4}),
        {"torchtitan.validator": {"enable": True, "freq": 5, "dataloader": {"dataset": "c4_validation"}}},
        {"validation.local_batch_size = 4": LOST},
    ),
    Case("no validation", job(validation={"enable": False, "freq": 5}), report={"validation.freq = 5": NOT_NEEDED}),
    Case(
        "float8",
        job(
            quantize={
                "linear": {"float8": {"recipe_name": "rowwise", "filter_fqns": ["output", "router.gate"]}},
                "grouped_mm": {"float8": {"fqns": ["experts"]}},
            }
        )
        | {"model": {"converters": ["quantize.linear.float8", "quantize.grouped_mm.float8"]}},
        {
            "float8.enabled": True,
            "float8.recipe": "rowwise",
            "float8.filter_fqns": ["lm_head", "router.gate"],
            "float8.grouped_experts": True,
        },
    ),
    Case(
        "float8 for no experts",
        {"quantize": {"grouped_mm": {"float8": {"fqns": [], "unheard_of": 1}}}}
        | {"model": {"converters": ["quantize.grouped_mm.float8"]}},
        {"float8.enabled": None, "float8.grouped_experts": False},
        {"quantize.grouped_mm.float8.unheard_of = 1": UNKNOWN},
    ),
    Case(
        "float8 for experts alone",
        {"quantize": {"grouped_mm": {"float8": {"fqns": ["experts"]}}}}
        | {"model": {"converters": ["quantize.grouped_mm.float8"]}},
        {"float8.enabled": True, "float8.grouped_experts": True},
        says=("experts in float8 only with the linear layers",),
    ),
    Case(
        "float8 for every linear layer",
        {"model": {"converters": ["quantize.linear.float8"]}},
        {"float8.enabled": True, "float8.filter_fqns": []},
    ),
    Case(
        "float8 that nothing asks for",
        job(float8={"recipe_name": "rowwise"}, model={"converters": []}),
        {"float8.enabled": None},
        {'float8.recipe_name = "rowwise"': NOT_NEEDED},
    ),
    Case(
        "float8 as it once was",
        job(float8={"enable_float8_linear": True, "recipe_name": "tensorwise", "enable_fsdp_float8_all_gather": True}),
        {"float8.enabled": True, "float8.recipe": None},
        {'float8.recipe_name = "tensorwise"': LOST, "float8.enable_fsdp_float8_all_gather = true": LOST},
    ),
    Case("MX", job(model={"converters": ["mx"]}), {"float8.enabled": None}, {'model.converters = ["mx"]': LOST}),
    Case(
        "checkpoints",
        job(
            checkpoint={
                "enable": True,
                "interval": 50,
                "keep_latest_k": 3,
                "async_mode": "async",
                "folder": "/lustre/c",
                "last_save_in_hf": True,
                "last_save_model_only": True,
                "load_step": 3,
            }
        ),
        {
            "checkpointing.save_interval": 50,
            "checkpointing.keep_latest": 3,
            "checkpointing.async_mode": "async",
            "checkpointing.save_dir": "/lustre/c",
            "checkpointing.export_to_hf": True,
        },
        {"checkpoint.last_save_model_only = true": NOT_NEEDED, "checkpoint.load_step = 3": LOST},
    ),
    Case(
        "weights of Hugging Face's",
        job(checkpoint={"initial_load_path": "/hf", "initial_load_in_hf": True}),
        {"model.initial_weights": "/hf", "checkpointing.resume_from_checkpoint": None},
    ),
    Case(
        "weights of torchtitan's",
        job(checkpoint={"initial_load_path": "/w/step-1"}),
        {"checkpointing.resume_from_checkpoint": None},
        {'checkpoint.initial_load_path = "/w/step-1"': LOST},
    ),
    Case(
        "a whole checkpoint",
        job(checkpoint={"initial_load_path": "/w/step-1", "initial_load_model_only": False}),
        {"checkpointing.resume_from_checkpoint": "/w/step-1"},
    ),
    Case(
        "every second layer",
        job(activation_checkpoint={"mode": "selective", "selective_ac_option": "2"}),
        {"memory.activation_checkpointing": "selective"},
        {'activation_checkpoint.selective_ac_option = "2"': LOST},
    ),
    Case(
        "a setting of another recomputation",
        job(activation_checkpoint={"mode": "full", "memory_budget": 0.4, "preserve_rng_state": False}),
        {"torchtitan.activation_checkpoint": {"preserve_rng_state": False}},
        {"activation_checkpoint.memory_budget = 0.4": NOT_NEEDED},
    ),
    Case(
        "a last save that there is not",
        job(checkpoint={"enable": False, "last_save_model_only": True}, comm={"mode": "default"}),
        report={"checkpoint.last_save_model_only = true": NOT_NEEDED, 'comm.mode = "default"': NOT_NEEDED},
    ),
    Case(
        "an optimizer that is none",
        job(optimizer={"name": "Muon", "lr": 0.02}),
        {"optimizer.lr": None},
        {'optimizer.name = "Muon"': LOST, "optimizer.lr = 0.02": LOST},
    ),
    Case(
        "a dataset that is none",
        job(training={"dataset": "OpenHermes"}),
        {"data.dataset": None},
        {'training.dataset = "OpenHermes"': LOST},
    ),
    Case(
        "an old tokenizer",
        job(model={"tokenizer_path": "t/tokenizer.model"}),
        {"data.tokenizer": None},
        {'model.tokenizer_path = "t/tokenizer.model"': LOST},
    ),
    Case(
        "fault tolerance",
        job(fault_tolerance={"enable": True, "group_size": 2}),
        report={"fault_tolerance.enable = true": LOST},
    ),
    Case("a misspelt field", job(training={"setps": 3}), report={"training.setps = 3": UNKNOWN}),
)


@pytest.mark.parametrize("case", TORCHTITAN, ids=lambda case: case.what.replace(" ", "_"))
def test_torchtitan(case: Case, tmp_path: Path) -> None:
    check(case, convert(write(tmp_path / "job.toml", case.tree)))


def test_what_the_source_does_not_hold_is_to_fill_in(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    text = convert(DATA / "deepspeed" / "swift_zero2.json", to=path).text
    for example in ('# flavor = "8B"', '# dataset = "c4"', "# seq_len = 8192", "# max_steps = 10000", "# lr = 0.0003"):
        assert example in text.splitlines()
    path.write_text(text)
    with pytest.raises(BadInputError) as error:
        resolve(str(path), environment={})
    assert "model.flavor: no flavor is given" in str(error.value)
    assert "training.global_batch_size: neither it nor gradient_accumulation_steps is given" in str(error.value)


def test_the_report_stands_in_the_recipe_too() -> None:
    converted = convert(DATA / "torchtitan" / "own_qwen3_moe.toml")
    assert converted.report
    assert "\n".join(f"# {line}".rstrip() for line in converted.report) in converted.text


def test_every_value_says_what_it_came_from() -> None:
    text = convert(DATA / "deepspeed" / "own_pretraining.json").text
    assert 'reshard_after_forward = "always"  # zero_optimization.stage = 3\n' in text
    assert "lr = 3e-05  # scheduler.params.warmup_max_lr = 3e-05, optimizer.params.lr = 3e-05\n" in text


def test_the_same_config_as_json_and_as_yaml_is_the_same_recipe(tmp_path: Path) -> None:
    tree = read(DATA / "accelerate" / "own_context_parallel.yaml")
    as_json = convert(write(tmp_path / "a.json", copy.deepcopy(tree))).text
    assert tomli.loads(as_json) == tomli.loads(convert(write(tmp_path / "a.yaml", tree)).text)
