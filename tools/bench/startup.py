#!/usr/bin/env python3
"""How long the command line takes to start, as a ratio to what it cannot do without: `python -c "import typer"`.

    python tools/bench/startup.py [--runs 15]

Prints the median of the ratios of pairs run in turn: the machine's speed drifts, a pair's does not. Exit code 1 where
`--help` takes more than three times as long.
"""

import argparse
import statistics
import subprocess
import sys
import time

LIMIT = 3.0
COMMANDS = {
    "titan-slurm --help": [sys.executable, "-m", "titan_slurm", "--help"],
    "titan-slurm validate llama3_debug": [sys.executable, "-m", "titan_slurm", "validate", "llama3_debug"],
}
BASE = [sys.executable, "-c", "import typer"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    medians = {}
    for name, command in COMMANDS.items():
        seconds(BASE), seconds(command)
        pairs = [(seconds(BASE), seconds(command)) for _ in range(runs)]
        medians[name] = statistics.median(own / base for base, own in pairs)
        own = statistics.median(own for _, own in pairs)
        print(f"{name}: {own * 1000:.0f} ms, {medians[name]:.2f} × import typer (median of {runs} pairs)")
    return int(medians["titan-slurm --help"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
