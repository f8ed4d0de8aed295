"""From a recipe and a number of ranks to the degree of each parallelism and the batch, with every divisibility that
torchtitan demands. Knows no file and no place: problems come back with the field they belong to."""

import math
from collections.abc import Mapping
from typing import Any

from titan_slurm.recipe.conflicts import Misfit, conflicts
from titan_slurm.recipe.model import TRANSFORMERS, model_sizes
from titan_slurm.recipe.schema import Recipe
from titan_slurm.run.plan import Layout

# Schedules that put more than one stage on a rank need at least that many layers.
_STAGES_PER_RANK = {
    "Interleaved1F1B": 2,
    "InterleavedZeroBubble": 2,
    "LoopedBFS": 2,
    "ZBVZeroBubble": 2,
    "DualPipeV": 2,
}
# Schedules that need a microbatch for each stage; the others leave ranks idle if there are fewer.
_FILLED = ("1F1B", "DualPipeV")
# Those that go through the microbatches in rounds, of as many as there are ranks in the pipeline or more.
_IN_ROUNDS = ("Interleaved1F1B", "InterleavedZeroBubble")
# Of FlexAttention's mask, which context parallelism cannot cut inside a block.
_ATTENTION_BLOCK = 128
_LOSS_CHUNKS = 8
# Families that torchtitan refuses other lengths of, whether or not there is context parallelism.
_SEQUENCE_IN_HALVES = (TRANSFORMERS, "muse_glimmer")


def tasks_per_node(recipe: Recipe) -> int:
    """Ranks per node: one per GPU, unless the recipe says otherwise."""
    return recipe.slurm.tasks_per_node or recipe.slurm.gpus_per_node or 1


def make_layout(recipe: Recipe, torchtitan: Mapping[str, Any] | None = None) -> tuple[Layout | None, list[Misfit]]:
    """The layout of a recipe on its own nodes; None where it cannot be computed. All misfits are found.

    torchtitan: the recipe's `[torchtitan]`, by path.
    """
    misfits: list[Misfit] = []
    data_parallel = _data_parallel(recipe, misfits)
    _check_model(recipe, misfits)
    if data_parallel is None:
        return None, misfits
    batch = _batch(recipe, data_parallel, misfits)
    if batch is None:
        return None, misfits
    parallelism = recipe.parallelism
    global_batch_size, accumulation = batch
    layout = Layout(
        nodes=recipe.slurm.nodes,
        tasks_per_node=tasks_per_node(recipe),
        tensor_parallel=parallelism.tensor_parallel,
        pipeline_parallel=parallelism.pipeline_parallel,
        context_parallel=parallelism.context_parallel,
        expert_parallel=parallelism.expert_parallel,
        data_parallel=data_parallel,
        data_parallel_replicate=parallelism.data_parallel_replicate,
        batch_size=recipe.training.batch_size,
        global_batch_size=global_batch_size,
        gradient_accumulation_steps=accumulation,
    )
    _check_sequence(recipe, layout, torchtitan or {}, misfits)
    _check_parallelism(recipe, layout, torchtitan or {}, misfits)
    misfits += conflicts(recipe, layout)
    return layout, misfits


def _data_parallel(recipe: Recipe, misfits: list[Misfit]) -> int | None:
    parallelism = recipe.parallelism
    ranks = recipe.slurm.nodes * tasks_per_node(recipe)
    ranks_text = f"{ranks} ranks ({recipe.slurm.nodes} nodes × {tasks_per_node(recipe)} tasks per node)"
    others = parallelism.tensor_parallel * parallelism.pipeline_parallel * parallelism.context_parallel
    product = (
        f"tensor_parallel {parallelism.tensor_parallel} × pipeline_parallel {parallelism.pipeline_parallel} × "
        f"context_parallel {parallelism.context_parallel}"
    )
    if parallelism.data_parallel is None:
        if ranks % others:
            misfits.append(Misfit(("parallelism", "tensor_parallel"), f"{ranks_text} are no multiple of {product}"))
            return None
        return ranks // others
    if others * parallelism.data_parallel != ranks:
        misfits.append(
            Misfit(
                ("parallelism", "data_parallel"),
                f"{product} × data_parallel {parallelism.data_parallel} = {others * parallelism.data_parallel}, "
                f"but there are {ranks_text}",
                "leave data_parallel out to use all ranks, or set slurm.nodes and slurm.tasks_per_node",
            )
        )
        return None
    return parallelism.data_parallel


def _batch(recipe: Recipe, data_parallel: int, misfits: list[Misfit]) -> tuple[int, int] | None:
    """Global batch size and gradient accumulation steps, each from the other."""
    training = recipe.training
    per_pass = training.batch_size * data_parallel
    if training.gradient_accumulation_steps is not None:
        return per_pass * training.gradient_accumulation_steps, training.gradient_accumulation_steps
    if training.global_batch_size is None:
        return None
    if training.global_batch_size % per_pass:
        misfits.append(
            Misfit(
                ("training", "global_batch_size"),
                f"{training.global_batch_size} is no multiple of batch_size {training.batch_size} × "
                f"data-parallel degree {data_parallel} = {per_pass}",
            )
        )
        return None
    return training.global_batch_size, training.global_batch_size // per_pass


