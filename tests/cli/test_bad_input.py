"""Every kind of bad input gets one line with the place, the field and what would be right, and nothing is made."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import CommandLine, Outcome


@dataclass(frozen=True)
class Mistake:
    """A recipe on top of `base`, the line of it that is at fault (marked `# here`), and what must be said."""

    what: str
    recipe: str = ""
    says: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    where: str = ""
    """What the error begins with, where it is not the marked line."""
    base: str = "llama3_debug"


BASE = '[recipe]\nextends = "llama3_debug"\n'
# The debug model on two GPUs, and a mixture of eight experts.
GPUS = "[slurm]\ngpus_per_node = 2\n"
MIXTURE = '[model]\nname = "qwen3"\nflavor = "debugmodel_moe"\n'

MISTAKES = (
    Mistake("not TOML", "[training]\nmax_steps = = 3 # here", ("not TOML", "column 13")),
    Mistake("a string that never ends", '[wandb]\nproject = "x # here', ("not TOML",)),
    Mistake("an unknown section", "[trainning] # here\nmax_steps = 3", ("[trainning]", "did you mean 'training'?")),
    Mistake("an unknown section without keys", "[trainning] # here", ("[trainning]", "did you mean 'training'?")),
    Mistake("an unknown section of two keys", "[nodes] # here\na = 1\nb = 2", ("unknown section [nodes]",)),
    Mistake("a section as a value", "model = 3 # here", ("model is a section", "write [model]")),
    Mistake("an unknown key", "[training]\nmax_step = 3 # here", ("[training]", "'max_step'", "mean 'max_steps'?")),
    Mistake("a key of another section", "[training]\nweight_decay = 0.1 # here", ("there is optimizer.weight_decay",)),
    Mistake("text for a number", '[training]\nmax_steps = "3" # here', ("training.max_steps = '3'", "whole number")),
    Mistake("text for a fraction", '[optimizer]\nlr = "3e-4" # here', ("optimizer.lr = '3e-4'", "must be a number")),
    Mistake("true for a number", "[optimizer]\nlr = true # here", ("optimizer.lr = True", "must be a number")),
    Mistake("a fraction for a whole number", "[training]\nbatch_size = 2.5 # here", ("batch_size", "whole number")),
    Mistake("a number for a flag", "[compile]\nenabled = 1 # here", ("compile.enabled = 1", "true or false")),
    Mistake("a number for text", "[wandb]\nproject = 1 # here", ("wandb.project = 1", "must be text in quotes")),
    Mistake("a table for a number", "[training]\nmax_steps = {} # here", ("training.max_steps", "whole number")),
    Mistake("an item of a wrong type", '[wandb]\ntags = ["a", 1] # here', ("wandb.tags = ['a', 1]", "text in quotes")),
    Mistake("a word that is no choice", '[training]\ndtype = "fp8" # here', ("training.dtype = 'fp8'", "'bf16'")),
    Mistake("a time limit that is none", '[slurm]\ntime = "1h" # here', ("slurm.time = '1h'", "1-00:00:00")),
    Mistake("two lines in a directive", '[slurm]\nqos = "a\\nb" # here', ("slurm.qos = 'a\\nb'", "one line of text")),
    Mistake("a negative size", "[training]\nbatch_size = -4 # here", ("training.batch_size = -4", "greater than 0")),
    Mistake("another schema", "", ("recipe.schema = 2: must be 1",), ("--set", "recipe.schema=2"), "--set recipe."),
    Mistake("no nodes", "", ("slurm.nodes = 0: must be greater than 0",), ("--nodes", "0"), "--nodes"),
    Mistake(
        "both forms of the batch",
        "[training]\nglobal_batch_size = 16 # here\ngradient_accumulation_steps = 2",
        ("training.global_batch_size", "gradient_accumulation_steps", "keep one"),
    ),
    Mistake(
        "a batch that does not divide",
        "[training]\nglobal_batch_size = 17 # here",
        ("training.global_batch_size: 17 is no multiple of batch_size 4 × data-parallel degree 2 = 8",),
    ),
    Mistake(
        "ranks that tensor_parallel does not divide",
        "[parallelism]\ntensor_parallel = 4 # here",
        ("parallelism.tensor_parallel: 2 ranks (1 nodes × 2 tasks per node) are no multiple of tensor_parallel 4",),
    ),
    Mistake(
        "ranks that are not the product",
        "[parallelism]\ndata_parallel = 3 # here",
        ("parallelism.data_parallel", "× data_parallel 3 = 3, but there are 2 ranks", "leave data_parallel out"),
    ),
    Mistake(
        "replicas that do not divide",
        "[slurm]\ntasks_per_node = 4\n[parallelism]\ndata_parallel_replicate = 3 # here",
        ("parallelism.data_parallel_replicate: 3 does not divide the data-parallel degree 4",),
    ),
    Mistake(
        "heads that tensor_parallel does not divide",
        '[model]\nflavor = "debugmodel"\n[slurm]\ntasks_per_node = 3\n[training]\nglobal_batch_size = 4\n'
        "seq_len = 48\n[parallelism]\ntensor_parallel = 3 # here",
        ("parallelism.tensor_parallel: 3 does not divide the model's num_heads 16",),
    ),
    Mistake(
        "a sequence that sequence parallelism does not divide",
        "[training]\nseq_len = 255 # here\n[parallelism]\ntensor_parallel = 2",
        ("training.seq_len: 255 must be a multiple of 8 (for tensor and context parallelism and a loss computed in",),
    ),
    Mistake(
        "a sequence that context parallelism does not divide",
        f"{GPUS}[training]\nseq_len = 192 # here\n[parallelism]\ncontext_parallel = 2",
        ("training.seq_len: 192 must be a multiple of 256 (for context parallelism of FlexAttention)",),
    ),
    Mistake(
        "a sequence that the loss does not divide",
        "[training]\nseq_len = 20 # here",
        ("training.seq_len: 20 must be a multiple of 8 (for a loss computed in 8 chunks)",),
    ),
    Mistake(
        "a sequence that expert parallelism does not divide",
        '[model]\nname = "deepseek_v3"\n[training]\nseq_len = 24 # here\nbatch_size = 1\nglobal_batch_size = 1\n'
        "[slurm]\ngpus_per_node = 16\ntasks_per_node = 16\n"
        "[parallelism]\nsequence_parallel = false\ntensor_parallel = 16\nexpert_parallel = 4",
        ("training.seq_len: 24 must be a multiple of 16 (for tensor and context parallelism)",),
    ),
    Mistake("a sequence longer than the model's", "[training]\nseq_len = 1000000 # here", ("seq_len: 1000000",)),
    Mistake(
        "a microbatch that does not divide",
        "[parallelism]\npipeline_parallel = 2\npipeline_microbatch_size = 3 # here",
        ("parallelism.pipeline_microbatch_size: 3 does not divide batch_size 4",),
    ),
    Mistake(
        "more stages than layers",
        "[slurm]\ntasks_per_node = 8\n[parallelism]\npipeline_parallel = 8 # here",
        ("parallelism.pipeline_parallel: 8 stages are more than the model's 6 layers",),
        ("--set", "training.batch_size=8"),
    ),
    Mistake(
        "fewer microbatches than stages",
        "[parallelism]\npipeline_parallel = 2\npipeline_microbatch_size = 4",
        ("training.batch_size: batch_size 4 makes 1 microbatches of 4, fewer than 2 stages", "at least 8"),
        ("--set", "training.batch_size=4"),
        "--set training.batch_size=4: ",
    ),
    Mistake(
        "fewer microbatches than the stages of two on each rank",
        '[parallelism]\npipeline_parallel = 2\npipeline_schedule = "DualPipeV"\n'
        "[training]\nbatch_size = 3 # here\nglobal_batch_size = 3",
        ("training.batch_size: batch_size 3 makes 3 microbatches of 1, fewer than 4 stages", "at least 4"),
    ),
    Mistake(
        "microbatches that do not part into rounds",
        '[parallelism]\npipeline_parallel = 2\npipeline_schedule = "Interleaved1F1B"\n'
        "[training]\nbatch_size = 5 # here\nglobal_batch_size = 5",
        ("training.batch_size: batch_size 5 makes 5 microbatches", "rounds of 2 or more", "a multiple of 2"),
    ),
    Mistake(
        "a schedule that a compiled model cannot have",
        '[compile]\nenabled = true\n[parallelism]\npipeline_parallel = 2\npipeline_schedule = "ZBVZeroBubble" # here',
        ("parallelism.pipeline_schedule: ZBVZeroBubble parts the backward pass", 'compile.components = ["loss"]'),
    ),
    Mistake(
        "tied weights in a pipeline",
        '[model]\nflavor = "1B"\n[parallelism]\npipeline_parallel = 2 # here',
        ("parallelism.pipeline_parallel: torchtitan cannot split a model with tied weights into pipeline stages",),
    ),
    Mistake(
        "experts that a dense model does not have",
        f"{GPUS}[parallelism]\nexpert_parallel = 2 # here",
        ("parallelism.expert_parallel: the model has no experts",),
    ),
    Mistake(
        "experts that do not divide",
        f"{MIXTURE}[slurm]\ngpus_per_node = 3\ntasks_per_node = 3\n[training]\nglobal_batch_size = 12\n"
        "[parallelism]\nexpert_parallel = 3 # here",
        ("parallelism.expert_parallel: 3 does not divide the model's 64 experts",),
    ),
    Mistake(
        "ranks that expert_parallel does not divide",
        f"{GPUS}{MIXTURE}[parallelism]\nexpert_parallel = 4 # here",
        ("parallelism.expert_parallel: 4 does not divide the 2 ranks that hold one copy",),
    ),
    Mistake(
        "context parallelism on CPUs",
        "[parallelism]\ncontext_parallel = 2 # here",
        ("parallelism.context_parallel: needs GPUs, and slurm.gpus_per_node is 0",),
    ),
    Mistake(
        "context parallelism of a model that cannot have it",
        f'{GPUS}[model]\nname = "gpt_oss"\n[parallelism]\ncontext_parallel = 2 # here\n'
        '[training]\nmixed_precision = "bf16"',
        ("parallelism.context_parallel: gpt_oss cannot have it: its attention cannot be split",),
    ),
    Mistake(
        "attention in a number type that it does not have",
        f'{GPUS}[model]\nname = "gpt_oss"\n[training]\nmixed_precision = "fp32" # here',
        ("training.mixed_precision: the attention of gpt_oss computes in bf16 only",),
    ),
    Mistake(
        "offload on CPUs",
        "[memory]\ncpu_offload = true # here",
        ("memory.cpu_offload: needs GPUs, and slurm.gpus_per_node is 0",),
    ),
    Mistake(
        "a memory budget without compile",
        '[memory]\nactivation_checkpointing = "memory_budget" # here',
        ("memory.activation_checkpointing: memory_budget is torch.compile's work", "compile.enabled = true"),
    ),
    Mistake(
        "a memory budget without a compiled model",
        '[compile]\nenabled = true\ncomponents = ["loss"]\n[memory]\nactivation_checkpointing = "memory_budget" # here',
        ("memory.activation_checkpointing: memory_budget is torch.compile's work", '"model" among'),
    ),
    Mistake(
        "an unknown component to compile",
        '[compile]\ncomponents = ["modle"] # here',
        ("compile.components = ['modle']: must be 'model' or 'loss'",),
    ),
    Mistake("nothing to compile", "[compile]\ncomponents = [] # here", ("compile.components = []: must not be empty",)),
    Mistake(
        "an unknown backend of compile",
        '[compile]\nbackend = "inducter" # here',
        ("compile.backend: torch.compile has no backend 'inducter'", "did you mean 'inductor'?"),
    ),
    Mistake(
        "a backend that cannot compile the attention",
        f'{GPUS}[compile]\nenabled = true\nbackend = "eager" # here',
        ("compile.backend: eager cannot compile FlexAttention", "inductor or aot_eager"),
    ),
    Mistake(
        "asynchronous tensor parallelism on CPUs",
        "[compile]\nenabled = true\n[parallelism]\ntensor_parallel = 2\nasync_tensor_parallel = true # here",
        ("parallelism.async_tensor_parallel: needs GPUs",),
    ),
    Mistake(
        "asynchronous tensor parallelism of one",
        f"{GPUS}[compile]\nenabled = true\n[parallelism]\nasync_tensor_parallel = true # here",
        ("parallelism.async_tensor_parallel: there is no tensor_parallel",),
    ),
    Mistake(
        "asynchronous tensor parallelism of whole sequences",
        f"{GPUS}[compile]\nenabled = true\n[parallelism]\ntensor_parallel = 2\nsequence_parallel = false\n"
        "async_tensor_parallel = true # here",
        ("parallelism.async_tensor_parallel: without sequence_parallel",),
    ),
    Mistake(
        "asynchronous tensor parallelism without compile",
        f"{GPUS}[parallelism]\ntensor_parallel = 2\nasync_tensor_parallel = true # here",
        ("parallelism.async_tensor_parallel: is torch.compile's work", "compile.enabled = true"),
    ),
    Mistake(
        "asynchronous tensor parallelism by another backend",
        f'{GPUS}[compile]\nenabled = true\nbackend = "aot_eager"\n[parallelism]\ntensor_parallel = 2\n'
        "async_tensor_parallel = true # here",
        ("parallelism.async_tensor_parallel: the backend aot_eager cannot do it", 'compile.backend = "inductor"'),
    ),
    Mistake(
        "symmetric memory with nothing to communicate",
        f"{GPUS}[parallelism]\ntensor_parallel = 2\nfsdp_symmetric_memory = true # here",
        ("parallelism.fsdp_symmetric_memory: no weights are sharded",),
    ),
    Mistake(
        "symmetric memory of a model that does not have it",
        f'{GPUS}[model]\nname = "kimi_k2_7"\n[parallelism]\nfsdp_symmetric_memory = true # here',
        ("parallelism.fsdp_symmetric_memory: torchtitan does not have it for kimi_k2_7",),
    ),
    Mistake("float8 on CPUs", "[float8]\nenabled = true # here", ("float8.enabled: needs GPUs",)),
    Mistake(
        "float8 of widths that it does not have",
        "[model]\nintermediate_size = 1000\n[float8]\nenabled = true # here",
        ("float8.enabled: widths on a rank", "multiples of 16", "intermediate_size 1000"),
        base="llama2_7b",
    ),
    Mistake(
        "float8 of widths that tensor_parallel cuts",
        "[model]\nintermediate_size = 1008\n[float8]\nenabled = true # here\n[parallelism]\ntensor_parallel = 2",
        ("float8.enabled: widths on a rank", "intermediate_size 504"),
        base="llama2_7b",
    ),
    Mistake(
        "float8 of too few tokens",
        f"{GPUS}[training]\nseq_len = 40 # here\nbatch_size = 1\n[float8]\nenabled = true",
        ("training.seq_len: 40 tokens at once on a rank are no multiple of 16",),
    ),
    Mistake(
        "float8 of experts that a dense model does not have",
        f"{GPUS}[float8]\nenabled = true\ngrouped_experts = true # here",
        ("float8.grouped_experts: the model has no experts",),
    ),
    Mistake(
        "float8 of a model of transformers",
        f"{GPUS}[float8]\nenabled = true # here",
        ("float8.enabled: torchtitan cannot convert models of transformers",),
        base="gemma3_debug",
    ),
    Mistake(
        "whole sequences of a model of transformers",
        "[parallelism]\ntensor_parallel = 2\nsequence_parallel = false # here",
        ("parallelism.sequence_parallel: models of transformers always have it", "leave it out"),
        base="gemma3_debug",
    ),
    Mistake("an unknown float8 recipe", '[float8]\nrecipe = "row" # here', ("float8.recipe = 'row'", "'rowwise'")),
    Mistake("an unknown model", '[model]\nname = "lama3" # here', ("model.name", "'lama3'", "did you mean 'llama3'?")),
    Mistake("an unknown flavor", '[model]\nflavor = "8b" # here', ("model.flavor", "no flavor '8b'", "8B")),
    Mistake(
        "a model that a CPU cannot train",
        '[model]\nname = "gpt_oss" # here',
        ("model.name: needs GPUs, and slurm.gpus_per_node is 0",),
    ),
    Mistake(
        "a configuration for a family that has flavors",
        '[model]\nconfig = "somewhere" # here',
        ("model.config: has no meaning for llama3", 'write name = "transformers"'),
    ),
    Mistake(
        "a model of transformers with a flavor",
        '[model]\nflavor = "8B" # here',
        ("model.flavor: has no meaning for transformers", "it is said in model.config"),
        base="gemma3_debug",
    ),
    Mistake(
        "a kind of model that is not tested",
        '[model.config]\nmodel_type = "gema3" # here',
        ("model.config.model_type: 'gema3' is not one of the kinds that are tested", "did you mean 'gemma3'?"),
        base="gemma3_debug",
    ),
    Mistake(
        "a size of a configuration that is none",
        '[model.config]\nvocab_size = "2048" # here',
        ("model.config.vocab_size: '2048' must be a whole number",),
        base="gemma3_debug",
    ),
    Mistake(
        "a folder without a configuration",
        '[model]\nconfig = "/no/such" # here',
        ("model.config: there is no /no/such/config.json", "or a table"),
        base="gemma3_debug",
    ),
    Mistake(
        "stages of layers that are not alike",
        "[parallelism]\npipeline_parallel = 2 # here\n[model.config]\ntie_word_embeddings = false",
        ("parallelism.pipeline_parallel: not with layers of different attention",),
        base="gemma3_debug",
    ),
    Mistake(
        "two places to begin from",
        '[model]\ninitial_weights = "/a" # here\n[checkpointing]\nresume_from_checkpoint = "/b"',
        ("model.initial_weights: contradicts checkpointing.resume_from_checkpoint", "keep one"),
    ),
    Mistake(
        "weights that are not there",
        '[model]\ninitial_weights = "/no/such" # here',
        ("model.initial_weights: there is no folder /no/such", "*.safetensors"),
    ),
    Mistake(
        "a flavor with sizes beside it",
        "[model]\nnum_layers = 3 # here",
        ("model.num_layers", "together with model.flavor = 'debugmodel'", "keep one"),
    ),
    Mistake("an unknown dataset", '[data]\ndataset = "c5" # here', ("data.dataset: no dataset 'c5'", "c4")),
    Mistake(
        "a tokenizer that is not there",
        '[data]\ntokenizer = "/no/such/folder" # here',
        ("data.tokenizer: there is no folder /no/such/folder", "tokenizer.json"),
    ),
    Mistake(
        "an unknown schedule",
        '[parallelism]\npipeline_schedule = "1F2B" # here',
        ("parallelism.pipeline_schedule", "did you mean '1F1B'?"),
    ),
    Mistake(
        "an unknown torchtitan path",
        "[torchtitan]\ndebug.print_confg = true # here",
        ("'debug.print_confg'", "did you mean 'debug.print_config'?"),
    ),
    Mistake(
        "a torchtitan path that the recipe has a word for",
        "[torchtitan.training]\nsteps = 3 # here",
        ("training.steps has a name of its own", "use [training] max_steps"),
    ),
    Mistake(
        "a torchtitan path that would break resuming",
        "[torchtitan]\ncheckpoint.enable = false # here",
        ("checkpoint.enable is not for recipes", "cannot come back"),
    ),
    Mistake(
        "a torchtitan value of a wrong type",
        '[torchtitan]\ndebug.print_config = "yes" # here',
        ("debug.print_config is of type bool, not 'yes'",),
    ),
    Mistake(
        "a torchtitan value that is no choice",
        '[torchtitan]\ncheckpoint.export_dtype = "float64" # here',
        ("checkpoint.export_dtype cannot be 'float64'", "did you mean 'float16'?"),
    ),
    Mistake(
        "a torchtitan path without effect",
        "[torchtitan]\nactivation_checkpoint.memory_budget = 0.5 # here",
        ("no effect here", "[memory] activation_checkpointing = memory_budget"),
    ),
    Mistake(
        "two learning rates",
        "[training]\nlearning_rate = 1e-3 # here\n[optimizer]\nlr = 2e-3",
        ("training.learning_rate: 0.001 contradicts optimizer.lr = 0.002", "keep one"),
    ),
    Mistake(
        "two warm-ups",
        "[training]\nwarmup_steps = 1 # here\n[lr_schedule]\nwarmup_steps = 2",
        ("training.warmup_steps: 1 contradicts lr_schedule.warmup_steps = 2", "keep one"),
    ),
    Mistake(
        "gradient checkpointing that is none",
        '[memory]\ngradient_checkpointing = true # here\nactivation_checkpointing = "none"',
        ("memory.gradient_checkpointing: true contradicts memory.activation_checkpointing = none", "keep one"),
    ),
    Mistake(
        "no gradient checkpointing that is full",
        "[memory]\ngradient_checkpointing = false # here\nactivation_checkpointing = true",
        ("memory.gradient_checkpointing: false contradicts memory.activation_checkpointing = true", "keep one"),
    ),
    Mistake(
        "a save_dir below a file",
        '[checkpointing]\nsave_dir = "/dev/null/checkpoints" # here',
        ("checkpointing.save_dir: /dev/null cannot be written: Not a directory",),
    ),
    Mistake(
        # Not even root writes there, though os.access says so.
        "a save_dir where nobody may write",
        '[checkpointing]\nsave_dir = "/proc/checkpoints" # here',
        ("checkpointing.save_dir: /proc cannot be written",),
    ),
    *(
        Mistake(
            f"a save_dir that is {folder}",
            f'[checkpointing]\nsave_dir = "{folder}" # here',
            (f"checkpointing.save_dir: {Path(folder)} is no place for checkpoints", "./checkpoints"),
        )
        for folder in (".", "..", "a/../..", "code", "./attempts/x", "plan.json", ".hidden")
    ),
    Mistake(
        "a checkpoint that is not there",
        '[checkpointing]\nresume_from_checkpoint = "/no/such/step-3" # here',
        ("checkpointing.resume_from_checkpoint: there is no checkpoint in /no/such/step-3", "step-N"),
    ),
    Mistake(
        "an unknown cluster",
        says=("there is no cluster 'slrum'", "did you mean 'slurm'?"),
        arguments=("--cluster", "slrum"),
        where="--cluster",
    ),
    Mistake(
        "a --set without a value",
        says=("is not of the form section.key=value", "e.g. --set training.max_steps=100"),
        arguments=("--set", "training.max_steps"),
        where="--set training.max_steps:",
    ),
    Mistake(
        "a --set without a section",
        says=("is not of the form section.key=value",),
        arguments=("--set", "max_steps=3"),
        where="--set max_steps=3:",
    ),
    Mistake(
        "a --set of an unknown key",
        says=("[training] has no field 'max_step'", "did you mean 'max_steps'?"),
        arguments=("--set", "training.max_step=3"),
        where="--set training.max_step=3:",
    ),
    Mistake(
        "a --set of what comes too late",
        says=("said in its file",),
        arguments=("--set", "recipe.extends=llama3_8b"),
        where="--set recipe.extends=llama3_8b:",
    ),
    Mistake(
        "a number below a number",
        says=("training.max_steps", "whole number"),
        arguments=("--set", "training.max_steps=3", "--set", "training.max_steps.x=4"),
        where="--set training.max_steps.x=4:",
    ),
    Mistake(
        "a name that cannot be a folder",
        says=("'a/b' cannot be a run's name", "letters, digits"),
        arguments=("--name", "a/b"),
        where="--name:",
    ),
    Mistake(
        "a name that would be a hidden folder",
        says=("'.a' cannot be a run's name",),
        arguments=("--name", ".a"),
        where="--name:",
    ),
    Mistake(
        "a name that looks like a job's id",
        says=("'4711' would be taken for a job id",),
        arguments=("--name", "4711"),
        where="--name:",
    ),
)


@pytest.fixture
def submit(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command line where no check that fails to bite could start a training: there is no Slurm."""
    monkeypatch.setenv("PATH", "/nonexistent")
    return cli


