"""How all ranks come to one answer: a group of its own on the CPU, beside the collectives of the training, so that
agreeing never waits for a GPU. What is agreed on does not live here."""

import functools
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# A rank may be compiling, saving or loading for long while the others wait; the watchdog ends what hangs.
_PATIENCE = timedelta(days=7)


class PendingAnswer:
    """An answer under way; `result` waits for the slowest rank."""

    def __init__(self, work: Any, answer: torch.Tensor) -> None:
        self._work = work
        self._answer = answer

    def result(self) -> int:
        """The largest value of any rank."""
        return self.results()[0]

    def results(self) -> list[int]:
        """At each place, the largest value of any rank."""
        self._work.wait()
        return [int(value) for value in self._answer.tolist()]


class Agreement:
    """Every method is collective: all ranks call it, in the same order."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def ask_largest(self, value: int) -> PendingAnswer:
        """Start finding the largest value of any rank, and return at once."""
        return self.ask_largest_of([value])

    def ask_largest_of(self, values: list[int]) -> PendingAnswer:
        """The same for several values at once, each at its place; as many on every rank."""
        answer = torch.tensor(values, dtype=torch.int64)
        return PendingAnswer(dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._group, async_op=True), answer)

    def largest(self, value: int) -> int:
        """The largest value of any rank."""
        return self.ask_largest(value).result()

    def from_rank_0(self, value: T | None) -> T:
        """Rank 0's value, on every rank; what the others pass does not matter."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in the order of ranks."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


@functools.cache
def agreement() -> Agreement:
    """The one group of this process; made at the first call, which is collective too."""
    return Agreement()
