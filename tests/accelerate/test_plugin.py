"""What a plugin makes of a recipe, however it is given one, and what it says of one that Accelerate cannot follow."""

from pathlib import Path
from typing import Any

import pytest
import tomli

from titan_slurm.accelerate import TorchTitanPlugin
from titan_slurm.accelerate.plugin import from_environment
from titan_slurm.errors import BadInputError

EXAMPLE = Path(__file__).parent.parent / "data" / "example.toml"
EIGHT_RANKS = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
TWO_RANKS = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
SMALL: dict[str, Any] = {"training": {"batch_size": 2, "seq_len": 64, "gradient_accumulation_steps": 1}}

pytestmark = pytest.mark.usefixtures("clean_environment")


def tables() -> dict[str, Any]:
    return tomli.loads(EXAMPLE.read_text())


def problems(config: Any, environment: dict[str, str] | None = None, **asked: Any) -> list[str]:
    with pytest.raises(BadInputError) as raised:
        TorchTitanPlugin(config).settle(environment=TWO_RANKS | (environment or {}), **asked)
    return [str(problem) for problem in raised.value.problems]


def test_a_dict_a_file_and_the_environment_give_the_same_plan() -> None:
    by_dict = TorchTitanPlugin(tables())
    by_path = TorchTitanPlugin(EXAMPLE)
    by_environment = TorchTitanPlugin()
    plans = [
        by_dict.settle(environment=EIGHT_RANKS),
        by_path.settle(environment=EIGHT_RANKS),
        by_environment.settle(environment=EIGHT_RANKS | {"TORCHTITAN_CONFIG_PATH": str(EXAMPLE)}),
    ]
    assert plans[0] == plans[1] == plans[2]
    assert by_dict.recipe.model_dump() == by_path.recipe.model_dump() == by_environment.recipe.model_dump()
    plan = plans[0]
    assert (plan.layout.tensor_parallel, plan.layout.data_parallel, plan.shards) == (2, 4, 4)
    assert (plan.layout.nodes, plan.layout.tasks_per_node) == (2, 4)
    assert (plan.layout.gradient_accumulation_steps, plan.layout.global_batch_size) == (8, 128)
    assert (plan.mixed_precision, plan.activation_checkpointing, plan.cpu_offload) == ("bf16", True, False)


def test_the_environment_says_each_value_that_it_has_a_name_for() -> None:
    given = tables()
    del given["parallelism"]["data_parallel"]
    by_dict = TorchTitanPlugin(given | {"memory": {"gradient_checkpointing": False}}).settle(
        environment=EIGHT_RANKS | {"TORCHTITAN_TP_SIZE": "4"}
    )
    given["parallelism"]["tensor_parallel"] = 4
    by_environment = TorchTitanPlugin(given).settle(
        environment=EIGHT_RANKS | {"TORCHTITAN_ACTIVATION_CHECKPOINTING": "False"}
    )
    assert by_dict == by_environment
    assert by_dict.layout.tensor_parallel == 4


def test_the_recipe_of_a_torchtitan_run_does_for_a_script() -> None:
    plan = TorchTitanPlugin("llama3_debug").settle(environment=TWO_RANKS, has_gpus=False)
    assert (plan.mixed_precision, plan.layout.world_size, plan.layout.gradient_accumulation_steps) == ("no", 2, 2)


def test_a_script_may_bring_its_own_model_and_say_how_it_accumulates() -> None:
    config = {"training": {"batch_size": 2, "seq_len": 64, "max_steps": None}}
    plan = TorchTitanPlugin(config).settle(environment=TWO_RANKS, mixed_precision="bf16", gradient_accumulation_steps=8)
    assert (plan.mixed_precision, plan.layout.global_batch_size) == ("bf16", 32)
    assert plan.max_steps == 10000


def test_model_name_is_the_recipes() -> None:
    with pytest.raises(BadInputError, match=r"model_name='lama3': model\.name: no model family 'lama3' .*llama3"):
        TorchTitanPlugin({**SMALL, "model": {"flavor": "8B"}}, "lama3").settle(environment=TWO_RANKS)
    plugin = TorchTitanPlugin({**SMALL, "model": {"flavor": "8B"}}, "qwen3")
    plugin.settle(environment=TWO_RANKS)
    assert plugin.recipe.model.name == "qwen3"


def test_hsdp() -> None:
    plan = TorchTitanPlugin({**SMALL, "parallelism": {"data_parallel_replicate": 2}}).settle(environment=EIGHT_RANKS)
    assert (plan.layout.data_parallel_replicate, plan.shards) == (2, 4)