def submitted(cli: CommandLine, recipe: str | Path, *arguments: str) -> Outcome:
    """The outcome of a submission that must fail and make nothing."""
    before = set(Path().rglob("*"))
    outcome = cli("submit", recipe, "--cluster", "slurm", "--name", "mine", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert set(Path().rglob("*")) == before
    return outcome


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what.replace(" ", "_"))
def test_a_mistake_is_one_line(submit: CommandLine, mistake: Mistake) -> None:
    # A key before the first table header belongs to no table.
    base = f'[recipe]\nextends = "{mistake.base}"\n'
    text = mistake.recipe + "\n" + base if mistake.recipe.startswith("model =") else base + mistake.recipe + "\n"
    Path("bad.toml").write_text(text)
    marked = [number for number, line in enumerate(text.splitlines(), start=1) if line.endswith("# here")]
    where = mistake.where or f"bad.toml:{marked[0]}: "

    [error] = submitted(submit, "bad.toml", *mistake.arguments).errors

    assert error.startswith(where)
    for part in mistake.says:
        assert part in error


def test_neither_form_of_the_batch(submit: CommandLine) -> None:
    Path("bad.toml").write_text('[model]\nflavor = "debugmodel"\n')
    [error] = submitted(submit, "bad.toml").errors
    assert error == (
        "bad.toml: training.global_batch_size: neither it nor gradient_accumulation_steps is given (give one of them)"
    )


@pytest.mark.parametrize(
    ("sizes", "line", "what"),
    [
        (
            {"num_heads": 7, "num_kv_heads": 7},
            "num_heads",
            "model.num_heads: embed_dim 64 / num_heads 7 must be an even whole number",
        ),
        ({"num_heads": 64}, "num_heads", "model.num_heads: embed_dim 64 / num_heads 64 must be"),
        ({"num_kv_heads": 3}, "num_kv_heads", "model.num_kv_heads: num_heads 4 is no multiple of num_kv_heads 3"),
        ({"vocab_size": 100}, "vocab_size", "model.vocab_size: the model's vocabulary of 100 is too small"),
        (
            {"num_kv_heads": 1},
            "tensor_parallel",
            "parallelism.tensor_parallel: 2 does not divide the model's num_kv_heads 1",
        ),
        (
            {"vocab_size": 513},
            "tensor_parallel",
            "parallelism.tensor_parallel: 2 does not divide the model's vocab_size 513",
        ),
    ],
)
def test_sizes_that_do_not_fit(submit: CommandLine, sizes: dict[str, int], line: str, what: str) -> None:
    all_sizes = {
        "vocab_size": 512,
        "embed_dim": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 128,
    } | sizes
    lines = [
        "[training]",
        "seq_len = 64",
        "gradient_accumulation_steps = 1",
        "[slurm]",
        "gpus_per_node = 2",
        "[parallelism]",
        # Only where it is what does not fit: one mistake at a time.
        f"tensor_parallel = {2 if line == 'tensor_parallel' else 1}",
        "[model]",
        *(f"{name} = {size}" for name, size in all_sizes.items()),
    ]
    Path("bad.toml").write_text("\n".join(lines))
    number = next(number for number, text in enumerate(lines, start=1) if text.startswith(f"{line} ="))

    [error] = submitted(submit, "bad.toml").errors

    assert error.startswith(f"bad.toml:{number}: {what}")


