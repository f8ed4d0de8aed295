"""One node, looked at from within by one process on it, before the ranks start; on all nodes of a job at once, with
`preflight` on the job's first node, which starts them and makes up its mind. They talk in lines of JSON: what a node
has to say goes to its standard output, and the others' addresses come by standard input, which srun hands to all. So
nothing hangs on what is being looked at.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from titan_slurm.run import gpus, hosts
from titan_slurm.run.attempt import Attempt, host
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.finding import Finding
from titan_slurm.run.folder import lock_finding, try_folder
from titan_slurm.run.plan import Plan

# From the first node that is there to the last: each may have to fetch the container's image first.
START_S = 300
# How long a node stays after that, whatever it waits for.
LONGEST_S = 120
# Each node calls on the first one, as ranks do to meet, and on this many after it.
_NEIGHBOURS = 10
_CONNECT_S = 5.0
_LEAST_SHARED_MEMORY = 2**30
_LEAST_OPEN_FILES = 4096
_LEAST_TEMPORARY = 256 * 2**20
_PACKAGES = ("torch", "torchtitan", "nvidia-nccl-cu13", "nvidia-nccl-cu12")
LOCK = "lock"


def look(run: RunDirectory, attempt: Attempt) -> None:
    """Say what this node is like. Prints one JSON object on a line for each of

    here      [names, port]: where the others may call
    finding   a Finding
    facts     what should be the same on all nodes: {name: text}
    called    [node, seconds that its clock is ahead] or [node, why it cannot be reached]
    end       the last one
    """
    # However a node hangs, it does not hang the job.
    signal.alarm(START_S + LONGEST_S)
    with _open_door() as port:
        _say("here", [hosts.own_names(), port])
        for finding in _findings(run, attempt):
            _say("finding", finding.to_dict())
        _say("facts", _facts())
        everyone = json.loads(sys.stdin.readline() or "[]")
        signal.alarm(LONGEST_S)
        for node, names, port_there in _to_call(everyone):
            _say("called", [node, _call(names, port_there)])
        _say("end", True)
        # Others may still be calling here.
        sys.stdin.read()


def _say(kind: str, value: Any) -> None:
    # Short lines, each by one write: srun keeps those apart.
    print(json.dumps({"node": host(), kind: value}), flush=True)


@contextlib.contextmanager
def _open_door() -> Iterator[int]:
    """Whoever calls is told the time here. Yields the port, which the kernel chooses as it does for the ranks."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=512, dualstack_ipv6=both) as server:
        threading.Thread(target=_tell_time, args=(server,), daemon=True).start()
        yield server.getsockname()[1]


def _tell_time(server: socket.socket) -> None:
    while True:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                connection.sendall(repr(time.time()).encode())


def _call(names: list[str], port: int) -> float | str:
    """How many seconds the other node's clock is ahead of this one's, to half the time of the way there and back; or
    why it cannot be reached."""
    name = hosts.resolvable(names)
    if name is None:
        return f"cannot resolve {' or '.join(names)}"
    before = time.time()
    try:
        with socket.create_connection((name, port), timeout=_CONNECT_S) as connection:
            theirs = connection.recv(64)
    except OSError as error:
        return f"cannot connect to {name}: {error.strerror or error}"
    after = time.time()
    return float(theirs) - (before + after) / 2 if theirs else f"{name} hangs up"


def _to_call(everyone: list[Any]) -> list[Any]:
    """The nodes that this one calls, of [[node, names, port], …]."""
    own = next((number for number, each in enumerate(everyone) if each[0] == host()), None)
    if own is None:
        return []
    numbers = {0, *((own + step) % len(everyone) for step in range(1, _NEIGHBOURS + 1))} - {own}
    return [everyone[number] for number in sorted(numbers)]


def _findings(run: RunDirectory, attempt: Attempt) -> Iterator[Finding]:
    yield from _folder_findings(run, attempt)
    yield _shared_memory_finding()
    yield _temporary_finding()
    yield from _limit_findings()
    yield _packages_finding()
    if run.exists() and (plan := run.plan()).device == "cuda":
        count = 1 if _has_gpus_for_each_task(plan) else plan.slurm["gpus_per_node"]
        yield from gpus.look_at_gpus(count, plan.slurm["gpu_type"])


def _has_gpus_for_each_task(plan: Plan) -> bool:
    """Whether a task sees its own GPUs alone."""
    given = plan.profile["given"].get("slurm", {}) if plan.profile else {}
    options = [*plan.slurm["srun"], *given.get("srun", []), *(f"--{name}" for name in plan.slurm["sbatch"])]
    return any(option.startswith(("--gpus-per-task", "--gpu-bind", "--tres-per-task")) for option in options)


def _folder_findings(run: RunDirectory, attempt: Attempt) -> Iterator[Finding]:
    folder = look_folder(attempt)
    # Made by the first node for this attempt: another folder of the same name would not have it.
    if not (run.exists() and (folder / LOCK).exists()):
        advice = "the folder of runs must be on a file system that all nodes share: --runs-dir, and [paths] shared"
        yield Finding("shared folder", f"{run.path} is not seen here as the first node has it", advice)
        return
    yield from try_folder(folder, host(), run.path)
    yield lock_finding(folder / LOCK)


def look_folder(attempt: Attempt) -> Path:
    """Where the nodes of an attempt try to write."""
    return attempt.path / "nodes"


def _shared_memory_finding() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        size = 0
    advice = "NCCL and data loaders need more: mount it larger, or start the container with more"
    what = f"/dev/shm has {size / 2**30:.1f} GiB"
    return Finding("shared memory", what, "" if size >= _LEAST_SHARED_MEMORY else advice)


def _temporary_finding() -> Finding:
    try:
        # Its own file, which says what is wrong where nothing can be written.
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("temporary files", f"cannot be written: {error.strerror or error}", "clean up the node's /tmp")
    if free < _LEAST_TEMPORARY:
        return Finding("temporary files", f"{free / 2**20:.0f} MiB are left in {folder}", "clean up the node")
    return Finding("temporary files", f"there is room in {folder}")


def _limit_findings() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "data loaders and checkpoints open many: `ulimit -n` in the template, LimitNOFILE of slurmd"
    enough = files == resource.RLIM_INFINITY or files >= _LEAST_OPEN_FILES
    yield Finding("open files", f"at most {files} in a process", "" if enough else advice, is_warning=True)
    if any(Path("/sys/class/infiniband").glob("*")):
        memory, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        unlimited = memory == resource.RLIM_INFINITY
        what = "may be locked without limit" if unlimited else f"at most {memory / 2**20:.0f} MiB may be locked"
        advice = "RDMA pins its buffers: `ulimit -l unlimited` in the template, LimitMEMLOCK=infinity of slurmd"
        yield Finding("locked memory", what, "" if unlimited else advice)


def _packages_finding() -> Finding:
    missing = [name for name in ("torch", "torchtitan") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{sys.executable} has no {' and no '.join(missing)}"
        return Finding("packages", what, "install titan-slurm there: [setup] venv or conda, or the container's image")
    return Finding("packages", f"{sys.executable} has torch and torchtitan")


def _facts() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["NCCL" if "nccl" in name else name] = importlib.metadata.version(name)
    if driver := gpus.driver_version():
        found["GPU driver"] = driver
    found["C library"] = os.confstr("CS_GNU_LIBC_VERSION") or "unknown"
    return found
