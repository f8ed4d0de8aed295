#!/usr/bin/env python3
"""How long the command line takes to start, as ratios: `--help` to what it cannot do without (`import typer`), and
`validate` of the largest recipe to `--help`.

    python tools/bench/startup.py [--runs 15]

Prints the medians of the ratios of pairs run in turn: the machine's speed drifts, a pair's does not. Where there is
Slurm, `validate` asks it too; what that takes is Slurm's, so nothing but Python is on the PATH here. Exit code 1 where
a ratio is above three.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT = 3.0
PROGRAM = [sys.executable, "-m", "titan_slurm"]
IMPORT_TYPER = [sys.executable, "-c", "import typer"]
HELP = [*PROGRAM, "--help"]
# Nobody has its tokenizer here, and no data is read.
VALIDATE = [*PROGRAM, "validate", "llama3_405b", "--cluster", "slurm", "--set", "data.tokenizer=python_docs"]
REPOSITORY = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Pair:
    """A command and what it is measured by."""

    name: str
    command: list[str]
    base_name: str
    base: list[str]


PAIRS = (
    Pair("titan-slurm --help", HELP, "import typer", IMPORT_TYPER),
    Pair("titan-slurm validate llama3_405b", VALIDATE, "titan-slurm --help", HELP),
)


def seconds(command: list[str], folder: str) -> float:
    environment = {"PATH": str(Path(sys.executable).parent), "HOME": folder, "PYTHONPATH": str(REPOSITORY)}
    start = time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for pair in PAIRS:
            seconds(pair.base, folder), seconds(pair.command, folder)
            taken = [(seconds(pair.base, folder), seconds(pair.command, folder)) for _ in range(runs)]
            ratios.append(statistics.median(own / base for base, own in taken))
            own = statistics.median(own for _, own in taken)
            print(f"{pair.name}: {own * 1000:.0f} ms, {ratios[-1]:.2f} × {pair.base_name} (median of {runs} pairs)")
    return int(max(ratios) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
