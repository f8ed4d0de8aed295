"""From a recipe and a number of ranks to the degree of each parallelism and the batch, with every divisibility that
torchtitan demands. Knows no file and no place: problems come back with the field they belong to."""

from dataclasses import dataclass
from typing import Any

from titan_slurm.recipe.mapping import torchtitan_schema
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


@dataclass(frozen=True)
class Misfit:
    """A value that does not fit the others: the field that it stands in, what is wrong, and what would be right."""

    field: tuple[str, str]
    what: str
    hint: str = ""


def tasks_per_node(recipe: Recipe) -> int:
    """Ranks per node: one per GPU, unless the recipe says otherwise."""
    return recipe.slurm.tasks_per_node or recipe.slurm.gpus_per_node or 1


def make_layout(recipe: Recipe) -> tuple[Layout | None, list[Misfit]]:
    """The layout of a recipe on its own nodes; None where it cannot be computed. All misfits are found."""
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
    _check_parallelism(recipe, layout, misfits)
    return layout, misfits


def model_shape(recipe: Recipe) -> dict[str, Any] | None:
    """Sizes of the model: from torchtitan's flavor or from the recipe; None if the recipe names neither rightly."""
    model = recipe.model
    if model.flavor:
        shape: dict[str, Any] | None = torchtitan_schema()["models"].get(model.name, {}).get(model.flavor)
        return shape
    if missing_sizes(recipe):
        return None
    return {
        "vocab_size": model.vocab_size,
        "embed_dim": model.embed_dim,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "intermediate_size": model.intermediate_size,
        "rope_theta": model.rope_theta or 500000.0,
        "max_seq_len": model.max_seq_len or recipe.training.seq_len,
        "tied_weights": False,
        "mixture_of_experts": False,
    }


SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "intermediate_size")
OPTIONAL_SIZES = ("num_kv_heads", "rope_theta", "max_seq_len")


def missing_sizes(recipe: Recipe) -> list[str]:
    """The sizes that a model without a flavor still needs."""
    return [name for name in SIZES if getattr(recipe.model, name) is None]


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
    shape = model_shape(recipe)
    if shape is None:
        return
    if recipe.training.seq_len > shape["max_seq_len"]:
        what = f"{recipe.training.seq_len} is more than the model's max_seq_len {shape['max_seq_len']}"
        misfits.append(Misfit(("training", "seq_len"), what))
    if recipe.model.flavor is None:
        dim, heads, kv_heads = shape["embed_dim"], shape["num_heads"], shape["num_kv_heads"]
        if dim % heads or (dim // heads) % 2:
            what = (
                f"embed_dim {dim} / num_heads {heads} must be an even whole number (the rotary embedding needs pairs)"
            )
            misfits.append(Misfit(("model", "num_heads"), what))
        if heads % kv_heads:
            what = f"num_heads {heads} is no multiple of num_kv_heads {kv_heads}"
            misfits.append(Misfit(("model", "num_kv_heads"), what))


def _check_parallelism(recipe: Recipe, layout: Layout, misfits: list[Misfit]) -> None:
    parallelism, training = recipe.parallelism, recipe.training
    tensor, pipeline, context = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel

    def misfit(field: str, what: str, hint: str = "") -> None:
        misfits.append(Misfit(("parallelism", field), what, hint))

    if layout.data_parallel % layout.data_parallel_replicate:
        misfit(
            "data_parallel_replicate",
            f"{layout.data_parallel_replicate} does not divide the data-parallel degree {layout.data_parallel}",
        )
    sequence_parts = (tensor if parallelism.sequence_parallel else 1) * (2 * context if context > 1 else 1)
    if training.seq_len % sequence_parts:
        misfits.append(
            Misfit(
                ("training", "seq_len"),
                f"{training.seq_len} must be a multiple of {sequence_parts} for this sequence and context parallelism",
            )
        )
    within = layout.data_parallel // layout.data_parallel_replicate * context * tensor
    if within % layout.expert_parallel:
        misfit("expert_parallel", f"{layout.expert_parallel} does not divide the {within} ranks that hold one copy")
    shape = model_shape(recipe)
    if shape is not None:
        uneven = [f"{name} {shape[name]}" for name in ("num_heads", "num_kv_heads") if shape[name] % tensor]
        if uneven:
            misfit("tensor_parallel", f"{tensor} does not divide the model's {' and '.join(uneven)}")
        if shape["tied_weights"] and pipeline > 1:
            misfit("pipeline_parallel", "torchtitan cannot split a model with tied weights into pipeline stages")
        if layout.expert_parallel > 1 and not shape["mixture_of_experts"]:
            misfit("expert_parallel", "the model has no experts")
        stages = pipeline * _STAGES_PER_RANK.get(parallelism.pipeline_schedule, 1)
        if pipeline > 1 and shape["num_layers"] < stages:
            misfit("pipeline_parallel", f"{stages} stages are more than the model's {shape['num_layers']} layers")
    if pipeline > 1:
        _check_pipeline_batch(recipe, misfits)


def _check_pipeline_batch(recipe: Recipe, misfits: list[Misfit]) -> None:
    batch, microbatch = recipe.training.batch_size, recipe.parallelism.pipeline_microbatch_size
    if batch % microbatch:
        what = f"{microbatch} does not divide batch_size {batch}"
        misfits.append(Misfit(("parallelism", "pipeline_microbatch_size"), what))
    stages = recipe.parallelism.pipeline_parallel
    if batch % microbatch == 0 and batch // microbatch < stages:
        what = (
            f"batch_size {batch} makes {batch // microbatch} microbatches of {microbatch}, fewer than {stages} stages"
        )
        misfits.append(Misfit(("training", "batch_size"), what, f"at least {stages * microbatch}"))