def test_a_size_that_is_missing_is_named(submit: CommandLine) -> None:
    Path("bad.toml").write_text("[model]\nembed_dim = 64\nnum_layers = 2\n[training]\nglobal_batch_size = 8\n")
    [error] = submitted(submit, "bad.toml").errors
    assert "model.flavor" in error
    assert "still missing: vocab_size, num_heads, intermediate_size" in error


def test_a_wrong_value_of_the_environment_names_its_variable(submit: CommandLine) -> None:
    outcome = submit("submit", "llama3_debug", "--cluster", "slurm", env={"TORCHTITAN_TP_SIZE": "two"})
    assert outcome.code == 2
    assert outcome.errors == [
        "environment TORCHTITAN_TP_SIZE: parallelism.tensor_parallel = 'two': must be a whole number"
    ]
    assert not Path("runs").exists()


def test_all_mistakes_are_told_at_once(submit: CommandLine) -> None:
    Path("bad.toml").write_text(
        '[training]\nbatch_size = -4\nmax_step = 3\n[modle]\nname = "x"\n[optimizer]\nlr = "fast"\n'
        "[torchtitan]\na = 1\n"
    )
    errors = submitted(submit, "bad.toml", "--set", "slurm.nodes=0").errors
    assert sorted(re.match(r"bad\.toml:(\d+)|--set", error).group() for error in errors) == [  # type: ignore[union-attr]
        "--set",
        "bad.toml:2",
        "bad.toml:3",
        "bad.toml:4",
        "bad.toml:7",
        "bad.toml:9",
    ]


