#!/usr/bin/env python3
"""What checksums and commit add to a save, as a ratio to the same save by torch's own writer.

    python tools/bench/checkpoints.py [--mebibytes 400] [--ranks 1] [--pairs 9] [--folder .]

Prints the median of the ratios of pairs run in turn, each first as often: the disk's speed drifts, a pair's does not.
Each save is synced to stable storage, as in a training. torch's own takes a CRC-32 of each tensor; ours takes one of
the whole file in its place. Exit code 1 where the cost is more than 5 %.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from titan_slurm.run import checkpoints
from titan_slurm.train.checkpoint_writer import CommittingWriter

LIMIT = 1.05
# Tensors of a Llama's size, not one that fills the file.
TENSOR_MEBIBYTES = 32
WRITERS = {"torch": FileSystemWriter, "ours": CommittingWriter}


def state(mebibytes: int, rank: int) -> dict[str, torch.Tensor]:
    return {
        f"rank{rank}.{number}": torch.randn(TENSOR_MEBIBYTES * 2**18) for number in range(mebibytes // TENSOR_MEBIBYTES)
    }


def seconds(writer: str, tensors: dict[str, torch.Tensor], folder: Path, step: int) -> float:
    path = checkpoints.step_folder(folder, step)
    dist.barrier()
    start = time.perf_counter()
    dcp.save(tensors, storage_writer=WRITERS[writer](str(path)), checkpoint_id=str(path))
    taken = time.perf_counter() - start
    dist.barrier()
    if dist.get_rank() == 0:
        if writer == "ours":
            start = time.perf_counter()
            assert not checkpoints.problems_with(path)
            verified.append(time.perf_counter() - start)
        shutil.rmtree(path)
    dist.barrier()
    return taken


verified: list[float] = []


def measure(rank: int, arguments: argparse.Namespace, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=arguments.ranks)
    tensors = state(arguments.mebibytes // arguments.ranks, rank)
    pairs = []
    for number in range(arguments.pairs + 1):
        order = sorted(WRITERS, reverse=number % 2 == 1)
        taken = {writer: seconds(writer, tensors, folder, 10 * number + place) for place, writer in enumerate(order)}
        if number:
            pairs.append(taken)
    if rank == 0:
        ratio = statistics.median(pair["ours"] / pair["torch"] for pair in pairs)
        own, plain = (statistics.median(pair[writer] for pair in pairs) for writer in ("ours", "torch"))
        print(
            f"{arguments.mebibytes} MiB from {arguments.ranks} ranks: {own:.3f} s with checksums and commit, "
            f"{plain:.3f} s without, {ratio:.3f} × (median of {len(pairs)} pairs); "
            f"verified in {statistics.median(verified):.3f} s"
        )
        (folder / "ratio").write_text(str(ratio))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    store = dist.TCPStore("localhost", 0, is_master=True)
    port = store.port
    del store
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-") as folder:
        mp.spawn(measure, (arguments, Path(folder).absolute(), port), nprocs=arguments.ranks)
        ratio = float((Path(folder) / "ratio").read_text())
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
