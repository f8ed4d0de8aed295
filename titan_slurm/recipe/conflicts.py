"""What cannot be had together: options of speed and memory that torchtitan, PyTorch or a device refuses, some of them
only at the first step, or would ignore in silence."""

from collections.abc import Iterator
from dataclasses import dataclass

from titan_slurm.errors import did_you_mean
from titan_slurm.recipe.mapping import activation_checkpointing, torchtitan_schema
from titan_slurm.recipe.model import TRANSFORMERS, model_sizes
from titan_slurm.recipe.schema import Recipe
from titan_slurm.run.plan import Layout

# Those that part the backward pass in two, which PyTorch cannot do with a compiled one.
_SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
# Attention without FlexAttention; its kernels have no fp32.
_VARLEN = ("gpt_oss",)
_NO_CONTEXT_PARALLEL = {
    "gpt_oss": "its attention cannot be split along the sequence",
    "kimi_k2_7": "its pictures need the whole sequence",
}
# Families whose attention has windows or sinks, which are only in kinds of attention that have no backward on a CPU.
_ONLY_ON_GPUS = ("gpt_oss", "kimi_k2_7", "muse_glimmer")
_FLEX_BACKENDS = ("inductor", "aot_eager")
# Of the tensor cores: each dimension of a product in float8 is a multiple of it.
_FLOAT8_MULTIPLE = 16


@dataclass(frozen=True)
class Misfit:
    """A value that does not fit the others: the field that it stands in, what is wrong, and what would be right."""

    field: tuple[str, str]
    what: str
    hint: str = ""


def conflicts(recipe: Recipe, layout: Layout) -> Iterator[Misfit]:
    """Every contradiction of a recipe that is no matter of numbers of ranks."""
    if recipe.slurm.gpus_per_node == 0:
        yield from needing_gpus(recipe, "slurm.gpus_per_node is 0")
    yield from _of_compile(recipe)
    yield from _of_parallelism(recipe, layout)
    if recipe.float8.enabled:
        yield from _of_float8(recipe, layout)


def needing_gpus(recipe: Recipe, why: str) -> Iterator[Misfit]:
    """What a recipe asks for that a CPU cannot do. `why` there is no GPU."""
    parallelism = recipe.parallelism
    asked = {
        ("model", "name"): recipe.model.name in _ONLY_ON_GPUS,
        ("parallelism", "context_parallel"): parallelism.context_parallel > 1,
        ("parallelism", "async_tensor_parallel"): parallelism.async_tensor_parallel,
        ("parallelism", "fsdp_symmetric_memory"): parallelism.fsdp_symmetric_memory,
        ("memory", "cpu_offload"): recipe.memory.cpu_offload,
        ("float8", "enabled"): recipe.float8.enabled,
    }
    for field, is_asked in asked.items():
        if is_asked:
            yield Misfit(field, f"needs GPUs, and {why}")


def _of_compile(recipe: Recipe) -> Iterator[Misfit]:
    backend, backends = recipe.compile.backend, torchtitan_schema()["compile_backends"]
    if backend not in backends:
        yield Misfit(
            ("compile", "backend"), f"torch.compile has no backend {backend!r}", did_you_mean(backend, backends)
        )
    elif _compiles_model(recipe) and _has_flex_attention(recipe) and backend not in _FLEX_BACKENDS:
        yield Misfit(("compile", "backend"), f"{backend} cannot compile FlexAttention", " or ".join(_FLEX_BACKENDS))
    if activation_checkpointing(recipe) == "memory_budget" and not _compiles_model(recipe):
        field = ("memory", "activation_checkpointing")
        yield Misfit(field, "memory_budget is torch.compile's work", _COMPILE_MODEL)


