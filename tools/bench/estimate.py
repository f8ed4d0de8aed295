#!/usr/bin/env python3
"""How long the estimate of a recipe takes, and what it says, for every recipe that comes with titan-slurm.

    python tools/bench/estimate.py [--gpu H100] [--runs 5]

The time is that of `estimate` alone, with the search for what would help where a recipe does not fit the GPU. Exit code
1 where one takes more than 50 ms.
"""

import argparse
import statistics
import sys
import time

from titan_slurm.recipe import find
from titan_slurm.recipe.estimate import Estimate, estimate
from titan_slurm.recipe.gpus import Gpu, named_gpu
from titan_slurm.recipe.resolve import ResolvedRecipe, resolve

LIMIT = 0.05
GIB = 2**30


def measure(resolved: ResolvedRecipe, gpu: Gpu, runs: int) -> tuple[Estimate, float]:
    """The estimate, and the median of the seconds that it took."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        made = estimate(resolved.recipe, resolved.layout, gpu, torchtitan=resolved.torchtitan)
        taken.append(time.perf_counter() - start)
    return made, statistics.median(taken)


def row(name: str, made: Estimate, seconds: float) -> str:
    """One line of a Markdown table."""
    memory = f"{made.memory.total / GIB:.0f}" if made.memory else "-"
    days = f"{made.seconds / 86400:,.0f}" if made.seconds else "-"
    cells = (
        name,
        f"{(made.parameters or 0) / 1e9:.2f}",
        memory,
        {True: "yes", False: "no", None: "-"}[made.fits],
        f"{(made.checkpoint_bytes or 0) / 1e9:,.1f}",
        f"{made.tokens / 1e9:,.1f}",
        days,
        f"{seconds * 1000:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    gpu = named_gpu(arguments.gpu, "--gpu")
    print("| recipe | parameters, B | memory, GiB | fits | checkpoint, GB | tokens, B | days | estimate, ms |")
    print("|---|---|---|---|---|---|---|---|")
    slowest = 0.0
    for found in find.recipes():
        made, seconds = measure(resolve(str(found.path), environment={}), gpu, arguments.runs)
        slowest = max(slowest, seconds)
        print(row(found.name, made, seconds))
    return int(slowest > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
