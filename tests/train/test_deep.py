"""What torchtitan makes of a plan, by torchtitan itself: every built-in recipe at its full size, and that each option
has its effect on what is built, not only on a configuration."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import CPUOffloadPolicy

from tests.conftest import CommandLine
from titan_slurm.cli import options
from titan_slurm.launch import deep as launch_deep
from titan_slurm.launch.submit import Prepared
from titan_slurm.recipe import find
from titan_slurm.recipe.mapping import torchtitan_schema
from titan_slurm.recipe.model import model_sizes
from titan_slurm.train.deep import Skeleton, check, rank_parameters, skeleton

RECIPES = [recipe.name for recipe in find.recipes()]
# The debug model on two nodes of four GPUs.
GPUS = (
    "slurm.nodes=2",
    "slurm.gpus_per_node=4",
    "slurm.tasks_per_node=4",
    "training.batch_size=1",
    "training.global_batch_size=32",
)
MIXTURE = (*GPUS, 'model.name="qwen3"', 'model.flavor="moe_debug"')
COMPILED = (*GPUS, "compile.enabled=true")

Build = Callable[..., Skeleton]


def prepare(recipe: str, *settings: str, runs: Path) -> Prepared:
    """As for a script that is only shown: neither tokenizer nor data has to be here."""
    return options.prepare(recipe, None, list(settings), "slurm", "mine", runs, only_show=True)


@pytest.fixture(scope="module")
def all_built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Prepared, dict[str, Any]]]:
    """Every built-in recipe as `validate --deep` sees it, in one process for all."""
    runs = tmp_path_factory.mktemp("runs")
    prepared = {name: prepare(name, runs=runs) for name in RECIPES}
    built = launch_deep.build([each.plan for each in prepared.values()])
    return dict(zip(prepared, zip(prepared.values(), built, strict=True), strict=True))


@pytest.fixture
def build(clean_environment: Path) -> Iterator[Build]:
    """`build("section.key=value", …, rank=…)`: the trainer of one rank of the debug recipe with these settings."""
    with contextlib.ExitStack() as stack:
        # Set for the whole process by what is tested here.
        for config, name in (
            (torch._functorch.config, "activation_memory_budget"),
            (torch._inductor.config, "_micro_pipeline_tp"),
            (torch._inductor.config, "emulate_precision_casts"),
        ):
            stack.enter_context(config.patch({name: getattr(config, name)}))
        # There can be one process group at a time; what was built in one can be looked at when it is gone.
        current = stack.enter_context(contextlib.ExitStack())

        def make(*settings: str, rank: int = 0) -> Skeleton:
            plan = prepare("llama3_debug", *settings, runs=clean_environment / "runs").plan
            current.close()
            return current.enter_context(skeleton(plan, rank))

        yield make


def first_layer(trainer: Skeleton) -> Any:
    return next(iter(trainer.model_parts[0].layers.values()))


def fsdp(module: Any) -> Any:
    """FSDP's group of a module's parameters."""
    [group] = module._get_fsdp_state()._fsdp_param_groups
    return group


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_built(all_built: dict[str, tuple[Prepared, dict[str, Any]]], recipe: str) -> None:
    prepared, built = all_built[recipe]
    assert built["problems"] == []
    sizes = model_sizes(prepared.resolved.recipe)
    assert sizes is not None
    assert built["parameters"] == sizes.parameters
    assert built["ranks"] == [0, prepared.plan.layout.world_size - 1]


def test_validate_shows_what_was_built(cli: CommandLine) -> None:
    outcome = cli("validate", "llama3_405b", "--deep")
    assert outcome.code == 0, outcome.err
    assert "torchtitan builds it: 405,853,388,800 parameters, " in outcome.out
    assert "(looked at: 0 and 511)" in outcome.out
    assert "note: not here, and submit would refuse it:" in outcome.err
    assert "data.tokenizer" in outcome.err
    assert not any(Path().iterdir())


def test_validate_leaves_with_2_and_says_in_a_line_what_torchtitan_says(cli: CommandLine) -> None:
    stages = "torchtitan.parallelism.pipeline_parallel_layers_per_stage=100"
    outcome = cli("validate", "llama3_405b", "--deep", "--set", stages)
    assert outcome.code == 2
    assert outcome.out == ""
    [error] = outcome.errors
    assert "llama3_405b.toml: torchtitan does not build it: Number of virtual stages (2) must be divisible by" in error
    assert "Traceback" not in outcome.err


def test_an_error_that_says_nothing_is_shown_with_its_place(prepare_debug: Any, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("torchtitan.trainer.dist_utils.set_determinism", fail)
    [problem] = check(prepare_debug().plan)["problems"]
    assert problem.startswith("raise AssertionError (in fail, test_deep.py:")


@pytest.fixture
def prepare_debug(clean_environment: Path) -> Callable[..., Prepared]:
    return lambda *settings: prepare("llama3_debug", *settings, runs=clean_environment / "runs")


@pytest.mark.parametrize("kind", ["full", "selective", "none", "memory_budget"])
def test_activation_checkpointing(build: Build, kind: str) -> None:
    trainer = build(*COMPILED, f"memory.activation_checkpointing={kind}", "torchtitan.debug.print_config=false")
    layer = first_layer(trainer)
    assert isinstance(layer, CheckpointWrapper) == (kind in ("full", "selective"))
    if isinstance(layer, CheckpointWrapper):
        assert ("context_fn" in layer.checkpoint_fn.keywords) == (kind == "selective")
    assert torch._functorch.config.activation_memory_budget == (0.5 if kind == "memory_budget" else 1.0)


@pytest.mark.parametrize("offloaded", [False, True])
def test_cpu_offload(build: Build, offloaded: bool) -> None:
    trainer = build(*GPUS, f"memory.cpu_offload={str(offloaded).lower()}")
    for module in (trainer.model_parts[0], trainer.model_parts[0].lm_head, first_layer(trainer)):
        policy = module._get_fsdp_state()._fsdp_param_groups
        assert all(isinstance(group.offload_policy, CPUOffloadPolicy) == offloaded for group in policy)
    # It waits for what it copies, which a CUDA graph cannot.
    assert trainer.config.training.disable_cuda_graphs == offloaded


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_number_types(build: Build, dtype: str, expected: torch.dtype) -> None:
    weights = build(*GPUS, f"training.dtype={dtype}")
    assert {parameter.dtype for parameter in weights.model_parts[0].parameters()} == {expected}
    policy = fsdp(first_layer(build(*GPUS, f"training.mixed_precision={dtype}"))).mp_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (expected, torch.float32)


@pytest.mark.parametrize("components", [["model"], ["loss"], ["model", "loss"]])
def test_compile(build: Build, components: list[str]) -> None:
    trainer = build(*COMPILED, f"compile.components={json.dumps(components)}")
    assert (first_layer(trainer)._compiled_call_impl is not None) == ("model" in components)
    assert hasattr(trainer.loss_fn.loss_fn.fn, "_torchdynamo_orig_callable") == ("loss" in components)
    plain = build(*GPUS)
    assert first_layer(plain)._compiled_call_impl is None
    assert not hasattr(plain.loss_fn.loss_fn.fn, "_torchdynamo_orig_callable")


def test_the_backend_of_compile_is_what_compiles(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorder(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "aot_ts", recorder)
    trainer = build("compile.enabled=true", "compile.backend=aot_ts")
    with trainer.train_context():
        trainer.loss_fn.loss_fn.fn(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64))
    assert seen


def test_asynchronous_tensor_parallel(build: Build) -> None:
    from torch.distributed._symmetric_memory import is_symm_mem_enabled_for_group

    settings = (*COMPILED, "parallelism.tensor_parallel=4")
    build(*settings)
    assert not torch._inductor.config._micro_pipeline_tp
    trainer = build(*settings, "parallelism.async_tensor_parallel=true")
    assert torch._inductor.config._micro_pipeline_tp
    assert is_symm_mem_enabled_for_group(trainer.parallel_dims.get_dense_tp_mesh().get_group().group_name)


def test_symmetric_memory(build: Build) -> None:
    plain = fsdp(first_layer(build(*GPUS)))
    assert "SymmMem" not in type(plain._all_gather_comm).__name__
    group = fsdp(first_layer(build(*GPUS, "parallelism.fsdp_symmetric_memory=true")))
    assert "SymmMem" in type(group._all_gather_comm).__name__
    assert "SymmMem" in type(group._reduce_scatter_comm).__name__


def test_float8(build: Build) -> None:
    from torchtitan.components.quantization import Float8Linear

    def converted(trainer: Skeleton) -> dict[str, Any]:
        modules = trainer.model_parts[0].named_modules()
        return {name.split(".", 2)[-1]: module for name, module in modules if isinstance(module, Float8Linear)}

    assert converted(build(*GPUS)) == {}
    inside = {"attention.qkv_linear.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"}
    rowwise = converted(build(*GPUS, "float8.enabled=true"))
    assert rowwise.keys() == inside
    everything = converted(build(*GPUS, "float8.enabled=true", 'float8.filter_fqns=["wo"]'))
    assert everything.keys() == inside - {"attention.wo"} | {"lm_head"}
    other = converted(build(*GPUS, "float8.enabled=true", "float8.recipe=rowwise_with_gw_hp"))
    scales = [each["attention.wo"].config.cast_config_grad_output_for_grad_weight for each in (rowwise, other)]
    assert scales[0] != scales[1]


def test_float8_of_experts(build: Build) -> None:
    kinds = {type(module).__name__ for module in build(*MIXTURE, "float8.enabled=true").model_parts[0].modules()}
    assert "GroupedExperts" in kinds
    more = build(*MIXTURE, "float8.enabled=true", "float8.grouped_experts=true").model_parts[0].modules()
    assert "Float8GroupedExperts" in {type(module).__name__ for module in more}


def test_a_float8_filter_that_names_nothing(prepare_debug: Any) -> None:
    plan = prepare_debug(*GPUS, "float8.enabled=true", 'float8.filter_fqns=["lm_haed"]').plan
    [problem] = check(plan)["problems"]
    assert problem == "float8.filter_fqns: no linear layer of the model has 'lm_haed' in its name"


@pytest.mark.parametrize(
    ("policy", "pipeline", "reshards"),
    [("default", 1, True), ("default", 2, False), ("always", 2, True), ("never", 1, False)],
)
def test_resharding(build: Build, policy: str, pipeline: int, reshards: bool) -> None:
    settings = (f"parallelism.pipeline_parallel={pipeline}", f"training.batch_size={pipeline}")
    layer = first_layer(build(*GPUS, *settings, f"parallelism.reshard_after_forward={policy}"))
    assert (fsdp(layer).post_forward_mesh_info is not None) == reshards


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_and_sequence_parallel(build: Build, sequence_parallel: bool) -> None:
    from torchtitan.models.common.decoder_sharding import dense_sequence_parallel_placement

    enabled = str(sequence_parallel).lower()
    trainer = build(*GPUS, "parallelism.tensor_parallel=4", f"parallelism.sequence_parallel={enabled}")
    layer = first_layer(trainer)
    assert layer.feed_forward.w1.weight.device_mesh["tp"].size() == 4
    between = layer.attention_norm._sharding_config.in_src_shardings["input"]
    assert (between == dense_sequence_parallel_placement()) == sequence_parallel


def test_context_parallel(build: Build) -> None:
    dims = build(*GPUS, "parallelism.context_parallel=2").parallel_dims
    sizes = {name: dims.get_mesh(name).size() for name in ("cp", "batch", "loss")}
    assert sizes == {"cp": 2, "batch": 4, "loss": 8}


def test_expert_parallel(build: Build) -> None:
    whole, parted = (build(*MIXTURE, f"parallelism.expert_parallel={degree}", "slurm.nodes=1") for degree in (1, 4))
    experts = [first_layer(trainer).moe.routed_experts.inner_experts.w1_EFD for trainer in (whole, parted)]
    assert "ep" not in experts[0].device_mesh.mesh_dim_names
    assert experts[1].device_mesh["ep"].size() == 4
    assert (experts[1].shape[0], experts[1].to_local().shape[0]) == (8, 2)


@pytest.mark.parametrize(("replicas", "names"), [(1, {"dp_shard"}), (2, {"dp_shard", "dp_replicate"})])
def test_replicas(build: Build, replicas: int, names: set[str]) -> None:
    trainer = build(*GPUS, f"parallelism.data_parallel_replicate={replicas}")
    weight = first_layer(trainer).feed_forward.w1.weight
    assert set(weight.device_mesh.mesh_dim_names) == names
    assert weight.device_mesh["dp_shard"].size() == 8 // replicas
    assert trainer.gradient_accumulation_steps == 4


@pytest.mark.parametrize("schedule", torchtitan_schema()["pipeline_schedules"])
def test_pipeline_schedules(build: Build, schedule: str) -> None:
    settings = (
        "parallelism.pipeline_parallel=2",
        "training.batch_size=4",
        f'parallelism.pipeline_schedule="{schedule}"',
    )
    first, last = (build(*GPUS, *settings, rank=rank) for rank in (0, 7))
    assert type(first.pp_schedule).__name__ == f"Schedule{schedule}"
    assert first.pp_schedule._n_microbatches == 4
    assert first.model_parts[0].tok_embeddings is not None
    # The V-shaped schedules come back to where they began.
    ends = first if schedule in ("ZBVZeroBubble", "DualPipeV") else last
    assert ends.model_parts[-1].lm_head is not None
    layers = [len(part.layers) for trainer in (first, last) for part in trainer.model_parts]
    assert sum(layers) == 6


def test_each_rank_holds_its_part(build: Build) -> None:
    held = [rank_parameters(build(*GPUS, rank=rank)) for rank in range(8)]
    assert sum(held) == 6163712


@pytest.mark.parametrize("schedule", torchtitan_schema()["pipeline_schedules"])
def test_batches_are_refused_where_torchtitan_refuses_them(
    cli: CommandLine, prepare_debug: Any, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """For every number of microbatches, `validate` without torch says the same as torchtitan."""
    pipeline = (
        "slurm.tasks_per_node=3",
        "parallelism.pipeline_parallel=3",
        f'parallelism.pipeline_schedule="{schedule}"',
        "training.seq_len=64",
    )
    batches = {
        size: (*pipeline, f"training.batch_size={size}", f"training.global_batch_size={size}") for size in range(1, 9)
    }
    refused = {
        size
        for size, settings in batches.items()
        if cli("validate", "llama3_debug", *(word for each in settings for word in ("--set", each))).code == 2
    }
    monkeypatch.setattr("titan_slurm.recipe.layout._check_pipeline_batch", lambda *_: None)
    not_built = {size for size, settings in batches.items() if check(prepare_debug(*settings).plan)["problems"]}
    assert refused == not_built