def _check_model(recipe: Recipe, misfits: list[Misfit]) -> None:
    sizes = model_sizes(recipe)
    if sizes is None:
        return
    if recipe.training.seq_len > sizes.max_seq_len:
        what = f"{recipe.training.seq_len} is more than the model's max_seq_len {sizes.max_seq_len}"
        misfits.append(Misfit(("training", "seq_len"), what))
    # Hugging Face's configurations have been checked where they were read.
    if recipe.model.flavor is None and recipe.model.name != TRANSFORMERS:
        dim, heads, kv_heads = sizes.embed_dim, sizes.num_heads, sizes.num_kv_heads
        if dim % heads or (dim // heads) % 2:
            what = (
                f"embed_dim {dim} / num_heads {heads} must be an even whole number (the rotary embedding needs pairs)"
            )
            misfits.append(Misfit(("model", "num_heads"), what))
        if heads % kv_heads:
            what = f"num_heads {heads} is no multiple of num_kv_heads {kv_heads}"
            misfits.append(Misfit(("model", "num_kv_heads"), what))


def _check_sequence(recipe: Recipe, layout: Layout, torchtitan: Mapping[str, Any], misfits: list[Misfit]) -> None:
    """What the sequence is cut into, each rank's part by its own reasons."""
    tensor, context, seq_len = layout.tensor_parallel, layout.context_parallel, recipe.training.seq_len
    always = recipe.model.name in _SEQUENCE_IN_HALVES
    cut_by_tensor = recipe.parallelism.sequence_parallel or layout.expert_parallel > 1 or always
    chunks = torchtitan.get("loss.num_chunks", _LOSS_CHUNKS)
    parts = {
        "tensor and context parallelism": (tensor if cut_by_tensor else 1)
        * (2 * context if context > 1 or always else 1),
        "context parallelism of FlexAttention": context * _ATTENTION_BLOCK if context > 1 else 1,
        f"a loss computed in {chunks} chunks": chunks * context,
    }
    why = [reason for reason, number in parts.items() if seq_len % number]
    if why:
        what = f"{seq_len} must be a multiple of {math.lcm(*parts.values())}"
        misfits.append(Misfit(("training", "seq_len"), what, f"for {' and '.join(why)}"))


def _check_parallelism(recipe: Recipe, layout: Layout, torchtitan: Mapping[str, Any], misfits: list[Misfit]) -> None:
    parallelism = recipe.parallelism
    tensor, pipeline, context = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel

    def misfit(field: str, what: str, hint: str = "") -> None:
        misfits.append(Misfit(("parallelism", field), what, hint))

    if layout.data_parallel % layout.data_parallel_replicate:
        misfit(
            "data_parallel_replicate",
            f"{layout.data_parallel_replicate} does not divide the data-parallel degree {layout.data_parallel}",
        )
    within = layout.data_parallel // layout.data_parallel_replicate * context * tensor
    if within % layout.expert_parallel:
        misfit("expert_parallel", f"{layout.expert_parallel} does not divide the {within} ranks that hold one copy")
    sizes = model_sizes(recipe)
    if sizes is not None:
        # The output layer too: the loss takes an equal part of the logits from each rank.
        cut = {"num_heads": sizes.num_heads, "num_kv_heads": sizes.num_kv_heads, "vocab_size": sizes.vocab_size}
        uneven = [f"{name} {number}" for name, number in cut.items() if number % tensor]
        if uneven:
            misfit("tensor_parallel", f"{tensor} does not divide the model's {' and '.join(uneven)}")
        if sizes.tied_weights and pipeline > 1:
            misfit("pipeline_parallel", "torchtitan cannot split a model with tied weights into pipeline stages")
        if layout.expert_parallel > 1 and not sizes.mixture_of_experts:
            misfit("expert_parallel", "the model has no experts")
        elif sizes.mixture_of_experts and sizes.num_experts % layout.expert_parallel:
            misfit(
                "expert_parallel", f"{layout.expert_parallel} does not divide the model's {sizes.num_experts} experts"
            )
        stages = pipeline * _STAGES_PER_RANK.get(parallelism.pipeline_schedule, 1)
        # torchtitan's own field says how many stages there are.
        counted = "parallelism.pipeline_parallel_layers_per_stage" not in torchtitan
        if pipeline > 1 and counted and sizes.num_layers < stages:
            misfit("pipeline_parallel", f"{stages} stages are more than the model's {sizes.num_layers} layers")
    if pipeline > 1:
        _check_pipeline_batch(recipe, misfits)


def _check_pipeline_batch(recipe: Recipe, misfits: list[Misfit]) -> None:
    batch, microbatch = recipe.training.batch_size, recipe.parallelism.pipeline_microbatch_size
    schedule, ranks = recipe.parallelism.pipeline_schedule, recipe.parallelism.pipeline_parallel
    if batch % microbatch:
        what = f"{microbatch} does not divide batch_size {batch}"
        misfits.append(Misfit(("parallelism", "pipeline_microbatch_size"), what))
        return
    microbatches = batch // microbatch
    made = f"batch_size {batch} makes {microbatches} microbatches of {microbatch}"
    stages = ranks * _STAGES_PER_RANK.get(schedule, 1)
    if schedule in _FILLED and microbatches < stages:
        hint = f"at least {stages * microbatch}"
        misfits.append(Misfit(("training", "batch_size"), f"{made}, fewer than {stages} stages", hint))
    if schedule in _IN_ROUNDS and microbatches % max(1, microbatches // ranks):
        what = f"{made}, which {schedule} cannot part into rounds of {ranks} or more"
        misfits.append(Misfit(("training", "batch_size"), what, f"a multiple of {ranks * microbatch}"))