def test_what_only_torchtitan_can_do_is_said_all_at_once() -> None:
    config = {
        "model": {"name": "llama3", "flavor": "8B"},
        "training": {"batch_size": 2, "seq_len": 256, "gradient_accumulation_steps": 1, "dtype": "bf16"},
        "parallelism": {"pipeline_parallel": 2, "async_tensor_parallel": True},
        "compile": {"enabled": True},
        "memory": {"activation_checkpointing": "selective"},
        "torchtitan": {"comm.init_timeout_seconds": 10},
    }
    config["parallelism"] |= {"tensor_parallel": 2}  # type: ignore[operator]
    said = problems(config, EIGHT_RANKS)
    fields = [line.split(": ")[1] for line in said]
    assert fields == [
        "parallelism.pipeline_parallel",
        "parallelism.async_tensor_parallel",
        "memory.activation_checkpointing",
        "training.dtype",
        "torchtitan.comm.init_timeout_seconds",
    ]
    assert all("titan-slurm submit" in line for line in said if "activation" not in line)
    assert said[0].startswith("job_config: parallelism.pipeline_parallel: Accelerate cannot do 2 (")


def test_ddp_and_tensor_parallel_alone_are_refused() -> None:
    assert "2 copies for as many ranks are DDP" in problems({**SMALL, "parallelism": {"data_parallel_replicate": 2}})[0]
    assert "leave none for FSDP" in problems({**SMALL, "parallelism": {"tensor_parallel": 2}})[0]


def test_context_parallel_needs_gpus() -> None:
    config = {
        "training": {"batch_size": 2, "seq_len": 512, "gradient_accumulation_steps": 1},
        "parallelism": {"context_parallel": 2},
    }
    assert TorchTitanPlugin(config).settle(environment=TWO_RANKS).layout.context_parallel == 2
    assert "needs GPUs" in problems(config, has_gpus=False)[0]


def test_contradictions_between_script_launcher_and_recipe() -> None:
    config = {"training": {"batch_size": 2, "seq_len": 64, "global_batch_size": 8, "mixed_precision": "bf16"}}
    said = problems(
        config,
        {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_USE_DEEPSPEED": "true"},
        mixed_precision="fp16",
        gradient_accumulation_steps=8,
    )
    assert said[0] == ("Accelerator(mixed_precision=…): fp16: a recipe computes in bf16 or fp32 (bf16, or no for fp32)")
    assert said[1].startswith("environment ACCELERATE_MIXED_PRECISION: fp8")
    assert said[2] == (
        "Accelerator(gradient_accumulation_steps=8): contradicts the recipe: global batch 8 = batch_size 2 × "
        "data-parallel degree 2 × 2 steps (leave it out: the recipe's batch stays the same on any number of nodes)"
    )
    assert "DeepSpeed and TorchTitanPlugin exclude each other" in said[3]
    assert "contradicts training.mixed_precision = bf16 (job_config)" in problems(config, mixed_precision="no")[0]


def test_what_accelerate_launch_was_told_is_no_secret() -> None:
    config = {
        "training": {"batch_size": 2, "seq_len": 64, "global_batch_size": 8},
        "memory": {"activation_checkpointing": "none"},
        "compile": {"enabled": True, "components": ["model"]},
    }
    told = {
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_OFFLOAD_PARAMS": "true",
        "PARALLELISM_CONFIG_TP_SIZE": "2",
        "PARALLELISM_CONFIG_CP_SIZE": "1",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    }
    # Of FSDP and parallelism it tells something only where it was asked for them.
    assert len(problems(config, told)) == 2
    used = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
    said = problems(config, told | used)
    assert [line.split(":")[0] for line in said] == [
        "environment ACCELERATE_DYNAMO_BACKEND",
        "environment ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "environment FSDP_ACTIVATION_CHECKPOINTING",
        "environment FSDP_OFFLOAD_PARAMS",
        "environment PARALLELISM_CONFIG_TP_SIZE",
    ]
    assert "eager contradicts the recipe, which has inductor by compile.backend" in said[0]
    assert "true contradicts the recipe, which has false by memory.activation_checkpointing (job_config)" in said[2]
    # What it tells where its user has said nothing.
    defaults = {
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
        "PARALLELISM_CONFIG_TP_SIZE": "1",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1",
    }
    config |= {"memory": {"activation_checkpointing": "full", "cpu_offload": True}}
    config["parallelism"] = {"tensor_parallel": 2}
    TorchTitanPlugin(config).settle(environment=EIGHT_RANKS | defaults | used)


@pytest.mark.parametrize(
    ("config", "says"),
    [(["a"], "['a'] is of type list"), ({3: 4}, "3 is no name"), ({"training": {2: 3}}, "2 is no name")],
)
def test_what_is_no_recipe_at_all_is_told(config: Any, says: str) -> None:
    (said,) = problems(config)
    assert said.startswith(f"job_config: {says}")


def test_a_mistake_in_a_dict_is_told_as_one_in_a_file() -> None:
    said = problems({"training": {**SMALL["training"], "max_stesp": 5}, "parallelism": {"tensor_parallel": "two"}})
    assert len(said) == 2
    assert all(line.startswith("job_config: ") for line in said)
    assert "did you mean 'max_steps'?" in said[0]


def test_the_environment_gives_a_plugin_to_a_script_that_names_none() -> None:
    assert from_environment({}) is None
    assert from_environment({"ACCELERATE_USE_TORCHTITAN": "false"}) is None
    plugin = from_environment({"ACCELERATE_USE_TORCHTITAN": "true"})
    assert plugin is not None
    with pytest.raises(BadInputError, match="set TORCHTITAN_CONFIG_PATH"):
        plugin.settle(environment={})
