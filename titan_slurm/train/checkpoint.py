"""torchtitan's checkpoint manager, in which a checkpoint counts when it is committed: what is saved, when, and from
what a run goes on. `titan_slurm.run.checkpoints` says what a commit is, `checkpoint_writer` beside this writes it."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torchtitan.components import checkpoint as torchtitan_checkpoint
from torchtitan.components.checkpoint import AsyncMode
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection, device_type

from titan_slurm.run import checkpoints, events
from titan_slurm.run.events import NO_EVENTS, EventLog
from titan_slurm.train import committed
from titan_slurm.train.agreement import agreement
from titan_slurm.train.checkpoint_writer import CheckpointSaveError, CommittingWriter

# The run's watchdog ends what hangs.
_PATIENCE = timedelta(days=7)
# How far a save in the background has come, worst last: the ranks agree on the largest.
_SAVED, _FAILED, _UNDER_WAY = range(3)


class CheckpointManager(torchtitan_checkpoint.CheckpointManager):
    """Saves are committed, a step folder is never written twice, and loading takes the newest that verifies."""

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_checkpoint.CheckpointManager.Config):
        pass

    save_future: Future[Any] | None
    staging_future: Future[Any] | None
    events: EventLog = NO_EVENTS
    """Where saves and loads are noted, on the rank that does so."""
    run: str = ""
    """The path of the run, for its checkpoints to say whose they are."""

    def __init__(self, config: Config, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        if not self.enable:
            return
        self._step_in_flight = 0
        self._save_began = self._blocked = 0.0
        # Without a group of its own a synchronous save waits for the slowest disk inside a collective of NCCL, whose
        # watchdog ends the training after comm.train_timeout_seconds.
        self.pg = dist.new_group(backend="gloo", timeout=_PATIENCE)
        if self.async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM and device_type == "cpu":
            # torchtitan's own asks for a GPU. Here there is nothing to pin, but the saver is a process all the same.
            self.stager = DefaultStager(StagingOptions(use_pinned_memory=False, use_non_blocking_copy=False))
        agreement()

    def finish(self, timeout: float | None = None) -> bool:
        """Wait until no save is in flight, at most `timeout` seconds. Returns whether none is any more.

        Collective, with one answer for all ranks. A save that failed in the background is reported in the log, and the
        next one is synchronous, which raises where this one could not: the training has lost nothing yet.
        """
        if not self.enable or self.save_future is None:
            return True
        wait_for([self.save_future], timeout)
        error = self.save_future.exception() if self.save_future.done() else None
        own = _UNDER_WAY if not self.save_future.done() else _FAILED if error else _SAVED
        state = agreement().largest(own)
        if state == _UNDER_WAY:
            return False
        self.save_future = self.staging_future = None
        if state == _FAILED:
            self._give_up_background_saves(error)
        return True

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Any:
        """As torchtitan's, with a writer that commits."""
        if to_hf:
            raise NotImplementedError("a run's checkpoints are in DCP's format; an export is made afterwards")
        how: dict[str, Any] = {
            "checkpoint_id": checkpoint_id,
            "storage_writer": CommittingWriter(checkpoint_id, self.run),
        }
        with torch.no_grad():
            if async_mode == AsyncMode.ASYNC:
                return dcp.async_save(state_dict, process_group=self.pg, **how)
            if async_mode == AsyncMode.ASYNC_WITH_PINNED_MEM:
                return dcp.async_save(
                    state_dict,
                    process_group=self.pg,
                    async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                    async_stager=self.stager,
                    **how,
                )
            dcp.save(state_dict, process_group=self.pg, **how)
        if enable_garbage_collection:
            GarbageCollection.collect("GC collection invoked by checkpointer.")
        return None

    def _wait_for_saving(self) -> None:
        self.finish()

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        began = time.monotonic()
        self.finish()
        if committed.is_saved(Path(self.folder), curr_step):
            logger.info(f"Step {curr_step} is saved already.")
            return False
        self._save_began, self._step_in_flight = began, curr_step
        self.events.add(events.SAVE_BEGIN, step=curr_step, waited=time.monotonic() - began)
        try:
            super()._save(curr_step, last_step)
        except CheckpointException as error:
            raise self._explain(error) from None
        self._blocked = time.monotonic() - began
        if self.save_future is None:
            self._committed(curr_step)
        else:
            if self.staging_future is None:
                self._staged()
            self.save_future = _then(self.save_future, lambda: self._committed(curr_step))
        return True

    def _maybe_wait_for_staging(self) -> None:
        if self.staging_future is None:
            return
        began = time.monotonic()
        super()._maybe_wait_for_staging()
        self._blocked += time.monotonic() - began
        self._staged()

    def _staged(self) -> None:
        seconds = time.monotonic() - self._save_began
        self.events.add(events.SAVE_STAGED, step=self._step_in_flight, seconds=seconds, seconds_blocked=self._blocked)

    def _committed(self, step: int) -> None:
        """What follows a commit, on rank 0; runs in the saver's thread for a save in the background."""
        if not committed.is_rank_0():
            return
        try:
            line = checkpoints.record_commit(Path(self.folder), step, seconds_blocked=self._blocked)
            more = {"bytes": line["bytes"], "seconds": line["seconds_total"], "seconds_blocked": self._blocked}
            self.events.add(events.SAVE_COMMITTED, step=step, **more)
            self._retain()
        except OSError as error:
            # The checkpoint itself is safe.
            logger.warning(f"The checkpoint of step {step} is committed, but: {error}")

    def _purge_stale_checkpoints(self) -> None:
        # torchtitan asks for it when a save has begun, and counts what is incomplete; see `_retain`.
        pass

    def _retain(self) -> None:
        """Leave what retention no longer wants to torchtitan's purge thread; the newest checkpoint is committed."""
        if not self._should_purge():
            return
        folder = Path(self.folder)
        for old in [*checkpoints.stale(folder, self.keep_latest_k), *checkpoints.leftovers(folder)]:
            checkpoints.doom(old.path)
        for path in checkpoints.doomed(folder):
            self.purge_queue.put(str(path))

    def _give_up_background_saves(self, error: BaseException | None) -> None:
        # A rank without an error of its own hears of it from another.
        reason = self._explain(error) if error else f"step {self._step_in_flight}: another rank could not save it"
        logger.error(f"{reason}; from here on, saves are synchronous.")
        # The process that saves from pinned memory does not come back once it has died.
        self.async_mode = AsyncMode.DISABLED

    def _explain(self, error: BaseException) -> CheckpointSaveError:
        """What went wrong, in a line. Rank 0 removes what is left: on a full disk, even a verdict needs the room."""
        path = checkpoints.step_folder(Path(self.folder), self._step_in_flight)
        if isinstance(error, CheckpointException):
            # All ranks have left the save: this is what they agreed on. Any other error may be of one rank only.
            if committed.is_rank_0() and not (path / checkpoints.COMMIT_FILE).exists():
                shutil.rmtree(path, ignore_errors=True)
            error = next(iter(error.failures.values()))[0]
        said = str(error) if isinstance(error, CheckpointSaveError) else f"{type(error).__name__}: {error}"
        self.events.add(events.SAVE_FAILED, step=self._step_in_flight, error=said)
        return CheckpointSaveError(f"step {self._step_in_flight} could not be saved: {said}")

    def _load(self, step: int = -1) -> bool:
        began = time.monotonic()
        if step == -1:
            step = committed.choose(Path(self.folder))
        if step == -1 and self.initial_load_path:
            committed.check_start(Path(self.initial_load_path))
        loaded = bool(super()._load(step))
        self.events.add(events.CHECKPOINT_LOADED, step=max(step, 0), seconds=time.monotonic() - began)
        return loaded

    def _find_load_step(self, folder: str = "") -> int:  # noqa: ARG002 (torchtitan's signature)
        # Asked only where `committed.choose` has found nothing to go on from.
        return -1


def _then(future: Future[Any], action: Callable[[], None]) -> Future[Any]:
    """A future that is done when `future` is, and `action` after it."""
    chained: Future[Any] = Future()

    def run(done: Future[Any]) -> None:
        try:
            result = done.result()
            action()
        except BaseException as error:
            chained.set_exception(error)
        else:
            chained.set_result(result)

    future.add_done_callback(run)
    return chained
