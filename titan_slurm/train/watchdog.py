"""Ends a rank whose step does not end, after writing down where each of its threads stands."""

import contextlib
import faulthandler
import os
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator

from titan_slurm.run.attempt import Attempt
from titan_slurm.run.verdict import HUNG, HUNG_EXIT_CODE

# Where no step is to be expected: compilation, loading or saving a checkpoint of terabytes, a validation.
_PATIENCE_S = 3600.0
# A learned limit is never shorter: a slow file system is no hang.
_SHORTEST_S = 300.0
_TIMES_MEDIAN = 20.0
_REMEMBERED = 50
# The others wait for the same step: each gets as long to write its stacks before the first one leaves.
_OTHERS_S = 3.0
# After that a rank leaves, whatever it has written.
_WRITING_S = 300.0


class Watchdog:
    """Started before the first step; `step_ended` after each one. `timeout` in seconds; None: learned from steps."""

    def __init__(self, attempt: Attempt, rank: int, timeout: float | None) -> None:
        self._attempt = attempt
        self._rank = rank
        self._timeout = timeout
        self._intervals: deque[float] = deque(maxlen=_REMEMBERED)
        self._step: int | None = None
        self._last = time.monotonic()
        self._patient = self._resting = False
        self._off = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def step_ended(self, step: int) -> None:
        """A step has ended."""
        now = time.monotonic()
        if self._step is not None:
            self._intervals.append(now - self._last)
        self._step, self._last = step, now

    def rest(self) -> None:
        """No step is to be expected before `step_begins`: for a loop that does what it likes between two steps."""
        self._resting = True

    def step_begins(self) -> None:
        """After `rest`: a step is under way."""
        if self._resting:
            self._resting, self._last = False, time.monotonic()

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """For what is no step and may take far longer: a save, a validation."""
        self._patient = True
        try:
            yield
        finally:
            self._patient, self._last = False, time.monotonic()

    def close(self) -> None:
        """No more steps will come."""
        self._off.set()

    def limit(self) -> float:
        """Seconds without the end of a step that count as hung."""
        if self._step is None or self._resting:
            # A settled time-out is for steps, and the first one compiles.
            return _PATIENCE_S
        if self._timeout is not None:
            return self._timeout
        if self._patient:
            return _PATIENCE_S
        return max(_SHORTEST_S, _TIMES_MEDIAN * statistics.median(self._intervals or [0.0]))

    def _watch(self) -> None:
        while not self._off.wait(min(1.0, self.limit() / 10)):
            waited = time.monotonic() - self._last
            if waited > self.limit():
                self._bite(waited)

    def _bite(self, waited: float) -> None:
        # A file system that blocks must not keep the rank from leaving, nor one that is full.
        threading.Timer(_WRITING_S, os._exit, [HUNG_EXIT_CODE]).start()
        try:
            self._tell(waited)
        except Exception:
            traceback.print_exc()
        # Each rank has learned a limit of its own.
        time.sleep(max(_OTHERS_S, waited / _TIMES_MEDIAN))
        os._exit(HUNG_EXIT_CODE)

    def _tell(self, waited: float) -> None:
        where = f"after step {self._step}" if self._step is not None else "at the start"
        with self._attempt.stacks_file(self._rank).open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        _dump_flight_recorder()
        error = f"no step ended for {waited:.0f} s {where}; stacks in {self._attempt.stacks_file(self._rank).name}"
        self._attempt.report_error(self._rank, error, "", step=self._step, kind=HUNG)


def _dump_flight_recorder() -> None:
    """torch's record of the last collectives, into the attempt's `comm_traces`, where there is one (NCCL)."""
    import torch
    from torch.distributed import is_nccl_available

    if is_nccl_available() and torch.cuda.is_available() and (file := os.environ.get("TORCH_FR_DUMP_TEMP_FILE")):
        with open(f"{file}{os.environ['RANK']}", "wb") as out:  # noqa: PTH123 (a prefix, not a folder)
            out.write(torch._C._distributed_c10d._dump_nccl_trace())
