"""GPU memory that a training takes at its peak: what torchtitan 0.3.0 with FSDP2 keeps, and when. Which models and GPUs
there are does not live here.

A step has four moments at one of which memory is highest: the loss, whose logits come on top of all activations; the
gradient of the output head; the first layer's backward pass; and the optimizer's step. Each is added up from what is
alive at it, on each pipeline rank, and the worst counts. What a mode of activation checkpointing keeps follows from the
modules of torchtitan/models/common and from torchtitan/distributed/activation_checkpoint.py. Experts are taken to be
equally busy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from titan_slurm.recipe.mapping import activation_checkpointing, torchtitan_values
from titan_slurm.recipe.model import TRANSFORMERS, LayerSizes, ModelSizes
from titan_slurm.recipe.schema import Recipe
from titan_slurm.run.plan import Layout

_MIB = 2**20
# Measured on H200s: CUDA's context with the kernels that are loaded, and NCCL's buffers for each group of ranks. The
# latter grow with the number of ranks, for which there is no figure here.
_CONTEXT = 1230 * _MIB
_PER_GROUP = 150 * _MIB
# What torch's allocator holds beyond the peak of each stream, much of it left over from building the model: measured
# from 2.3 to 5.4 GiB, whatever the activations; of a small training, a part.
_LEFT_OVER = 3500 * _MIB
_LEFT_OVER_PART = 0.25
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Schedules that give each rank two stages, and those whose second stage comes back along the ranks.
_TWO_STAGES = ("Interleaved1F1B", "InterleavedZeroBubble", "LoopedBFS", "ZBVZeroBubble", "DualPipeV")
_V_SHAPED = ("ZBVZeroBubble", "DualPipeV")


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that takes the most, at its peak. Each part is what it takes at that moment."""

    weights: int = 0
    """The rank's shard, and tables of rotations."""
    gradients: int = 0
    """The rank's shard."""
    optimizer: int = 0
    fsdp: int = 0
    """Weights gathered from other ranks, and gradients on their way to them."""
    activations: int = 0
    """What the backward pass needs, and what it makes on its way."""
    loss: int = 0
    """The logits of one chunk, their gradients and those of the last hidden states."""
    runtime: int = 0
    """CUDA, NCCL, and what torch's allocator cannot use."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Each part by its name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class _Setting:
    """What a recipe and its layout say about memory."""

    sizes: ModelSizes
    layout: Layout
    mode: str
    budget: float
    storage: int
    """Bytes of a number among weights, gradients and optimizer states."""
    compute: int
    """Bytes of a number in forward and backward pass."""
    reduce: int
    """Bytes of a number of a gradient that ranks add up."""
    sequences: int
    """In one forward pass."""
    seq_len: int
    schedule: str
    microbatches: int
    sequence_parallel: bool
    reshard: str
    compiled_model: bool
    compiled_loss: bool
    gradients_stay: bool
    """From one step to the next."""
    offload: bool
    loss_chunks: int
    layers_per_stage: int | None
    eager_norms: bool
    """Norms written out in Python, as in transformers, rather than fused."""

    @property
    def shards(self) -> int:
        """Ranks over which FSDP spreads a weight."""
        layout = self.layout
        return layout.data_parallel // layout.data_parallel_replicate * layout.context_parallel

    @property
    def tensor(self) -> int:
        return self.layout.tensor_parallel

    @property
    def sequence(self) -> int:
        """Parts into which sequence parallelism cuts what stands between attention and feed-forward layers."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def tokens(self) -> int:
        """Of one forward pass on one rank."""
        return self.sequences * self.seq_len // self.layout.context_parallel


def memory(recipe: Recipe, layout: Layout, sizes: ModelSizes, torchtitan: dict[str, Any]) -> Memory:
    """What the worst GPU takes. `torchtitan`: the recipe's `[torchtitan]`, by path."""
    setting = _setting(recipe, layout, sizes, torchtitan)
    moments = (moment for rank in range(layout.pipeline_parallel) for moment in _moments(setting, rank))
    return max(moments, key=lambda moment: moment.total)


