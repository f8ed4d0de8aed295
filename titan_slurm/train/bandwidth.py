"""How fast the ranks reduce together, in place of a training: what `titan-slurm doctor --job` has the ranks do."""

import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from titan_slurm.run.attempt import ATTEMPT_VARIABLE, Attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json
from titan_slurm.run.plan import Plan
from titan_slurm.train import rendezvous
from titan_slurm.train.rank import enter_distributed_environment

# Large enough that the wires count and not the start of each message.
_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
_WARM_UP, _TIMES = 3, 10
_PATIENCE = timedelta(minutes=3)


def live(run_path: str) -> None:
    """Measure, as the rank that the environment names. Rank 0 writes `bandwidth.json` into the attempt's folder:
    {"backend", "device", "bytes", "rows": [{"nodes", "ranks", "seconds", "bus_bytes_per_second"}]}, a row for one node,
    two, four … and all of them.

    Leaves `finished.json`, or `error_rank_N.json`, as a training does; an error is raised again.
    """
    plan = RunDirectory(Path(run_path)).plan()
    attempt = Attempt(Path(os.environ[ATTEMPT_VARIABLE]))
    rank, world_size = enter_distributed_environment()
    try:
        rendezvous.meet(attempt, rank, world_size)
        rows = _measure(plan, rank)
    except BaseException as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        attempt.report_error(rank, line, traceback.format_exc(), step=None)
        raise
    if rank == 0:
        about = {"backend": _backend(plan), "device": plan.device, "bytes": _BYTES[plan.device]}
        write_json(attempt.path / "bandwidth.json", about | {"rows": rows})
        attempt.finish(0)


def _backend(plan: Plan) -> str:
    return "nccl" if plan.device == "cuda" else "gloo"


def _measure(plan: Plan, rank: int) -> list[dict[str, float]]:
    if plan.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group(_backend(plan), timeout=_PATIENCE)
    try:
        tensor = torch.zeros(_BYTES[plan.device] // 4, dtype=torch.float32, device=device)
        rows = []
        for nodes in _node_counts(plan.layout.nodes):
            ranks = nodes * plan.layout.tasks_per_node
            # Every rank makes the group, also those that are not in it.
            group = dist.new_group(list(range(ranks)), timeout=_PATIENCE)
            if ranks > 1 and rank < ranks:
                seconds = _slowest(_seconds_each(tensor, group), device, group)
                # busbw of nccl-tests, doc/PERFORMANCE.md: each rank sends and receives 2 (n - 1) / n of the data.
                speed = tensor.nbytes / seconds * 2 * (ranks - 1) / ranks
                rows.append({"nodes": nodes, "ranks": ranks, "seconds": seconds, "bus_bytes_per_second": speed})
            dist.barrier()
        return rows
    finally:
        dist.destroy_process_group()


def _node_counts(nodes: int) -> list[int]:
    """1, 2, 4 … and all."""
    counts = [2**power for power in range(nodes.bit_length())]
    return counts if counts[-1] == nodes else [*counts, nodes]


def _seconds_each(tensor: torch.Tensor, group: dist.ProcessGroup) -> float:
    for _ in range(_WARM_UP):
        dist.all_reduce(tensor, group=group)
    _wait(tensor)
    dist.barrier(group=group)
    begun = time.perf_counter()
    for _ in range(_TIMES):
        dist.all_reduce(tensor, group=group)
    _wait(tensor)
    return (time.perf_counter() - begun) / _TIMES


def _slowest(seconds: float, device: torch.device, group: dist.ProcessGroup) -> float:
    slowest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    return float(slowest)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
