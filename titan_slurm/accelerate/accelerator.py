"""Accelerate's `Accelerator`, set up from a recipe. With what, is decided in `titan_slurm.recipe.accelerate`; what
happens between two steps, in `titan_slurm.accelerate.progress`."""

import functools
import os
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ParallelismConfig,
    TorchDynamoPlugin,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from titan_slurm.accelerate import session
from titan_slurm.accelerate.metrics import StepLog
from titan_slurm.accelerate.plugin import TorchTitanPlugin, from_environment
from titan_slurm.accelerate.progress import Progress, TrainingLoader
from titan_slurm.errors import BadInputError, Problem, bad_input
from titan_slurm.recipe.accelerate import Setup
from titan_slurm.run import events
from titan_slurm.run.directory import RunDirectory
from titan_slurm.train import cpu as on_cpu

# What the recipe decides.
_DECIDED = {
    "fsdp_plugin": "[parallelism] and [memory]",
    "parallelism_config": "[parallelism]",
    "torch_tp_plugin": "[parallelism] tensor_parallel",
    "gradient_accumulation_plugin": "[training] global_batch_size or gradient_accumulation_steps",
    "dynamo_plugin": "[compile]",
    "dynamo_backend": "[compile]",
}
_NOT_WITH = ("deepspeed_plugin", "deepspeed_plugins", "megatron_lm_plugin")