def _setting(recipe: Recipe, layout: Layout, sizes: ModelSizes, torchtitan: dict[str, Any]) -> _Setting:
    values = torchtitan_values(recipe, layout, torchtitan, device="cuda")
    pipelined, microbatch = layout.pipeline_parallel > 1, values["parallelism.pipeline_parallel_microbatch_size"]
    components = values.get("compile.components", ["model", "loss"]) if values["compile.enable"] else []
    return _Setting(
        sizes=sizes,
        layout=layout,
        mode=activation_checkpointing(recipe),
        budget=values.get("activation_checkpoint.memory_budget", 0.5),
        storage=_BYTES[values["training.dtype"]],
        compute=_BYTES[values["training.mixed_precision_param"]],
        reduce=_BYTES[values.get("training.mixed_precision_reduce", "float32")],
        sequences=microbatch if pipelined else layout.batch_size,
        seq_len=values["training.seq_len"],
        schedule=values["parallelism.pipeline_parallel_schedule"],
        microbatches=layout.batch_size // microbatch if pipelined else 1,
        sequence_parallel=values["parallelism.enable_sequence_parallel"],
        reshard=values["parallelism.fsdp_reshard_after_forward"],
        compiled_model="model" in components,
        compiled_loss="loss" in components,
        # CUDA graphs need gradients that stay where they are.
        gradients_stay=not values.get("training.disable_cuda_graphs", False) or layout.gradient_accumulation_steps > 1,
        offload=values["training.enable_cpu_offload"],
        loss_chunks=values.get("loss.num_chunks", 8),
        layers_per_stage=values.get("parallelism.pipeline_parallel_layers_per_stage"),
        eager_norms=recipe.model.name == TRANSFORMERS,
    )


@dataclass(frozen=True)
class _Share:
    """What one pipeline rank has of the model: numbers of parameters, when FSDP has gathered them."""

    layers: list[LayerSizes]
    units: list[int]
    """Each layer's."""
    ends: list[int]
    """The embedding's and the output head's, where the rank has them."""
    head: int
    tied: bool
    """Whether embedding and head are there, and one."""
    whole: int
    """All of them."""
    shard: float
    """Those that stay on the rank."""


