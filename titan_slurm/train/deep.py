"""Whether torchtitan builds what a plan asks for: model, meshes, sharding, pipeline and optimizer, by torchtitan, for
as many ranks as the plan has, with a process group that talks to nobody and no tensor that has memory.

`python -m titan_slurm.train.deep` reads a list of plans from standard input and prints one JSON object for each: what
was built, or the problems that torchtitan has with it. What only the first step of a training shows does not show here.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan
from titan_slurm.train import cpu

# Before torchtitan is imported. A GPU of this machine is left alone.
cpu.install()

import torchtitan.trainer  # noqa: E402
from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # noqa: E402
from torchtitan.config import Configurable  # noqa: E402
from torchtitan.protocols.model import BaseModel  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

from titan_slurm.train.config import trainer_config  # noqa: E402

# Raised by torchtitan and PyTorch with a message that says all.
_SPEAKING = (ValueError, NotImplementedError, AssertionError, RuntimeError)


class Nothing(Configurable):
    """Stands where a component would need files that this machine may not have."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        pass


class Skeleton(torchtitan.trainer.Trainer):
    """torchtitan's trainer, built and never run."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan.trainer.Trainer.Config):
        pass

    whole_model_parameters: int


@contextlib.contextmanager
def skeleton(plan: Plan, rank: int) -> Iterator[Skeleton]:
    """The trainer of one rank of a plan, without data, checkpoints and weights. Raises what torchtitan raises."""
    counted: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fake_ranks(plan.layout.world_size, rank))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with _any_gpu():
            config = trainer_config(Skeleton.Config, plan, RunDirectory(folder), Attempt(folder / "attempts" / "0001"))
        config.comm.mode = "fake_backend"
        config.tokenizer = config.dataloader = Nothing.Config()
        config.checkpoint.enable = config.validator.enable = False
        config.metrics.enable_wandb = config.metrics.enable_tensorboard = False
        config.debug.enable_structured_logging = False
        stack.enter_context(_weightless())
        stack.enter_context(_counting(type(config.model_spec.model), counted))
        trainer = Skeleton(config)
        trainer.whole_model_parameters = counted[0]
        yield trainer


def check(plan: Plan) -> dict[str, Any]:
    """What torchtitan makes of a plan, seen from its first and its last rank: {"parameters": of the whole model, by
    torchtitan's count, "rank_parameters": the most that one of them holds, "ranks", "seconds", "problems": texts}."""
    started = time.monotonic()
    ranks = sorted({0, plan.layout.world_size - 1})
    parameters, held, problems = 0, [0], []
    for rank in ranks:
        try:
            with skeleton(plan, rank) as trainer:
                parameters = trainer.whole_model_parameters
                held.append(rank_parameters(trainer))
        except Exception as error:
            # What is wrong is mostly wrong on every rank.
            problems.append(_said(error))
    return {
        "parameters": parameters,
        "rank_parameters": max(held),
        "ranks": ranks,
        "seconds": round(time.monotonic() - started, 1),
        "problems": list(dict.fromkeys(problems)),
    }


def rank_parameters(trainer: Any) -> int:
    """Parameters, or parts of them, that this rank holds."""
    parameters = (parameter for part in trainer.model_parts for parameter in part.parameters())
    return sum(getattr(each, "_local_tensor", each).numel() for each in parameters)


def _said(error: Exception) -> str:
    """What an error says, in one line; of one that says nothing, where it was raised."""
    text = " ".join(str(error).split())
    if not text:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{place.line} (in {place.name}, {Path(place.filename).name}:{place.lineno})"
    return text if isinstance(error, _SPEAKING) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _fake_ranks(world_size: int, rank: int) -> Iterator[None]:
    """The environment of a rank among so many; whatever process group is made in it is gone after."""
    ours = {"NGPU": world_size, "WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": 0}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update({name: str(value) for name, value in ours.items()})
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        # It would answer the next build with this one's meshes.
        _clear_sharding_prop_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _any_gpu() -> Iterator[None]:
    """What torchtitan asks of this machine's GPU when it reads a configuration is answered for the cluster's."""
    with (
        _replaced(torch.cuda, "is_available", lambda: True),
        _replaced(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
    ):
        yield


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """All tensors stay on the meta device."""
    with (
        _replaced(nn.Module, "to_empty", lambda module, **_: module),
        _replaced(BaseModel, "init_weights", lambda *_, **__: None),
    ):
        yield


@contextlib.contextmanager
def _counting(model_config: type, counted: list[int]) -> Iterator[None]:
    """Note torchtitan's count of the whole model's parameters, which it only logs."""
    count = model_config.get_nparams_and_flops  # type: ignore[attr-defined]

    def noted(*arguments: Any, **options: Any) -> Any:
        found = count(*arguments, **options)
        counted.append(found[0])
        return found

    with _replaced(model_config, "get_nparams_and_flops", noted):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def main() -> None:
    """Check the plans on standard input, as `check` does."""
    logger.setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for plan in json.load(sys.stdin):
        # Standard output is for results; some libraries print to it.
        with contextlib.redirect_stdout(sys.stderr):
            found = check(Plan.from_dict(plan))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