class Accelerator(accelerate.Accelerator):
    """As Accelerate's own, set up from a plugin's recipe. Where there is none, neither given nor by the environment, it
    is Accelerate's own.

    torchtitan_plugin: the recipe. mixed_precision, gradient_accumulation_steps: may be left to it; what is given must
    agree with it. options: Accelerate's others.

    Raises BadInputError with everything that contradicts the recipe, or that Accelerate cannot do.
    """

    def __init__(
        self,
        *,
        torchtitan_plugin: TorchTitanPlugin | None = None,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int | None = None,
        **options: Any,
    ) -> None:
        self.torchtitan_plugin = torchtitan_plugin or from_environment()
        self._progress: Progress | None = None
        if self.torchtitan_plugin is None:
            steps = gradient_accumulation_steps or 1
            super().__init__(mixed_precision=mixed_precision, gradient_accumulation_steps=steps, **options)
            return
        now = session.current()
        has_gpus = now.plan.device == "cuda" if now else torch.cuda.is_available() and not options.get("cpu")
        plan = _settle(self.torchtitan_plugin, options, mixed_precision, gradient_accumulation_steps, has_gpus)
        if not has_gpus:
            options["cpu"] = True
            on_cpu.install()
        if plan.deterministic:
            torch.use_deterministic_algorithms(True)
        _be_distributed(has_gpus)
        fsdp, parallelism = _fsdp(plan), _parallelism(plan)
        dynamo = TorchDynamoPlugin(backend=plan.compile_backend or "no", use_regional_compilation=True)
        if not has_gpus:
            _shard_on_cpu(plan, fsdp, parallelism, dynamo)
        # Its order of samples is said by seed and pass alone, so that a restart finds its place.
        loading = options["dataloader_config"] = options.get("dataloader_config") or DataLoaderConfiguration()
        loading.use_seedable_sampler = True
        if loading.data_seed is None:
            loading.data_seed = plan.seed
        super().__init__(
            mixed_precision=plan.mixed_precision,
            fsdp_plugin=fsdp,
            parallelism_config=parallelism,
            dynamo_plugin=dynamo,
            gradient_accumulation_plugin=GradientAccumulationPlugin(plan.layout.gradient_accumulation_steps),
            **options,
        )
        self._plan, self._session = plan, now
        self._step_log = StepLog(now, plan) if now and now.rank == now.plan.metrics_rank else None
        self._progress = Progress(self, plan, _checkpoints_folder(plan, now), now, self._step_log)
        self._training_loader: TrainingLoader | None = None

    @property
    def completed_steps(self) -> int:
        """Optimizer steps of the whole training so far, those before a restart included."""
        return self._made_progress().step

    @property
    def current_step(self) -> int:
        """The step that the script is in, or has just ended: the number by which to log it."""
        return self._made_progress().current_step

    def should_stop(self) -> bool:
        """Whether the loop is to end: the scheduler has asked, and the step is saved; or the recipe's steps are done.

        To be called once in each turn of the loop, by all ranks. A loop over the prepared data loader ends by itself as
        well, and then need not call it.
        """
        self._made_progress().close_step()
        return self._made_progress().is_done()

    def training_data(self) -> "DataLoader[dict[str, torch.Tensor]]":
        """A loader of the recipe's own `[data]`, to be prepared; see `titan_slurm.accelerate.data`. Collective."""
        from titan_slurm.accelerate import data

        progress = self._made_progress()
        folder = self._session.run if self._session else RunDirectory(progress.folder)
        with self.main_process_first():
            if self.is_main_process:
                data.prepare(self._plan, folder)
        return data.training_data(self._plan, folder)

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As Accelerate's, for one model. The first data loader that a script prepares is the one that it trains on."""
        if self._progress is None:
            return super().prepare(*args, device_placement=device_placement)
        models = [each for each in args if isinstance(each, nn.Module)]
        loaders = [each for each in args if isinstance(each, DataLoader)]
        self._check_models(models)
        if models:
            self._name_layers(models[0])
        if loaders and self._training_loader is None:
            self._check_batch_size(loaders)
        made = super().prepare(*args, device_placement=device_placement)
        results = list(made) if len(args) > 1 else [made]
        if self.device.type == "cpu":
            on_cpu.reduce_by_sums(models)
        if models and self._session:
            self._session.events.add(events.MODEL_BUILT)
        for place, each in enumerate(args):
            if isinstance(each, DataLoader) and self._training_loader is None:
                self._check_dispatch(results[place])
                results[place] = self._training_loader = TrainingLoader(results[place], self._progress)
        return tuple(results) if len(args) > 1 else results[0]

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> AcceleratedOptimizer:
        """As Accelerate's. What it returns says when it has made a step."""
        prepared = super().prepare_optimizer(optimizer, device_placement=device_placement)
        if self._progress is not None:
            prepared.step = _then(prepared, self._progress.stepped)
        return prepared

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """As Accelerate's; the norm is that of the whole model, on every rank."""
        norm = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def log(self, values: Mapping[str, Any], step: int | None = None, log_kwargs: dict[str, Any] | None = None) -> None:
        """As Accelerate's; in a run also a line of its metrics. Of `values`, "loss", "grad_norm" and "lr" are known
        there by these names."""
        super().log(dict(values), step=step, log_kwargs=log_kwargs or {})
        if self._progress is not None and self._step_log is not None:
            waited, self._progress.data_seconds = self._progress.data_seconds, 0.0
            self._step_log.write(values, self._progress.current_step if step is None else step, waited)

    def save_state(self, output_dir: str | os.PathLike[str] | None = None, **options: Any) -> str:
        """Save and commit the step that has just ended as `step-N`, unless it is saved already: in `output_dir`, or
        where the recipe says. Collective. Returns the folder's path."""
        if self._progress is None:
            return str(super().save_state(output_dir, **options))
        self._progress.close_step()
        folder = Path(output_dir).absolute() if output_dir else self._progress.folder
        return str(self._progress.save(folder))

    def load_state(self, input_dir: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """Go on from the newest committed checkpoint that verifies: in `input_dir`, which may be a `step-N` itself, or
        where the recipe says. A run that has checkpoints of its own goes on from those, whatever `input_dir` says.
        Collective. Returns its step; 0 if there is none."""
        if self._progress is None:
            return super().load_state(input_dir, **options)
        return self._progress.load(Path(input_dir).absolute() if input_dir else None)

    def _prepare_tp(self, *args: Any) -> Any:
        # Accelerate would only take a model that transformers has sharded while loading it.
        from titan_slurm.accelerate.tensor_parallel import shard

        for model in (each for each in args if isinstance(each, nn.Module)):
            names = {parameter: name for name, parameter in model.named_parameters()}
            shard(model, self.torch_device_mesh["tp"])
            sharded = dict(model.named_parameters())
            for optimizer in (each for each in args if isinstance(each, torch.optim.Optimizer)):
                for group in optimizer.param_groups:
                    group["params"] = [sharded[names[each]] if each in names else each for each in group["params"]]
        return args

    def _name_layers(self, model: nn.Module) -> None:
        """Tell Accelerate which layers FSDP gathers, and activation checkpointing recomputes, one by one."""
        known = {type(module).__name__ for module in model.modules()}
        names = [name for name in getattr(model, "_no_split_modules", None) or () if name in known]
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
        if not names and lists:
            names = sorted({type(layer).__name__ for layer in max(lists, key=len)})
        if not names:
            what = f"{type(model).__name__} has neither _no_split_modules nor layers in an nn.ModuleList"
            raise bad_input("Accelerator.prepare", what, "put its transformer blocks into an nn.ModuleList")
        self.state.fsdp_plugin.transformer_cls_names_to_wrap = names
        config: Any = getattr(model, "config", None)
        if self._plan.activation_checkpointing and hasattr(config, "use_cache"):
            # A layer computed again would find its own keys and values of the first time in the cache.
            config.use_cache = False

    def _check_models(self, models: list[nn.Module]) -> None:
        if len(self._models) + len(models) > 1:
            what = "a second model: a checkpoint holds one"
            hint = "put what is trained into one module; a model that is not trained needs no prepare, only .to(device)"
            raise bad_input("Accelerator.prepare", what, hint)

    def _check_dispatch(self, loader: Any) -> None:
        layout = self._plan.layout
        if isinstance(loader, DataLoaderDispatcher) and layout.data_parallel < layout.world_size:
            what = "Accelerate cannot dispatch an IterableDataset's batches under tensor or context parallel"
            hint = "dataloader_config=DataLoaderConfiguration(dispatch_batches=False)"
            raise bad_input("Accelerator.prepare", what, hint)

    def _check_batch_size(self, loaders: list[Any]) -> None:
        sizes = [loader.batch_size for loader in loaders if loader.batch_size is not None]
        if sizes and self._plan.batch_size not in sizes:
            what = f"the data loader has batch_size {sizes[0]}, the recipe training.batch_size {self._plan.batch_size}"
            raise bad_input("Accelerator.prepare", what, "DataLoader(…, batch_size=plugin.recipe.training.batch_size)")

    def _made_progress(self) -> Progress:
        if self._progress is None:
            raise RuntimeError("this Accelerator has no TorchTitanPlugin, and no recipe")
        return self._progress


def _then(optimizer: AcceleratedOptimizer, after: Callable[[], None]) -> types.MethodType:
    """The optimizer's `step`, and `after` it another function."""
    step = optimizer.step

    @functools.wraps(step)
    def call(_: AcceleratedOptimizer, *arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        after()
        return result

    # A method, as it was: torch's schedulers bind what is none.
    return types.MethodType(call, optimizer)


def _settle(
    plugin: TorchTitanPlugin,
    options: Mapping[str, Any],
    mixed_precision: str | None,
    gradient_accumulation_steps: int | None,
    has_gpus: bool,
) -> Setup:
    problems = [
        Problem(f"Accelerator({name}=…)", "is the recipe's to say", _DECIDED[name])
        for name in _DECIDED
        if options.get(name) is not None
    ]
    problems += [
        Problem(f"Accelerator({name}=…)", "excludes torchtitan_plugin", "keep one")
        for name in _NOT_WITH
        if options.get(name) is not None
    ]
    try:
        plan = plugin.settle(
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            has_gpus=has_gpus,
        )
    except BadInputError as error:
        raise BadInputError([*problems, *error.problems]) from None
    if problems:
        raise BadInputError(problems)
    return plan


def _checkpoints_folder(plan: Setup, now: session.Session | None) -> Path:
    return now.run.checkpoints_folder if now else Path(plan.save_dir).expanduser().absolute()


def _be_distributed(has_gpus: bool) -> None:
    """A script that nobody has launched is one rank of one: the same code, and checkpoints that more ranks can load."""
    if "LOCAL_RANK" in os.environ:
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    if has_gpus:
        torch.cuda.set_device(0)
    backend = "cuda:nccl,cpu:gloo" if has_gpus else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _fsdp(plan: Setup) -> FullyShardedDataParallelPlugin:
    if plan.cpu_offload:
        # By this name Accelerate decides to communicate on the host too: gradients are clipped there.
        os.environ["FSDP_OFFLOAD_PARAMS"] = "true"
    # Gradients are summed in fp32, as torchtitan does.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=plan.reshard_after_forward,
        mixed_precision_policy=policy if plan.mixed_precision == "bf16" else None,
        auto_wrap_policy="transformer_based_wrap",
        cpu_offload=plan.cpu_offload,
        activation_checkpointing=plan.activation_checkpointing,
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )


def _parallelism(plan: Setup) -> ParallelismConfig | None:
    layout = plan.layout
    if layout.world_size == 1:
        return None
    return ParallelismConfig(
        dp_replicate_size=layout.data_parallel_replicate,
        dp_shard_size=plan.shards,
        tp_size=layout.tensor_parallel,
        cp_size=layout.context_parallel,
    )


def _shard_on_cpu(plan: Setup, fsdp: Any, parallelism: Any, dynamo: Any) -> None:
    """Accelerate knows FSDP on GPUs alone: its state, which all its parts share, is made here, and says FSDP."""
    state = AcceleratorState(
        mixed_precision=plan.mixed_precision,
        cpu=True,
        dynamo_plugin=dynamo,
        parallelism_config=parallelism,
        _from_accelerator=True,
    )
    if plan.mixed_precision != "no":
        fsdp.set_mixed_precision(plan.mixed_precision)
    state.fsdp_plugin = fsdp
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