def _share(setting: _Setting, rank: int) -> _Share:
    layers, first, last = _stages_of(setting, rank)
    sizes, tensor = setting.sizes, setting.tensor
    units = [_unit(setting, layer) for layer in layers]
    head = (sizes.output_head or sizes.embedding) // tensor * last
    ends = [sizes.embedding // tensor] * first + [head] * last
    tied = sizes.tied_weights and first and last
    outside = sum(ends[:1] if tied else ends) + sizes.other * first // tensor
    # A rank's experts are spread over fewer ranks than the rest, but there are fewer of them.
    experts = sum(layer.expert * sizes.num_experts for layer in layers) / tensor
    shard = (sum(layer.dense for layer in layers) / tensor + outside + experts) / setting.shards
    return _Share(layers, units, ends, head, tied, sum(units) + outside, shard)


def _moments(setting: _Setting, rank: int) -> Iterator[Memory]:
    """The moments of a step on one pipeline rank at which memory may be highest."""
    share, sizes = _share(setting, rank), setting.sizes
    largest, head = max(share.units, default=0), share.head
    kept = _kept_activations(setting, rank, share.layers)
    hidden = setting.tokens * sizes.embed_dim
    always = _gathered(setting, share) + _streams(setting, share)
    if setting.layout.pipeline_parallel > 1:
        # Gradients of a stage are added up whole, before the ranks that share it add up theirs.
        always += share.whole * setting.reduce
    if head:
        logits = setting.tokens / setting.loss_chunks * sizes.vocab_size / setting.tensor * _logit_bytes(setting)
        # The chunks of the hidden states, the sum of their gradients (in fp32) and its copy.
        of_hidden = (2 * setting.compute + 4) * hidden
        # All activations are there; the head's gradient is added up over the chunks, then sent to the other ranks.
        adding_up = head * (setting.reduce * (setting.loss_chunks > 1) + setting.compute)
        yield _moment(setting, share, fsdp=always + adding_up, activations=kept, loss=logits + of_hidden)
        yield _moment(setting, share, fsdp=always + 2 * head * setting.reduce, activations=kept, loss=of_hidden)
    # The head's gradient may still be on its way while the first layer's backward pass runs.
    on_its_way = max(head * setting.reduce, largest * (setting.compute + setting.reduce))
    of_layer = max((_backward_of_one(setting, layer) for layer in share.layers), default=0.0)
    yield _moment(
        setting,
        share,
        gradients=head / share.whole,
        fsdp=always + on_its_way + largest * setting.compute,
        activations=kept + of_layer + 2 * setting.compute * hidden,
    )
    yield _moment(setting, share, gradients=1, fsdp=always)


def _moment(
    setting: _Setting,
    share: _Share,
    *,
    gradients: float = 0,
    fsdp: float,
    activations: float = 0,
    loss: float = 0,
) -> Memory:
    """What comes and goes, in bytes, with what is always there. `gradients`: the part of them that has been made, where
    they do not stay from one step to the next."""
    on_gpu = 0 if setting.offload else share.shard * setting.storage
    tables = len(share.layers) * setting.seq_len * setting.sizes.rope_bytes
    # torchtitan ties the weights when both are there: the memory of one of them is never given back.
    twice = share.head / setting.shards * setting.storage if share.tied and on_gpu else 0
    taken = {
        "weights": on_gpu + twice + tables,
        "gradients": (1 if setting.gradients_stay else gradients) * on_gpu,
        "optimizer": 2 * on_gpu,
        "fsdp": fsdp,
        "activations": activations,
        "loss": loss,
    }
    left_over = min(_LEFT_OVER, _LEFT_OVER_PART * sum(taken.values()))
    taken["runtime"] = _CONTEXT + _PER_GROUP * _groups(setting.layout) + left_over
    return Memory(**{name: round(value) for name, value in taken.items()})


def _unit(setting: _Setting, layer: LayerSizes) -> int:
    """Parameters of a layer on one rank, when FSDP has gathered them."""
    expert_parallel = setting.layout.expert_parallel
    experts = layer.expert * setting.sizes.num_experts
    return layer.dense // setting.tensor + experts // (expert_parallel if expert_parallel > 1 else setting.tensor)


def _gathered(setting: _Setting, share: _Share) -> float:
    """Bytes of weights that are whole at once: an end and the layer at work, or all that are not given back."""
    pipelined = setting.layout.pipeline_parallel > 1
    if setting.reshard == "never" or (setting.reshard == "default" and pipelined):
        return share.whole * setting.compute
    return (max(share.units, default=0) + max(share.ends, default=0)) * setting.compute


def _streams(setting: _Setting, share: _Share) -> float:
    """Bytes that FSDP's own streams hold, which no other can use: what arrives for this unit and the next, and what
    goes out of the largest. With one rank there is nothing to gather, and the sum over ranks is a division."""
    largest = max([*share.units, *share.ends], default=0)
    if setting.shards == 1:
        return 2 * largest * setting.reduce
    ahead = max(share.units, default=0)
    return (largest + ahead) * setting.compute + largest * setting.reduce / setting.shards


def _stages_of(setting: _Setting, rank: int) -> tuple[list[LayerSizes], bool, bool]:
    """The layers of a pipeline rank, and whether it has the embedding and the output head, as torchtitan splits them
    (pipeline_parallel.py): each end counts as a layer."""
    layers = [each for alike in setting.sizes.layers for each in [alike] * alike.count]
    ranks = setting.layout.pipeline_parallel
    if ranks == 1:
        return layers, True, True
    per_rank = _stages_per_rank(setting)
    stages = ranks * per_rank
    low, more = divmod(len(layers) + 2, stages)
    counts = [low + (stage < more) - (stage == 0) - (stage == stages - 1) for stage in range(stages)]
    own = [rank, stages - 1 - rank] if setting.schedule in _V_SHAPED else list(range(rank, stages, ranks))
    mine = [layer for stage in own for layer in layers[sum(counts[:stage]) : sum(counts[: stage + 1])]]
    return mine, 0 in own, stages - 1 in own


def _stages_per_rank(setting: _Setting) -> int:
    if setting.layers_per_stage:
        stages = -(-(setting.sizes.num_layers + 2) // setting.layers_per_stage)
        return max(1, stages // setting.layout.pipeline_parallel)
    return 2 if setting.schedule in _TWO_STAGES else 1


def _in_flight(setting: _Setting, rank: int) -> float:
    """Microbatches whose activations a pipeline rank holds at once, counted in passes through all of its stages."""
    ranks, microbatches = setting.layout.pipeline_parallel, setting.microbatches
    stages = _stages_per_rank(setting)
    match setting.schedule:
        case _ if ranks == 1:
            return 1
        case "1F1B":
            return min(ranks - rank, microbatches)
        case "Interleaved1F1B" | "InterleavedZeroBubble":
            warm_up = 2 * (ranks - 1 - rank) + (stages - 1) * ranks + 1
            return min(warm_up / stages, microbatches)
        case "ZBVZeroBubble" | "DualPipeV":
            return min(ranks + 0.5, microbatches)
        case _:
            return microbatches


def _kept_activations(setting: _Setting, rank: int, layers: list[LayerSizes]) -> float:
    """Bytes that the forward pass leaves for the backward pass, and the last layer's output."""
    one_pass = sum(_kept(setting, layer) for layer in layers)
    outputs = setting.sizes.embed_dim * setting.compute / setting.sequence
    return (one_pass + outputs) * setting.tokens * _in_flight(setting, rank)


def _kept(setting: _Setting, layer: LayerSizes) -> float:
    """Bytes per token that one layer keeps for its backward pass."""
    full = setting.compute * setting.sizes.embed_dim / setting.sequence
    match setting.mode:
        case "full":
            return full
        case "selective":
            return full + _kept_by_selective(setting, layer)
        case "memory_budget":
            return full + setting.budget * (_kept_by_all(setting, layer) - full)
        case _:
            return _kept_by_all(setting, layer)


def _kept_by_all(setting: _Setting, layer: LayerSizes) -> float:
    """Bytes per token that a layer keeps where nothing is computed twice, but what the compiler can fuse."""
    sizes, tensor, width = setting.sizes, setting.tensor, setting.sizes.embed_dim
    fused = setting.compiled_model
    # Inputs of both norms, or what is added to them.
    residual = (2 + layer.post_norms) * width / setting.sequence * (3 if setting.eager_norms and not fused else 1)
    # Outputs of both norms, gathered from other ranks under sequence parallelism.
    normed = 2 * width
    attention = _attention_tensors(setting, layer) + (0 if fused else layer.latent / tensor)
    attention += (2 * layer.gate + (layer.attended if layer.gate and not fused else 0)) / tensor
    feed_forward = _inner_products(fused=fused) * layer.intermediate_size / tensor
    features = residual + normed + attention + feed_forward + _expert_features(setting, layer, fused=fused)
    return features * setting.compute + 4 * sizes.num_heads / tensor + sizes.rope_bytes


def _inner_products(*, fused: bool) -> int:
    """Tensors of a gated feed-forward layer's inner width: its two products, what comes of them, and without the
    compiler the activation function's result in between."""
    return 3 if fused else 4


def _kept_by_selective(setting: _Setting, layer: LayerSizes) -> float:
    """Bytes per token of the outputs that selective checkpointing saves: of every second matrix product, of attention,
    and of what ranks exchange."""
    width, tensor = setting.sizes.embed_dim, setting.tensor
    # The last product of each half adds up over the ranks: its output has the full width on each of them.
    attention = [*(each / tensor for each in layer.projections[:-1]), layer.projections[-1]]
    feed_forward = [layer.intermediate_size / tensor] * 2 + [width] if layer.intermediate_size else []
    # One that adds a bias is an operation of its own, always saved and not counted.
    counted = [each for each, biased in zip(attention, layer.biased, strict=True) if not biased] + feed_forward
    saved = sum(each for each, biased in zip(attention, layer.biased, strict=True) if biased)
    # The compiler drops the last one, which no gradient needs.
    saved += sum(counted[: len(counted) - setting.compiled_model : 2])
    exchanged = 2 * width / setting.sequence if setting.sequence > 1 else 0
    if layer.expert and setting.layout.expert_parallel > 1:
        exchanged += 2 * setting.sizes.experts_per_token * width / tensor
    # FlexAttention is compiled by itself where the layer is not: what it was given counts among its results.
    given = 0 if setting.compiled_model else layer.query + layer.key + layer.value
    features = saved + (layer.attended + given) / tensor + exchanged
    return features * setting.compute + 4 * setting.sizes.num_heads / tensor


def _attention_tensors(setting: _Setting, layer: LayerSizes) -> float:
    """Features per token of query, key, value and result. Under context parallelism keys and values are those of the
    whole sequence."""
    context = setting.layout.context_parallel
    return (layer.query + (layer.key + layer.value) * context + layer.attended) / setting.tensor


def _expert_features(setting: _Setting, layer: LayerSizes, *, fused: bool) -> float:
    """Features per token of the router's input (in fp32) and of what each of its experts keeps."""
    if not layer.expert:
        return 0
    width, of_fp32 = setting.sizes.embed_dim, 4 / setting.compute
    routed = width + _inner_products(fused=fused) * layer.expert_size + of_fp32 * width
    router = of_fp32 * (width + 2 * setting.sizes.num_experts)
    return router + setting.sizes.experts_per_token * routed / setting.tensor


def _backward_of_one(setting: _Setting, layer: LayerSizes) -> float:
    """Bytes that one layer's backward pass makes: what it computes again, and the gradients between its parts."""
    again = _kept_by_all(setting, layer) - _kept(setting, layer)
    wide = max(layer.intermediate_size, layer.query, setting.sizes.experts_per_token * layer.expert_size)
    gradients = (2 if setting.compiled_model else 3) * wide / setting.tensor
    return (max(0.0, again) + gradients * setting.compute) * setting.tokens


def _logit_bytes(setting: _Setting) -> int:
    """Bytes per logit of a chunk: it and its gradient; without the compiler, also in fp32, its logarithm and the
    gradients of both."""
    return 2 * setting.compute if setting.compiled_loss else setting.compute + 12


def _groups(layout: Layout) -> int:
    """Groups of ranks that have an NCCL communicator."""
    degrees = (
        layout.data_parallel // layout.data_parallel_replicate,
        layout.data_parallel_replicate,
        layout.tensor_parallel,
        layout.pipeline_parallel,
        layout.context_parallel,
        layout.expert_parallel,
    )
    groups = sum(degree > 1 for degree in degrees)
    return groups + 1 if layout.world_size > 1 else 0