def test_all_mistakes_of_the_command_line_are_told_at_once(submit: CommandLine) -> None:
    settings = ("foo", "training.max_steps=x", "a.b=1")
    errors = submitted(submit, "llama3_debug", *(word for each in settings for word in ("--set", each))).errors
    assert sorted(error.partition(": ")[0] for error in errors) == sorted(f"--set {each}" for each in settings)


def test_all_mistakes_that_need_more_than_one_field_are_told_at_once(submit: CommandLine) -> None:
    Path("bad.toml").write_text(
        '[model]\nname = "lama3"\n[data]\ndataset = "c5"\n[training]\nglobal_batch_size = 7\nbatch_size = 2\n'
        "[slurm]\ngpus_per_node = 2\n[torchtitan]\ndebug.nothing = 1\n"
    )
    errors = submitted(submit, "bad.toml").errors
    assert {error.split(": ")[0] for error in errors} == {"bad.toml:2", "bad.toml:4", "bad.toml:6", "bad.toml:11"}


def test_all_mistakes_about_this_machine_are_told_at_once(submit: CommandLine) -> None:
    Path("bad.toml").write_text(
        BASE + '[data]\ntokenizer = "nowhere"\n[checkpointing]\nsave_dir = "/dev/null/x"\n'
        'resume_from_checkpoint = "nowhere"\n'
    )
    errors = submitted(submit, "bad.toml").errors
    assert {error.split(": ")[0] for error in errors} == {"bad.toml:4", "bad.toml:6", "bad.toml:7"}


