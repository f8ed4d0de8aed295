"""Which of the errors that ranks report is the cause. When one rank fails, the others lose it in the middle of a
collective and fail too; with clocks that differ from node to node, theirs may even seem to be the earlier ones."""

import re
from collections.abc import Iterable
from typing import Any

# What torch raises where a peer is gone or silent. Python's own ConnectionResetError is not among them: that is from a
# rank's talk with somebody else, a data server say.
_OF_COLLECTIVES = re.compile(r"^(torch\.distributed\.)?(Dist\w*Error|RuntimeError|TimeoutError)\b")
_PEER_IS_LOST = re.compile(
    r"connection (closed|reset|refused|was closed)|broken pipe|remote process exited|remote peer|ncclremoteerror"
    r"|failed to recv, got 0 bytes|socket (has )?timed? ?out|client socket has timed out|wait timeout"
    r"|timed out (waiting|after)|failed to pass monitoredbarrier|caused pair closure|collective operation timeout"
    r"|communicator (was|has been) aborted|ncclcommabort|abort(ed)? .*communicator|did not publish its address"
    r"|store has been (closed|shut)|heartbeat monitor",
    re.IGNORECASE,
)
# NCCL names these for what is wrong with this rank's own node.
_OWN_FAULT = re.compile(
    r"cuda error|unhandled system error|ncclsystemerror|\becc\b|\bxid\b|out of memory", re.IGNORECASE
)


def cause_first(errors: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reported errors, those first that are not merely the loss of another rank; among equals the earliest first."""
    return sorted(errors, key=lambda error: (is_consequence(error), float(error["time"])))


def is_consequence(error: dict[str, Any]) -> bool:
    """Whether a rank reports no more than that it has lost another."""
    line = _first_exception(error["traceback"]) or error["error"]
    if not _OF_COLLECTIVES.match(line) or _OWN_FAULT.search(line):
        return False
    return bool(_PEER_IS_LOST.search(line)) or "DistBackendError" in line


def _first_exception(traceback: str) -> str:
    """The exception, with its message, that came first in a chain: what is raised while it is handled follows from
    it."""
    lines = traceback.splitlines()
    inside = False
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last):"):
            inside = True
        elif inside and line and not line[0].isspace():
            ends = (
                each
                for each in range(number + 1, len(lines))
                if lines[each].startswith(("During handling of the above", "The above exception was"))
            )
            return "\n".join(lines[number : next(ends, len(lines))])
    return ""
