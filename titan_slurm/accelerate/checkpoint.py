"""A script's checkpoints: what it has prepared, through DCP, under this toolkit's rules of commitment. When one is made
does not live here."""

import logging
import pickle
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from titan_slurm.run import checkpoints, events
from titan_slurm.run.events import NO_EVENTS, EventLog
from titan_slurm.train import committed
from titan_slurm.train.checkpoint_writer import CheckpointSaveError, CommittingWriter

# The run's watchdog ends what hangs.
_PATIENCE = timedelta(days=7)
_COMMON = "common"

_logger = logging.getLogger()


class Checkpoints:
    """Of one `Accelerator`. Every method is collective.

    folder: where they go if the script names no other place. keep: how many to keep there; 0 keeps all. run: the path
    of the run, for checkpoints to say whose they are.
    """

    def __init__(self, accelerator: Any, folder: Path, *, keep: int, run: str = "", log: EventLog = NO_EVENTS) -> None:
        self._accelerator = accelerator
        self._folder = folder
        self._keep = keep
        self._run = run
        self._events = log
        # A synchronous save waits for the slowest disk; inside NCCL its watchdog would end the training.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="remove-checkpoints")

    def save(self, folder: Path, step: int, position: dict[str, Any]) -> Path:
        """Save and commit a step, unless it is saved already. `position`: the place in the data. Returns where it is.
        Raises CheckpointSaveError."""
        path = checkpoints.step_folder(folder, step)
        if committed.is_saved(folder, step):
            return path
        began = time.monotonic()
        self._events.add(events.SAVE_BEGIN, step=step, waited=0.0)
        state = self._sharded() | {_COMMON: self._common(step, position), _rank(): pickle.dumps(_random_state())}
        try:
            with torch.no_grad():
                dcp.save(state, storage_writer=CommittingWriter(str(path), self._run), process_group=self._group)
        except CheckpointException as error:
            raise self._failed(path, step, error) from None
        if committed.is_rank_0():
            self._committed(folder, step, time.monotonic() - began)
        return path

    def load(self, path: Path) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
        """Take everything back from a checkpoint. Returns its step, position, and this rank's random state, which is
        None where other ranks saved it: `set_random_state` sets it when the first batch is there."""
        began = time.monotonic()
        known = FileSystemReader(path).read_metadata().state_dict_metadata
        own = {_rank(): b""} if _rank() in known and _number_of_ranks(known) == dist.get_world_size() else {}
        state = self._sharded() | {_COMMON: b""} | own
        dcp.load(state, checkpoint_id=str(path), process_group=self._group)
        model, optimizers = self._prepared()
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state.get("optimizer", {}))
        common = pickle.loads(state[_COMMON])
        self._take(common)
        self._events.add(events.CHECKPOINT_LOADED, step=common["step"], seconds=time.monotonic() - began)
        return common["step"], common["position"], pickle.loads(state[_rank()]) if own else None

    def _prepared(self) -> tuple[Any, list[Any]]:
        (model,) = self._accelerator._models
        return model, [each.optimizer for each in self._accelerator._optimizers]

    def _sharded(self) -> dict[str, Any]:
        model, optimizers = get_state_dict(*self._prepared())
        return {"model": model, "optimizer": optimizers}

    def _common(self, step: int, position: dict[str, Any]) -> bytes:
        """What is the same on all ranks."""
        accelerator = self._accelerator
        return pickle.dumps(
            {
                "step": step,
                "position": position,
                "schedulers": [each.state_dict() for each in accelerator._schedulers],
                "custom": [each.state_dict() for each in accelerator._custom_objects],
                "accumulated": accelerator.step,
            }
        )

    def _take(self, common: dict[str, Any]) -> None:
        accelerator = self._accelerator
        for name, objects in (("schedulers", accelerator._schedulers), ("custom", accelerator._custom_objects)):
            if len(common[name]) != len(objects):
                raise RuntimeError(f"the checkpoint has {len(common[name])} {name}, the script {len(objects)}")
            for each, saved in zip(objects, common[name], strict=True):
                each.load_state_dict(saved)
        accelerator.step = common["accumulated"]

    def _committed(self, folder: Path, step: int, seconds: float) -> None:
        try:
            line = checkpoints.record_commit(folder, step, seconds_blocked=seconds)
            more = {"bytes": line["bytes"], "seconds": line["seconds_total"], "seconds_blocked": seconds}
            self._events.add(events.SAVE_COMMITTED, step=step, **more)
            # What a script saves elsewhere is its own to remove.
            if self._keep and folder == self._folder:
                for old in [*checkpoints.stale(folder, self._keep), *checkpoints.leftovers(folder)]:
                    checkpoints.doom(old.path)
                for path in checkpoints.doomed(folder):
                    self._remover.submit(shutil.rmtree, path, ignore_errors=True)
        except OSError as error:
            # The checkpoint itself is safe.
            _logger.warning(f"The checkpoint of step {step} is committed, but: {error}")

    def _failed(self, path: Path, step: int, error: CheckpointException) -> CheckpointSaveError:
        """All ranks have left the save. Rank 0 removes what is left: on a full disk, even a verdict needs the room."""
        if committed.is_rank_0() and not (path / checkpoints.COMMIT_FILE).exists():
            shutil.rmtree(path, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0]
        said = str(cause) if isinstance(cause, CheckpointSaveError) else f"{type(cause).__name__}: {cause}"
        self._events.add(events.SAVE_FAILED, step=step, error=said)
        return CheckpointSaveError(f"step {step} could not be saved: {said}")


def set_random_state(state: dict[str, Any]) -> None:
    """Let this rank draw the numbers that it would have drawn next."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _rank() -> str:
    return f"rank_{dist.get_rank()}"


def _number_of_ranks(known: dict[str, Any]) -> int:
    return sum(name.startswith("rank_") for name in known)
