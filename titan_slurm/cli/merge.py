"""Logs of several ranks as one: each line with its rank before it, as `srun --label` does, in the order of time."""

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping

# 2026-11-22 20:20:04,096 as Python's logging writes it, and W1122 20:20:44.933 as torch's C++ does; near the beginning.
_PYTHON = re.compile(r"^.{0,40}?\d{4}-(\d\d)-(\d\d)[ T](\d\d:\d\d:\d\d)[.,]?(\d{0,6})")
_CPP = re.compile(r"^.{0,40}?\b[IWEFV](\d\d)(\d\d) (\d\d:\d\d:\d\d)\.?(\d{0,6})")


def merge(lines: Mapping[int, Iterable[str]]) -> Iterator[str]:
    """The lines of each rank's log, with their rank, in the order of time as far as it is known: a line without a time
    follows the one before it in its log. Clocks of different nodes may differ."""
    return (text for _, _, text in heapq.merge(*(_stamped(rank, own) for rank, own in lines.items())))


def _stamped(rank: int, lines: Iterable[str]) -> Iterator[tuple[str, tuple[int, int], str]]:
    last = ""
    for number, line in enumerate(lines):
        found = _PYTHON.match(line) or _CPP.match(line)
        if found:
            # A clock that is set back does not turn a log around.
            last = max(last, f"{found[1]}{found[2]} {found[3]}.{found[4]:0<6}")
        yield last, (rank, number), f"{rank}: {line}"
