"""Recipe schema 1: sections, fields, types and what each field means. Checks across fields live in `check`, what a
field becomes in torchtitan's configuration in `mapping`."""

from typing import Any, Literal

from pydantic import Field

from titan_slurm.fields import (
    Beta,
    Count,
    Flag,
    Fraction,
    Kind,
    Line,
    Number,
    Placement,
    Positive,
    PositiveNumber,
    Section,
    Text,
    Version,
)


class RecipeSection(Section):
    """`[recipe]`: what this file is."""

    schema_: Literal[1] = Field(1, alias="schema", description="the recipe format; this is 1")
    name: Text | None = Field(None, description="name of the recipe; the file's name if left out")
    version: Version = Field("0.0.0", description="semantic version")
    description: str = Field("", description="one line for people")
    extends: Text | None = Field(None, description="a recipe that this one changes: a name, or a path beside this file")


class ModelSection(Section):
    """`[model]`: a family and a flavor of torchtitan's, a Llama by its sizes, or a model of Hugging Face's by its
    configuration."""

    name: Text = Field(
        "llama3", description='model family, as torchtitan calls it; or "transformers", with a config (below)'
    )
    flavor: Text | None = Field(None, description="size, as torchtitan calls it, e.g. 8B; or give the sizes below")
    vocab_size: Positive | None = None
    embed_dim: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = Field(None, description="fewer than num_heads for grouped-query attention")
    intermediate_size: Positive | None = Field(None, description="width of the feed-forward layer")
    rope_theta: PositiveNumber | None = Field(None, description="base of the rotary embedding; 500000 if left out")
    max_seq_len: Positive | None = Field(None, description="longest sequence; training.seq_len if left out")
    config: Text | dict[str, Any] | None = Field(
        None,
        description='with name = "transformers": a folder with a Hugging Face config.json, or a table [model.config] '
        "with what stands in such a file (model_type, hidden_size, …)",
    )
    initial_weights: Text | None = Field(
        None,
        description="a folder with a model's weights in Hugging Face's format (safetensors) to start from; read once, "
        "at the run's first start",
    )


class DataSection(Section):
    """`[data]`: text and tokenizer. Left out: Python's own reference pages, for debugging."""

    dataset: Text = Field(
        "python_docs",
        description="python_docs (built in); text: your own files, tokenized once by the run; tokens: what a run has "
        "tokenized; or a dataset that torchtitan knows",
    )
    dataset_path: Text | None = Field(
        None,
        description='text: a .jsonl (field "text"), .txt or .parquet file, or a folder of them; tokens: a run\'s '
        "assets/tokens; else where the dataset lies, if not where torchtitan looks",
    )
    tokenizer: Text = Field(
        "python_docs", description="folder with a Hugging Face tokenizer, or python_docs (built in)"
    )
    num_workers: Count = Field(0, description="data loading processes per rank")
    infinite: Flag = Field(True, description="start again when the data has run out")


class TrainingSection(Section):
    """`[training]`: how long, how much at once, how fast."""

    batch_size: Positive = Field(1, description="sequences per data-parallel rank and forward pass")
    seq_len: Positive = Field(2048, description="tokens per sequence")
    global_batch_size: Positive | None = Field(None, description="sequences per step over all ranks")
    gradient_accumulation_steps: Positive | None = Field(None, description="forward passes per step")
    max_steps: Positive = Field(10000, description="optimizer steps")
    learning_rate: PositiveNumber | None = Field(None, description="the same as optimizer.lr")
    warmup_steps: Count | None = Field(None, description="the same as lr_schedule.warmup_steps")
    max_grad_norm: PositiveNumber = Field(1.0, description="gradients are clipped to this norm")
    seed: Count = Field(0, description="of the weights' initial values and the order of the data")
    deterministic: Flag = Field(False, description="only deterministic algorithms, at some cost")
    dtype: Literal["bf16", "fp32"] = Field("fp32", description="of weights, gradients and optimizer states")
    mixed_precision: Literal["bf16", "fp32"] = Field("bf16", description="of the computation in forward and backward")
    log_interval: Positive = Field(10, description="steps between two logged ones")


class ParallelismSection(Section):
    """`[parallelism]`: ranks = pipeline × data × context × tensor."""

    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    context_parallel: Positive = 1
    expert_parallel: Positive = Field(1, description="for mixture-of-experts models; within data × tensor")
    data_parallel: Positive | None = Field(None, description="all remaining ranks if left out")
    data_parallel_replicate: Positive = Field(
        1,
        description="how many of the data-parallel ranks hold whole copies: 1 is FSDP, data_parallel is DDP, else HSDP",
    )
    sequence_parallel: Flag = Field(True, description="with tensor_parallel: shard activations along the sequence too")
    pipeline_schedule: Text = Field("1F1B", description="a schedule of torch.distributed.pipelining")
    pipeline_microbatch_size: Positive = Field(1, description="sequences per microbatch; divides batch_size")
    reshard_after_forward: Literal["default", "always", "never"] = Field(
        "default",
        description="whether FSDP frees a layer's gathered weights between forward and backward; default: not with "
        "pipeline_parallel",
    )
    async_tensor_parallel: Flag = Field(
        False, description="overlap the communication of tensor_parallel with matrix products; needs [compile]"
    )
    fsdp_symmetric_memory: Flag = Field(
        False,
        description="FSDP's communication through symmetric memory, so that it takes less of the GPU from the "
        "computation; compute capability 9.0 or newer",
    )