def test_a_recipe_that_extends_itself(submit: CommandLine) -> None:
    Path("a.toml").write_text('[recipe]\nname = "a"\nextends = "a.toml"\n')
    [error] = submitted(submit, "a.toml").errors
    assert error == "a.toml:3: the recipe extends itself: a.toml → a.toml"


def test_a_recipe_that_extends_itself_by_another(submit: CommandLine) -> None:
    Path("a.toml").write_text('[recipe]\nextends = "b.toml"\n')
    Path("b.toml").write_text('[recipe]\nextends = "a.toml"\n')
    [error] = submitted(submit, "a.toml").errors
    assert error == "b.toml:2: the recipe extends itself: a.toml → b.toml → a.toml"


def test_a_recipe_that_extends_nothing(submit: CommandLine) -> None:
    Path("a.toml").write_text('[recipe]\nextends = "llama3_debgu"\n')
    [error] = submitted(submit, "a.toml").errors
    assert error.startswith("a.toml:2: extends 'llama3_debgu': there is no such recipe")
    assert "did you mean 'llama3_debug'?" in error


def test_a_mistake_in_what_is_extended_names_that_file(submit: CommandLine) -> None:
    Path("base.toml").write_text(BASE + "[training]\nbatch_size = 0\n")
    Path("child.toml").write_text('[recipe]\nextends = "base.toml"\n')
    [error] = submitted(submit, "child.toml").errors
    assert error.startswith("base.toml:4: training.batch_size = 0")


