#!/usr/bin/env python3
"""Tokens per second through this toolkit, as a ratio to plain torchtitan with the same configuration.

    python tools/bench/throughput.py [--recipe llama3_debug] [--repeats 3] [--skip 5] [--set section.key=value …]

Trains the recipe on this machine by `titan-slurm submit --cluster local` and by torchtitan's Trainer under torchrun, in
turn, and compares the median speed of the steps after the first ones. Exit code 1 below 0.98.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from titan_slurm.run.directory import RunDirectory

LIMIT = 0.98
PLAIN = Path(__file__).with_name("plain_torchtitan.py")


def through_toolkit(arguments: argparse.Namespace, runs: Path, name: str) -> list[float]:
    """Tokens per second and device of each logged step."""
    options = [word for setting in arguments.set for word in ("--set", setting)]
    command = ["submit", arguments.recipe, "--cluster", "local", "--follow", "--runs-dir", str(runs), "--name", name]
    done = subprocess.run(
        [sys.executable, "-m", "titan_slurm", *command, *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    run = RunDirectory(runs / name)
    ranks = run.plan().layout.world_size
    return [line["tokens_per_second"] / ranks for line in run.metrics()]


def plain(run: RunDirectory, folder: Path) -> list[float]:
    """The same of torchtitan's own Trainer."""
    folder.mkdir()
    ranks = run.plan().layout.world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # Every rank prints, the loss is on one of them; and a rank's share of the cores as the toolkit gives it.
    threads = re.search(r"OMP_NUM_THREADS:-(\d+)", run.script_file.read_text())
    environment = {"LOG_RANK": ",".join(map(str, range(ranks))), "OMP_NUM_THREADS": threads[1] if threads else "1"}
    done = subprocess.run(
        ["env", *(f"{name}={value}" for name, value in environment.items()), *command, PLAIN, run.path, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    # Ranks print the same loss and their own speed; which of them does not matter, they wait for each other.
    return [float(number.replace(",", "")) for number in re.findall(r"tps: ([\d,]+)", done.stdout + done.stderr)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama3_debug")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", type=int, default=5, help="first steps not counted")
    parser.add_argument("--set", action="append", default=["training.log_interval=1"])
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary)
        for number in range(arguments.repeats):
            own = through_toolkit(arguments, runs, f"bench-{number}")[arguments.skip :]
            run = RunDirectory(runs / f"bench-{number}")
            ranks = run.plan().layout.world_size
            other = plain(run, runs / f"plain-{number}")[arguments.skip * ranks :]
            ratios.append(statistics.median(own) / statistics.median(other))
            print(
                f"pair {number + 1}: toolkit {statistics.median(own):,.0f}, torchtitan {statistics.median(other):,.0f} "
                f"tokens/s per device, ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"ratio of tokens per second, toolkit to plain torchtitan: {statistics.median(ratios):.3f}")
    return int(statistics.median(ratios) < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