class OptimizerSection(Section):
    """`[optimizer]`."""

    name: Literal["adamw", "adam"] = "adamw"
    lr: PositiveNumber | None = Field(None, description="peak learning rate; the same as training.learning_rate")
    weight_decay: Number = 0.1
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveNumber = 1e-8
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"


class LrScheduleSection(Section):
    """`[lr_schedule]`: linear warm-up, then stable, then decay."""

    warmup_steps: Count | None = Field(None, description="the same as training.warmup_steps; 200 if left out")
    decay_type: Literal["linear", "sqrt", "cosine"] = "linear"
    decay_ratio: Fraction | None = Field(
        None, description="part of the steps that decays; all after warm-up if left out"
    )
    min_lr_factor: Fraction = Field(0.0, description="final learning rate as a part of the peak")
    total_steps: Positive | None = Field(None, description="where the schedule ends; max_steps if left out")


class CheckpointingSection(Section):
    """`[checkpointing]`."""

    save_interval: Positive = Field(500, description="steps between two checkpoints; the last step always has one")
    save_dir: Text = Field(
        "./checkpoints", description="relative: in the run directory; absolute: a folder there named after the run"
    )
    resume_from_checkpoint: str = Field("", description="a step-N folder of another run to start from; empty: none")
    keep_latest: Count = Field(10, description="how many to keep; 0 keeps all")
    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    export_to_hf: Flag = Field(
        False,
        description="after the last step, also write the weights in Hugging Face's format into the run's export/",
    )


class MemorySection(Section):
    """`[memory]`. gradient_checkpointing says whether, activation_checkpointing also how: true is "full"."""

    gradient_checkpointing: Flag | None = Field(None, description="recompute activations in the backward pass")
    activation_checkpointing: Flag | Literal["full", "selective", "memory_budget", "none"] | None = Field(
        None, description='true is "full", false is "none"; torchtitan\'s "selective" if neither field is given'
    )
    cpu_offload: Flag = Field(False, description="parameters, gradients and optimizer states in host memory")


class CompileSection(Section):
    """`[compile]`: torch.compile."""

    enabled: Flag = False
    backend: Text = Field("inductor", description="a backend of torch.compile")
    components: list[Literal["model", "loss"]] = Field(
        ["model", "loss"],
        description="what is compiled: each layer of the model, the loss, or both",
        min_length=1,
    )


class Float8Section(Section):
    """`[float8]`: matrix products in float8, weights and gradients as before. Compute capability 8.9 or newer, and the
    package torchao (`pip install 'titan-slurm[float8]'`)."""

    enabled: Flag = False
    recipe: Literal["rowwise", "rowwise_with_gw_hp"] = Field(
        "rowwise", description="torchao's: one scale per row; rowwise_with_gw_hp leaves the weights' gradients in bf16"
    )
    filter_fqns: list[Text] = Field(
        ["lm_head", "router.gate"],
        description="linear layers with one of these in their name stay as they are",
    )
    grouped_experts: Flag = Field(False, description="the experts of a mixture of experts too")


class WandbSection(Section):
    """`[wandb]`."""

    enabled: Flag = True
    project: Text = "titan-slurm"
    entity: str = ""
    group: str = ""
    tags: list[Text] = Field(default_factory=list)
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: WANDB_MODE if that is set; else offline where there is no key"
    )


class SlurmSection(Placement):
    """`[slurm]`: what a run asks of any cluster."""

    nodes: Positive = 1
    gpus_per_node: Count = Field(8, description="0 trains on CPUs; left out, a cluster profile's nodes.gpus")
    gpu_type: Line | None = Field(None, description="only GPUs of this type, as Slurm calls it")
    tasks_per_node: Positive | None = Field(None, description="ranks per node; gpus_per_node if left out, 1 on CPUs")


class RequeueSection(Section):
    """`[requeue]`: when a run comes back by itself. The numbers are how often an attempt may end so, one after another
    without a new checkpoint; preemptions and time limits are free while there are new ones."""

    enabled: Flag = Field(True, description="come back at all")
    crashed: Count = Field(3, description="an error, or a killed rank")
    hung: Count = Field(3, description="no step ended in time")
    node_failure: Count = Field(5, description="Slurm lost a node")
    stalled: Count = Field(5, description="attempts, whatever their end, that left no new checkpoint")
    crash_delay: Number = Field(30.0, description="seconds before the restart after a crash; doubled each time")
    hang_timeout: PositiveNumber | None = Field(
        None,
        description="seconds without the end of a step or save that count as hung; learned if left out",
    )
    strict: Flag = Field(
        False,
        description="end rather than go on under another version of Python, titan-slurm, torch, torchtitan, CUDA, the "
        "GPU driver or NCCL than the run began with; else it is noted",
    )


class Recipe(Section):
    """A whole recipe. A missing section is its defaults."""

    recipe: RecipeSection = RecipeSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    parallelism: ParallelismSection = ParallelismSection()
    optimizer: OptimizerSection = OptimizerSection()
    lr_schedule: LrScheduleSection = LrScheduleSection()
    checkpointing: CheckpointingSection = CheckpointingSection()
    memory: MemorySection = MemorySection()
    compile: CompileSection = CompileSection()
    float8: Float8Section = Float8Section()
    wandb: WandbSection = WandbSection()
    slurm: SlurmSection = SlurmSection()
    requeue: RequeueSection = RequeueSection()
    torchtitan: dict[str, Any] = Field(default_factory=dict)


def sections() -> dict[str, Kind | None]:
    """Each section's name and class; None for `[torchtitan]`, whose fields are torchtitan's own."""
    return {
        name: field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, Section) else None
        for name, field in Recipe.model_fields.items()
    }
