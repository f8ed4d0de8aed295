"""How a rank hears that it is to stop: signals are blocked in every thread but one, which waits for them, notes the
deadline, and sees to it that the ranks leave in time even if they never come to the end of their step."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker

from titan_slurm.run import job
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.events import RANK_0, STOP_ASKED
from titan_slurm.run.verdict import STOPPED_EXIT_CODE, seconds_left

# The same as torchtitan's.
_logger = logging.getLogger()

_ASKING = (signal.SIGTERM, signal.SIGUSR2)
# What the batch script needs after the ranks to have Slurm start the job again.
_MARGIN_S = 5.0
_TURN_S = 0.2


def block_signals() -> None:
    """Keep SIGTERM and SIGUSR2 from ending this process and those it starts: data workers and checkpoint savers inherit
    the mask. Must run before torch starts threads."""
    # Starting multiprocessing's tracker, which the first save in the background would do, unblocks SIGTERM again in the
    # thread that starts it.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)


class StopRequest:
    """What was asked of this rank by signals. `asked` is 0, or the number of the first signal that came. `deadline`,
    Unix time, is rank 0's alone."""

    def __init__(self, attempt: Attempt, rank: int, step: Callable[[], int]) -> None:
        self.asked = 0
        self.deadline: float | None = None
        self._attempt = attempt
        self._rank = rank
        self._step = step
        # Whatever thread may have unblocked them: without these, submitit's own handlers would pass SIGTERM over.
        for each in _ASKING:
            signal.signal(each, self._hear)
        threading.Thread(target=self._wait, name="stop-request", daemon=True).start()

    def seconds_left(self) -> float | None:
        """Until Slurm kills the job, less what the batch script needs then; None if nobody knows."""
        left = seconds_left(self.deadline)
        return None if left is None else left - min(_MARGIN_S, left / 4)

    def leave(self, asked: str, step: int, why_not_save: Callable[[], str], save: Callable[[], object]) -> None:
        """Save at this step, on all ranks or on none, and say so. `asked` is the signal that some rank has heard;
        `why_not_save` says why a save is not begun, if it is not, and the same on all ranks. Collective."""
        if not self.asked and self._rank == 0:
            # Only other ranks have heard of it.
            self._attempt.events(RANK_0).add(STOP_ASKED, step=step, signal=asked)
        why = why_not_save()
        if not why:
            _logger.info(f"{asked}: saving at step {step} before leaving")
            save()
        if self._rank == 0:
            self._attempt.stop(asked, step, saved=not why, why=why)
        _logger.info(f"{asked}: leaving at step {step}" + (f" without saving: {why}" if why else ""))

    def _hear(self, asked: int, _: object = None) -> None:
        self.asked = self.asked or asked

    def _wait(self) -> None:
        while not self.asked:
            heard = signal.sigtimedwait(_ASKING, _TURN_S)
            # Interrupted in its last moment (by SIGSTOP and SIGCONT, say) it returns what happens to be in memory.
            if heard and heard.si_signo in _ASKING:
                self._hear(heard.si_signo)
        # One rank keeps time for all: thousands would ask Slurm at once, and when one has left, srun ends the others.
        if self._rank != 0:
            return
        name = signal.Signals(self.asked).name
        self._attempt.events(RANK_0).add(STOP_ASKED, step=self._step(), signal=name)
        # Slurm may not answer at once, and the flag has not waited for it.
        self.deadline = job.deadline(job.ask())
        while (left := self.seconds_left()) is None or left > 0:
            # A preemption may come while the time limit is near, and leave less time.
            if signal.sigtimedwait(_ASKING, _TURN_S if left is not None else 1.0):
                self.deadline = job.deadline(job.ask())
        # A full disk must not keep the ranks from leaving.
        with contextlib.suppress(OSError):
            # The ranks may have stopped and saved, and be slow to leave.
            if not self._attempt.stopped():
                why = "no step ended before the deadline"
                self._attempt.stop(name, self._step(), saved=False, why=why)
        # The main thread is somewhere that no exception reaches: in a compiler, a collective, a file system.
        os._exit(STOPPED_EXIT_CODE)
