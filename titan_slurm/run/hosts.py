"""What a node calls itself, and which of another's names it can use. Names of nodes in Slurm need not be in the DNS."""

import os
import socket
from collections.abc import Iterable


def own_names() -> list[str]:
    """By which other nodes may find this one, the most likely name first."""
    names = (os.environ.get("SLURMD_NODENAME"), socket.gethostname())
    return [name for name in dict.fromkeys(names) if name]


def resolvable(names: Iterable[str]) -> str | None:
    """The first of these names that this node can resolve; None if it can resolve none."""
    for name in names:
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            continue
        return name
    return None
