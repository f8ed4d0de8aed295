"""How the ranks of an attempt find each other: rank 0 opens a store on a port that the kernel gives it and publishes
the address in the attempt's folder. No port is guessed, so two jobs on a node cannot choose the same one."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from titan_slurm.run import hosts
from titan_slurm.run.attempt import Attempt
from titan_slurm.run.attempt import host as host_of_rank
from titan_slurm.run.files import read_json, write_json

# A cold import of torch from a shared file system can take minutes.
_PATIENCE = timedelta(minutes=10)
_TURN_S = 0.1

# The server lives as long as this reference.
_server: TCPStore | None = None


def meet(attempt: Attempt, rank: int, world_size: int) -> TCPStore:
    """Connect to the attempt's store and set the environment so that `init_process_group` uses it.

    Raises TimeoutError if rank 0 does not publish its address in ten minutes.
    """
    global _server
    file = attempt.path / "rendezvous.json"
    if rank == 0:
        _server = TCPStore("localhost", 0, world_size, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        write_json(file, {"hosts": _own_names(), "port": _server.port})
    address = _wait_for(file)
    host = "localhost" if rank == 0 else _resolvable(address["hosts"])
    os.environ.update(
        MASTER_ADDR=host,
        MASTER_PORT=str(address["port"]),
        # The documented way to say that the store's server runs already: rank 0 must not open a second one.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    store = TCPStore(host, address["port"], world_size, is_master=False, timeout=_PATIENCE)
    store.set(f"titan_slurm/host/{rank}", host_of_rank())
    if rank == 0:
        keys = [f"titan_slurm/host/{each}" for each in range(world_size)]
        store.wait(keys, _PATIENCE)
        attempt.set_hosts([value.decode() for value in store.multi_get(keys)])
    return store


def once(store: TCPStore, name: str, rank: int, action: Callable[[], None]) -> None:
    """Let rank 0 do `action` while the others wait for it, at most a day: a large text takes hours to tokenize."""
    if rank == 0:
        action()
        store.set(f"titan_slurm/{name}", "done")
    else:
        store.wait([f"titan_slurm/{name}"], timedelta(days=1))


def _own_names() -> list[str]:
    return [*hosts.own_names(), *(["localhost"] if _alone() else [])]


def _alone() -> bool:
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) == 1


def _resolvable(names: list[str]) -> str:
    name = hosts.resolvable(names)
    if name is None:
        raise RuntimeError(f"this node can resolve none of the names of rank 0's node: {', '.join(names)}")
    return name


def _wait_for(file: Path) -> dict[str, Any]:
    deadline = time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        # Listing the folder makes an NFS client look again; it may remember for a minute that the file was not there.
        if file in file.parent.iterdir():
            return read_json(file) or {}
        time.sleep(_TURN_S)
    raise TimeoutError(f"rank 0 did not publish its address in {file} within {_PATIENCE}")
