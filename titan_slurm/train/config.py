"""From a plan to torchtitan's configuration. What the recipe's words mean was decided in `titan_slurm.recipe`; here
dotted paths become attributes."""

import dataclasses
from typing import Any

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.config import CompileConfig
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.train import cpu
from titan_slurm.train.checkpoint import CheckpointManager
from titan_slurm.train.data import tokenizer_folder, tokens_folder
from titan_slurm.train.dataloader import TokenDataLoader
from titan_slurm.train.float8 import to_float8
from titan_slurm.train.models import model_spec

_ACTIVATION_CHECKPOINTING: dict[str, Any] = {
    "none": lambda: None,
    "selective": SelectiveAC.Config,
    "full": FullAC.Config,
    "memory_budget": MemoryBudgetAC.Config,
}


def defaults(activation_checkpointing: str) -> dict[str, Any]:
    """The components that every run is built from, with torchtitan's defaults; their fields are what the recipe's
    `[torchtitan]` may set. `activation_checkpointing`: none, selective, full or memory_budget."""
    return {
        "dataloader": HuggingFaceTextDataLoader.Config(),
        "checkpoint": CheckpointManager.Config(initial_load_model_only=False),
        "activation_checkpoint": _ACTIVATION_CHECKPOINTING[activation_checkpointing](),
        "loss": ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()),
    }


def trainer_config(config_class: type, plan: Plan, run: RunDirectory, attempt: Attempt) -> Any:
    """The configuration of `config_class` (torchtitan's `Trainer.Config` or one derived from it) for a plan."""
    spec = model_spec(plan.model)
    if plan.device == "cpu":
        cpu.use_attention_with_backward(spec.model)
    if plan.float8:
        compiled = plan.torchtitan["compile.enable"] and "model" in plan.torchtitan["compile.components"]
        spec.model = to_float8(spec.model, plan.float8, compiled=compiled)
    config = config_class(
        model_spec=spec,
        optimizer=_optimizer(plan.optimizer),
        dump_folder=str(attempt.path),
        hf_assets_path=tokenizer_folder(run, plan),
        # A memory budget is refused without it, before the plan's values are set; then all is checked again.
        compile=CompileConfig(enable=True),
        **defaults(plan.activation_checkpointing),
    )
    config.loss.loss_fn.global_vocab_size = spec.model.vocab_size
    if plan.data["map_style"]:
        config.dataloader = TokenDataLoader.Config(
            dataset_path=tokens_folder(run, plan),
            seed=plan.torchtitan["debug.seed"],
            global_batch_size=plan.layout.global_batch_size,
        )
    else:
        config.dataloader.dataset_path = plan.data["dataset_path"]
    for path, value in plan.torchtitan.items():
        set_path(config, path, value)
    _validate(config)
    return config


def set_path(config: Any, path: str, value: Any) -> None:
    """Set a dotted path in a tree of dataclasses. Raises AttributeError if there is no such field."""
    *parents, field = path.split(".")
    for name in parents:
        config = getattr(config, name)
    if field not in {each.name for each in dataclasses.fields(config)}:
        raise AttributeError(f"{type(config).__qualname__} has no field {field!r} (from the path {path!r})")
    setattr(config, field, value)


def _optimizer(settings: dict[str, Any]) -> Any:
    group = ParamGroupConfig(
        pattern=".*",
        optimizer_name=settings["name"],
        optimizer_kwargs={**settings["kwargs"], "betas": tuple(settings["kwargs"]["betas"])},
    )
    return OptimizersContainer.Config(param_groups=[group], implementation=settings["implementation"])


def _validate(config: Any) -> None:
    """Run torchtitan's own checks, which setting an attribute skips: from the leaves up, as on construction."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and field.name != "model_spec":
            _validate(value)
    if hasattr(config, "__post_init__"):
        config.__post_init__()
