"""How far a script has come: steps, place in the data, and what happens between two steps. The script's own loop calls
it, through the data loader that it iterates and through `should_stop`."""

import functools
import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher, skip_first_batches
from torch.utils.data import IterableDataset

from titan_slurm.accelerate.checkpoint import Checkpoints, set_random_state
from titan_slurm.accelerate.metrics import StepLog
from titan_slurm.accelerate.session import Session
from titan_slurm.errors import bad_input
from titan_slurm.recipe.accelerate import Setup
from titan_slurm.run import events
from titan_slurm.run.checkpoints import newest_committed_step
from titan_slurm.train import committed
from titan_slurm.train.agreement import PendingAnswer, agreement

_NO_BATCH = object()
_NO_LOADER = "no data loader that accelerator.prepare returned was iterated, and only so is a script stopped and saved"
_WHICH_LOADER = "prepare the data loader that the script trains on, before others, and iterate over what comes back"


class Progress:
    """Of one `Accelerator`. `folder`: where checkpoints go if nobody names another place. `step_log`: of the rank that
    writes the run's metrics."""

    def __init__(
        self, accelerator: Any, plan: Setup, folder: Path, session: Session | None, step_log: StepLog | None
    ) -> None:
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
        self._step_log = step_log
        run, log = (str(session.run.path), session.events) if session else ("", events.NO_EVENTS)
        self._checkpoints = Checkpoints(accelerator, folder, keep=plan.keep_latest, run=run, log=log)
        # Passes over the data that are done, and samples of the one that is not; passes that the script has begun.
        self._epoch = self._samples = self._begun = 0
        # A batch has been drawn, and an optimizer has made a step, since the last step that is counted.
        self._open = self._stepped = False
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
        batches = _without_first(loader, skipped)
        stride = self._stride(loader)
        try:
            while (batch := self._draw(batches)) is not _NO_BATCH:
                self._samples, self._open = self._samples + stride, True
                yield batch
                self.close_step()
                if self.is_done():
                    return
        except GeneratorExit:
            # A break: the step counts, and the script may save it.
            self._count()
            raise
        finally:
            self._rest()
        self._epoch, self._samples = self._epoch + 1, 0

    def stepped(self) -> None:
        """An optimizer has done what a script has it do for each batch. Raises BadInputError if that was a step, and no
        batch has ever been drawn."""
        if self._stepped or not self._accelerator.sync_gradients:
            return
        if not self._begun:
            raise bad_input("optimizer.step", _NO_LOADER, _WHICH_LOADER)
        self._stepped = True
        if self._session:
            self._session.watchdog.step_ended(self.step + 1)
        # Whatever the script does before it asks for the next batch, an evaluation say, is no step.
        self._rest()

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

    def load(self, given: Path | None = None) -> int:
        """Go on from the newest good checkpoint: of a run, its own, if it has one; else in `given`, or `given` itself;
        where there is none, from the recipe's resume_from_checkpoint. Returns its step; 0 if there was nothing to go on
        from. Raises BadInputError before the script has prepared its model."""
        if not self._accelerator._models:
            hint = "model, optimizer, loader = accelerator.prepare(model, optimizer, loader) first"
            raise bad_input("accelerator.load_state", "there is nothing yet to load into", hint)
        self._settled = True
        path = self._chosen(given)
        if path is None:
            return 0
        self.step, position, self._random_state = self._checkpoints.load(path)
        self._epoch, self._samples, self._begun = position["epoch"], position["samples"], 0
        if self._session:
            self._session.step = self.step
        return self.step

    def _chosen(self, given: Path | None) -> Path | None:
        elsewhere = given if given != self.folder else None
        # What the script of a run names is where it began: a restart must not throw away what it has done since.
        if self._session or elsewhere is None:
            step = committed.choose(self.folder)
            if step >= 0:
                return self.folder / f"step-{step}"
        return (elsewhere and _checkpoint_in(elsewhere)) or self._start()

    def _start(self) -> Path | None:
        if not self._plan.resume_from_checkpoint:
            return None
        path = Path(self._plan.resume_from_checkpoint).expanduser().absolute()
        if not _is_checkpoint(path):
            hint = "a step-N folder of a run's checkpoints"
            raise bad_input("checkpointing.resume_from_checkpoint", f"there is no checkpoint in {path}", hint)
        committed.check_start(path)
        return path

    def _settle(self) -> None:
        """Before the first batch: a run goes on by itself, a script that runs alone must say that it does."""
        if self._session:
            self.load()
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
        ended = self._stepped
        if ended:
            self._open = self._stepped = False
            self.step += 1
            if self._session:
                self._session.step = self.step
        return ended

    def _tell(self, session: Session) -> None:
        self._note(is_last=self.is_done())
        if session.last_step is None:
            session.events.add(events.FIRST_STEP, step=self.step)
        session.last_step = self.step

    def _note(self, *, is_last: bool) -> None:
        if self._step_log:
            self._step_log.passed(self.step, is_last=is_last)

    def _finish(self) -> None:
        """The script has ended: the last step always has a checkpoint. Raises BadInputError if no data loader was
        iterated, and so nothing trained that could be saved."""
        if not self._settled:
            raise bad_input("the script", f"has ended, and {_NO_LOADER}", _WHICH_LOADER)
        self.close_step()
        if not self.stopped:
            self._open = False
            self.save(self.folder)
            self._note(is_last=True)

    def _draw(self, batches: Iterator[Any]) -> Any:
        """The next batch; _NO_BATCH at the end of the pass."""
        if self._session:
            self._session.watchdog.step_begins()
        began = time.perf_counter()
        batch = next(batches, _NO_BATCH)
        self.data_seconds += time.perf_counter() - began
        if batch is not _NO_BATCH:
            self._restore_random_state()
        return batch

    def _rest(self) -> None:
        if self._session:
            self._session.watchdog.rest()

    def _restore_random_state(self) -> None:
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def _stride(self, loader: Any) -> int:
        """Samples that all ranks together draw at once; batches, where the dataset makes them itself."""
        dispatched = isinstance(loader, DataLoaderDispatcher)
        if not dispatched and not isinstance(loader.dataset, IterableDataset):
            return int(loader.total_batch_size)
        # Accelerate has no such number for these.
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
        return int(size) * (1 if dispatched and loader.split_batches else self._plan.layout.data_parallel)

    def _batches_done(self, loader: Any) -> int:
        stride = self._stride(loader)
        if self._samples % stride:
            raise RuntimeError(
                f"the checkpoint has {self._samples} samples of this pass, no multiple of the {stride} that all ranks "
                "draw at once; let batch_size × data-parallel degree divide it"
            )
        return self._samples // stride


def _without_first(loader: Any, batches: int) -> Iterator[Any]:
    """One pass without so many batches."""
    if isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDataset):
        # Their samples have no numbers: they are drawn, and left.
        return itertools.islice(loader, batches, None)
    return iter(skip_first_batches(loader, batches) if batches else loader)


def _checkpoint_in(folder: Path) -> Path | None:
    """The folder itself, if it is a checkpoint, or the newest good one in it. It may be somebody else's: nothing in it
    is changed. Collective."""
    if _is_checkpoint(folder):
        committed.check_start(folder)
        return folder
    step = committed.newest_good(folder)
    return folder / f"step-{step}" if step >= 0 else None


def _is_checkpoint(path: Path) -> bool:
    return committed.from_rank_0(lambda: (path / ".metadata").exists())


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
