"""How far apart the ranks are in what each does alone, so that a slow node shows: the ranks of a step wait for each
other, and all of them take as long as the slowest."""

import functools
import time
from collections.abc import Callable
from typing import Any

from torchtitan.tools.utils import device_module

from titan_slurm.train.agreement import PendingAnswer, agreement

# A number of microseconds and the rank that it is of, in one integer of which the largest can be found.
_RANK_BITS = 20
_LONGEST_US = 1 << 42


class Spread:
    """The shortest and the longest of the ranks' times, and whose they are. Every rank calls `exchange`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._pending: tuple[int, tuple[str, ...], PendingAnswer] | None = None

    def exchange(self, step: int, seconds: dict[str, float]) -> dict[str, Any] | None:
        """Tell the others this rank's times up to `step`, and return what all ranks said the last time: {"step", NAME:
        {"min", "min_rank", "max", "max_rank"}, …}; None at first. Never waits for a rank that is at the same step."""
        before = self._pending
        own = [min(round(each * 1e6), _LONGEST_US) for each in seconds.values()]
        packed = [each << _RANK_BITS | self._rank for each in (*own, *(_LONGEST_US - each for each in own))]
        self._pending = (step, tuple(seconds), agreement().ask_largest_of(packed))
        return _unpack(*before) if before else None


def _unpack(step: int, names: tuple[str, ...], pending: PendingAnswer) -> dict[str, Any]:
    parts = [divmod(each, 1 << _RANK_BITS) for each in pending.results()]
    found: dict[str, Any] = {"step": step}
    for name, longest, shortest in zip(names, parts, parts[len(names) :], strict=False):
        found[name] = {
            "min": (_LONGEST_US - shortest[0]) / 1e6,
            "min_rank": shortest[1],
            "max": longest[0] / 1e6,
            "max_rank": longest[1],
        }
    return found


class OptimizerTimes:
    """How long a rank's optimizer takes. It waits for no other rank, and does the same at every step: a throttled GPU,
    or a node whose cores are taken, shows here."""

    def __init__(self, *, on_host: bool) -> None:
        self._on_host = on_host
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def timed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed where it runs: the host is not made to wait for a GPU."""

        # Its attributes too: the learning-rate schedule leaves a mark on it.
        @functools.wraps(step)
        def on_device(*arguments: Any, **options: Any) -> Any:
            begin, end = device_module.Event(enable_timing=True), device_module.Event(enable_timing=True)
            begin.record()
            result = step(*arguments, **options)
            end.record()
            self._events.append((begin, end))
            return result

        @functools.wraps(step)
        def on_host(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = step(*arguments, **options)
            self._seconds += time.perf_counter() - begin
            return result

        return on_host if self._on_host else on_device

    def take(self) -> float:
        """Seconds since the last call. For when the device has come to the end of the step: it waits for that."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds
