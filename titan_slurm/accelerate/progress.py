"""How far a script has come: steps, place in the data, and what happens between two steps. The script's own loop calls
it, through the data loader that it iterates and through `should_stop`."""

import functools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.data_loader import skip_first_batches

from titan_slurm.accelerate.checkpoint import Checkpoints, set_random_state
from titan_slurm.accelerate.session import Session
from titan_slurm.recipe.accelerate import Setup
from titan_slurm.run import events
from titan_slurm.run.checkpoints import newest_committed_step
from titan_slurm.train import committed
from titan_slurm.train.agreement import PendingAnswer, agreement


class Progress:
    """Of one `Accelerator`. `folder`: where checkpoints go if nobody names another place."""

    def __init__(self, accelerator: Any, plan: Setup, folder: Path, session: Session | None) -> None:
        self.step = 0
        """Optimizer steps of the whole training so far."""
        self.stopped = False
        """The scheduler has asked, and the ranks leave."""
        self.data_seconds = 0.0
        """Spent waiting for batches."""
        self.folder = folder
        self._accelerator = accelerator
        self._plan = plan
        self._session = session
        run, log = (str(session.run.path), session.events) if session else ("", events.NO_EVENTS)
        self._checkpoints = Checkpoints(accelerator, keep=plan.keep_latest, run=run, log=log)
        # Passes over the data that are done, and samples of the one that is not; passes that the script has begun.
        self._epoch = self._samples = self._begun = 0
        self._open = False
        self._settled = False
        self._random_state: dict[str, Any] | None = None
        self._pending: PendingAnswer | None = None
        agreement()
        if session:
            session.finish = self._finish

    def is_done(self) -> bool:
        """Nothing is left to do for the script's loop: the recipe's steps are done, or the scheduler has asked."""
        return self.stopped or self.step >= self._plan.max_steps

    @property
    def current_step(self) -> int:
        """The step that the script is in, or has just ended."""
        return self.step + (self._open and bool(self._accelerator.sync_gradients))

    def batches(self, loader: Any) -> Iterator[Any]:
        """One pass over the data. After a restart, passes that were done are empty and the one that was not goes on
        where it was, so that a script's loop over passes need not know of it."""
        if not self._settled:
            self._settle()
        this, self._begun = self._begun, self._begun + 1
        if self.is_done() or this < self._epoch:
            return
        loader.iteration = self._epoch
        skipped = self._batches_done(loader)
        if not skipped:
            self._restore_random_state()
        batches = iter(skip_first_batches(loader, skipped) if skipped else loader)
        stride = self._stride(loader)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                break
            self.data_seconds += time.perf_counter() - began
            self._restore_random_state()
            self._samples, self._open = self._samples + stride, True
            try:
                yield batch
            except GeneratorExit:
                # A break: the step counts, and the script may save it.
                self._count()
                raise
            self.close_step()
            if self.is_done():
                return
        self._epoch, self._samples = self._epoch + 1, 0

    def close_step(self) -> None:
        """The script has done with the batch that it was given. If it ended a step: hear what was asked, save if it is
        time. Collective; does nothing if it has been called for this batch already."""
        if not self._count():
            return
        if self._session:
            self._tell(self._session)
        asked = self._pending.result() if self._pending else 0
        self._pending = None
        if self._session and asked and not self.is_done():
            self.stopped = self._session.stopped = True
            stop = self._session.stop
            why_not_save = functools.partial(committed.why_not_save, self.folder, stop)
            stop.leave(signal.Signals(asked).name, self.step, why_not_save, functools.partial(self.save, self.folder))
        elif self.step % self._plan.save_interval == 0 or self.is_done():
            self.save(self.folder)
        if not self.is_done():
            self._listen()

    def save(self, folder: Path) -> Path:
        """Save this step. Raises RuntimeError within a step, CheckpointSaveError if it cannot be written."""
        if self._open:
            raise RuntimeError("save_state within a step: gradients are accumulating; save when a step has ended")
        position = {"epoch": self._epoch, "samples": self._samples}
        if self._session is None:
            return self._checkpoints.save(folder, self.step, position)
        with self._session.watchdog.patience():
            return self._checkpoints.save(folder, self.step, position)

    def load(self, folder: Path) -> int:
        """Go on from the newest good checkpoint in `folder`, or from `folder` itself if it is one; where there is none,
        from the recipe's resume_from_checkpoint. Returns its step; 0 if there was nothing to go on from."""
        self._settled = True
        path = self._chosen(folder)
        if path is None:
            return 0
        self.step, position, self._random_state = self._checkpoints.load(path)
        self._epoch, self._samples, self._begun = position["epoch"], position["samples"], 0
        if self._session:
            self._session.step = self.step
        return self.step

    def _chosen(self, folder: Path) -> Path | None:
        if committed.from_rank_0(lambda: (folder / ".metadata").exists()):
            committed.check_start(folder)
            return folder
        step = committed.choose(folder)
        if step >= 0:
            return folder / f"step-{step}"
        start = self._plan.resume_from_checkpoint
        return self._chosen(Path(start).expanduser().absolute()) if start else None

    def _settle(self) -> None:
        """Before the first batch: a run goes on by itself, a script that runs alone must say that it does."""
        if self._session:
            self.load(self.folder)
        elif step := committed.from_rank_0(lambda: newest_committed_step(self.folder)):
            raise RuntimeError(
                f"{self.folder} has a checkpoint of step {step} already: call accelerator.load_state() to go on from "
                "it, or name another checkpointing.save_dir"
            )
        self._settled = True
        self._listen()

    def _listen(self) -> None:
        """Ask the other ranks; the answer is read at the next step's end, when the slowest has long sent its part."""
        if self._session:
            self._pending = agreement().ask_largest(self._session.stop.asked)

    def _count(self) -> bool:
        """Whether a step has ended that was not counted yet."""
        # Gradients of an unfinished step are in no checkpoint.
        ended = self._open and bool(self._accelerator.sync_gradients)
        if ended:
            self._open = False
            self.step += 1
            if self._session:
                self._session.step = self.step
        return ended

    def _tell(self, session: Session) -> None:
        session.watchdog.step_ended(self.step)
        if session.last_step is None:
            session.events.add(events.FIRST_STEP, step=self.step)
        session.last_step = self.step

    def _finish(self) -> None:
        """The script has ended: the last step always has a checkpoint."""
        self._open = False
        self.save(self.folder)

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def _stride(self, loader: Any) -> int:
        """Samples that all ranks together draw at once."""
        return int(loader.total_batch_size)

    def _batches_done(self, loader: Any) -> int:
        stride = self._stride(loader)
        if self._samples % stride:
            raise RuntimeError(
                f"the checkpoint has {self._samples} samples of this pass, no multiple of the {stride} that all ranks "
                "draw at once; let batch_size × data-parallel degree divide it"
            )
        return self._samples // stride


class TrainingLoader:
    """The data loader that the script trains on, as `prepare` returns it."""

    def __init__(self, loader: Any, progress: Progress) -> None:
        self._loader = loader
        self._progress = progress
        self._is_accelerate_prepared = True

    def __iter__(self) -> Iterator[Any]:
        return self._progress.batches(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