def _of_parallelism(recipe: Recipe, layout: Layout) -> Iterator[Misfit]:
    parallelism, model = recipe.parallelism, recipe.model
    if parallelism.async_tensor_parallel:
        yield from _of_async_tensor_parallel(recipe)
    if parallelism.fsdp_symmetric_memory:
        yield from _of_symmetric_memory(recipe, layout)
    if layout.pipeline_parallel > 1 and parallelism.pipeline_schedule in _SPLIT_BACKWARD and _compiles_model(recipe):
        what = f"{parallelism.pipeline_schedule} parts the backward pass, which PyTorch cannot do if it is compiled"
        yield Misfit(("parallelism", "pipeline_schedule"), what, 'another schedule, or compile.components = ["loss"]')
    if layout.context_parallel > 1:
        vision = model.name == "muse_glimmer" and (model.flavor or "").endswith("_mm")
        why = "its pictures need the whole sequence" if vision else _NO_CONTEXT_PARALLEL.get(model.name)
        if why:
            yield Misfit(("parallelism", "context_parallel"), f"{model.name} cannot have it: {why}")
    if model.name == TRANSFORMERS and layout.tensor_parallel > 1 and not parallelism.sequence_parallel:
        what = "models of transformers always have it with tensor_parallel"
        yield Misfit(("parallelism", "sequence_parallel"), what, "leave it out")
    if model.name in _VARLEN and recipe.training.mixed_precision == "fp32" and recipe.slurm.gpus_per_node:
        yield Misfit(("training", "mixed_precision"), f"the attention of {model.name} computes in bf16 only", "bf16")


def _of_async_tensor_parallel(recipe: Recipe) -> Iterator[Misfit]:
    field = ("parallelism", "async_tensor_parallel")
    if recipe.parallelism.tensor_parallel == 1:
        yield Misfit(field, "there is no tensor_parallel whose communication it could overlap")
    elif not recipe.parallelism.sequence_parallel:
        yield Misfit(field, "without sequence_parallel there is no communication that it could overlap")
    if not _compiles_model(recipe):
        yield Misfit(field, "is torch.compile's work", _COMPILE_MODEL)
    elif recipe.compile.backend != "inductor":
        yield Misfit(field, f"the backend {recipe.compile.backend} cannot do it", 'compile.backend = "inductor"')


def _of_symmetric_memory(recipe: Recipe, layout: Layout) -> Iterator[Misfit]:
    field = ("parallelism", "fsdp_symmetric_memory")
    if layout.data_parallel // layout.data_parallel_replicate * layout.context_parallel == 1:
        yield Misfit(field, "no weights are sharded, so FSDP has nothing to communicate")
    if recipe.model.name == "kimi_k2_7":
        yield Misfit(field, f"torchtitan does not have it for {recipe.model.name}")


def _of_float8(recipe: Recipe, layout: Layout) -> Iterator[Misfit]:
    sizes = model_sizes(recipe)
    if recipe.model.name == TRANSFORMERS:
        yield Misfit(("float8", "enabled"), "torchtitan cannot convert models of transformers")
        return
    if recipe.float8.grouped_experts and sizes is not None and not sizes.mixture_of_experts:
        yield Misfit(("float8", "grouped_experts"), "the model has no experts")
    sequences = recipe.parallelism.pipeline_microbatch_size if layout.pipeline_parallel > 1 else layout.batch_size
    tokens = sequences * recipe.training.seq_len // layout.context_parallel
    if tokens % _FLOAT8_MULTIPLE:
        what = f"{tokens} tokens at once on a rank are no multiple of {_FLOAT8_MULTIPLE}, as float8 needs"
        yield Misfit(("training", "seq_len"), what)
    if sizes is None:
        return
    widths = {"embed_dim": sizes.embed_dim}
    for layer in sizes.layers:
        parts = {"query": layer.query, "key": layer.key, "intermediate_size": layer.intermediate_size}
        widths |= {name: width // layout.tensor_parallel for name, width in parts.items()}
    uneven = [f"{name} {width}" for name, width in widths.items() if width % _FLOAT8_MULTIPLE]
    if uneven:
        what = f"widths on a rank that are no multiples of {_FLOAT8_MULTIPLE}, as float8 needs: {', '.join(uneven)}"
        yield Misfit(("float8", "enabled"), what)


_COMPILE_MODEL = 'compile.enabled = true, with "model" among compile.components'


def _compiles_model(recipe: Recipe) -> bool:
    return recipe.compile.enabled and "model" in recipe.compile.components


def _has_flex_attention(recipe: Recipe) -> bool:
    # On a CPU it is replaced.
    return recipe.model.name not in _VARLEN and recipe.slurm.gpus_per_node > 0