def test_a_recipe_that_is_not_there(submit: CommandLine) -> None:
    [error] = submitted(submit, "recipes/lama3_debug.toml").errors
    assert error.startswith("recipes/lama3_debug.toml: there is no such recipe")
    assert "did you mean 'llama3_debug'?" in error


def test_no_recipe(submit: CommandLine) -> None:
    outcome = submit("validate")
    assert outcome.code == 2
    assert outcome.errors == ["no recipe was named (give a recipe, or set TORCHTITAN_CONFIG_PATH)"]


def test_a_recipe_that_is_not_text(submit: CommandLine) -> None:
    Path("a.toml").write_bytes(b"\xff\xfe[\x00")
    assert submitted(submit, "a.toml").errors == ["a.toml: is not UTF-8 text"]


def test_a_recipe_that_cannot_be_read(submit: CommandLine) -> None:
    # The permission bits do not stop root; no one reads the first byte of a process's memory.
    Path("a.toml").symlink_to("/proc/self/mem")
    assert submitted(submit, "a.toml").errors == ["a.toml: cannot be read: Input/output error"]


def test_a_run_that_exists(submit: CommandLine) -> None:
    run = Path("runs/mine")
    run.mkdir(parents=True)
    (run / "plan.json").write_text("{}")
    [error] = submitted(submit, "llama3_debug").errors
    assert error.startswith(f"--name: there is a run mine already: {run.absolute()}")
    assert "choose another name" in error
    assert "--resume" in error


def test_a_folder_of_runs_that_cannot_be_made(submit: CommandLine) -> None:
    [error] = submitted(submit, "llama3_debug", "--runs-dir", "/dev/null/runs").errors
    assert error == "cannot make /dev/null/runs/mine: Not a directory"


def test_a_place_that_is_taken_by_something_else(submit: CommandLine) -> None:
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/notes.txt").write_text("not a run")
    [error] = submitted(submit, "llama3_debug").errors
    assert error.startswith(f"cannot make {Path('runs/mine').absolute()}")


def test_a_machine_without_gpus(submit: CommandLine) -> None:
    Path("bad.toml").write_text(f"{BASE}{GPUS}[parallelism]\ncontext_parallel = 2\n[memory]\ncpu_offload = true\n")
    outcome = submit("submit", "bad.toml", "--cluster", "local", "--name", "mine")
    assert outcome.code == 2
    assert outcome.errors == [
        "bad.toml:6: parallelism.context_parallel: needs GPUs, and there is none on this machine",
        "bad.toml:8: memory.cpu_offload: needs GPUs, and there is none on this machine",
    ]
    assert not Path("runs/mine").exists()


def test_a_machine_without_slurm(submit: CommandLine) -> None:
    outcome = submit("submit", "llama3_debug", "--cluster", "slurm", "--name", "mine")
    assert outcome.code == 2
    assert outcome.errors == ["--cluster slurm: sbatch is not on the PATH of this machine"]
    assert not Path("runs/mine").exists()


@pytest.mark.parametrize("verb", ["status", "logs", "cancel"])
def test_a_run_that_is_not_there(submit: CommandLine, verb: str) -> None:
    run = Path("runs/mine")
    run.mkdir(parents=True)
    (run / "plan.json").write_text("{}")
    outcome = submit(verb, "mien")
    assert outcome.code == 2
    assert outcome.errors == [f"no run 'mien' in {Path('runs').absolute()} (did you mean 'mine'?)"]


@pytest.mark.parametrize("words", [("status",), ("ensure", "llama3_debug"), ("submit", "llama3_debug")])
def test_a_working_directory_that_was_removed(
    submit: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    outcome = submit(*words)
    monkeypatch.chdir(tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.errors == ["the working directory is not there any more (cd to one that is)"]


@pytest.mark.parametrize("verb", ["submit", "validate", "render"])
def test_as_a_program_it_leaves_with_2_and_without_a_traceback(cli: CommandLine, verb: str) -> None:
    Path("bad.toml").write_text(BASE + "[training]\nbatch_size = -4\nmax_step = 3\n")
    outcome = cli.process(verb, "bad.toml", "--cluster", "slurm")
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err == (
        "error: bad.toml:4: training.batch_size = -4: must be greater than 0\n"
        "error: bad.toml:5: [training] has no field 'max_step' (did you mean 'max_steps'?)\n"
    )
    assert [path.name for path in Path().iterdir()] == ["bad.toml"]
