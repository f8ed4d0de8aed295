#!/usr/bin/env python3
"""What `submit --array` takes of Slurm for many runs, as a ratio to a bare `sbatch --array` of as many tasks, and both
beside a loop of bare sbatch calls; and what it takes by itself, to plan the runs and to make their directories.

    python tools/bench/arrays.py [--runs 500] [--pairs 15] [--loop 100]

Brings up a Slurm cluster of its own (as root), on which no job ever starts. Submits the runs once, and then makes again
and again the very calls of Slurm's commands that this took, in turn with the bare one, whose script asks for the same
and does nothing. Prints the median of the ratios of these pairs; the loop is run once with so many calls, and scaled.
Exit code 1 where the ratio is above 1.5.
"""

import argparse
import contextlib
import io
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from titan_slurm.cli import main as command_line

LIMIT = 1.5
REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOOL = REPOSITORY / "tools" / "slurm-cluster"
# Nothing is to start: neither the runs, nor the bare jobs.
LATER = "now+1day"
OF_SLURM = ("sbatch", "scontrol", "scancel", "squeue", "sacct", "sinfo")


class Calls:
    """Takes the place of subprocess.run, keeps the calls of Slurm's commands, and how many files they were handed."""

    def __init__(self) -> None:
        self.made: list[tuple[list[str], int]] = []
        self._run = subprocess.run

    def __call__(self, command: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(command[0]).name in OF_SLURM:
            self.made.append((command, len(keywords.get("pass_fds", ()))))
        return self._run(command, *arguments, **keywords)


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def call(command: Sequence[str | Path], handed: Sequence[int] = ()) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, pass_fds=handed)


def submit(runs: int) -> None:
    """`titan-slurm submit --array` of so many runs."""
    values = ",".join(str(number + 1) for number in range(runs))
    argv = ["titan-slurm", "submit", "llama3_debug", "--name", "many", "--cluster", "slurm", "--array"]
    argv += ["--set", f"training.max_steps={values}", "--set", f"slurm.sbatch.begin={LATER!r}"]
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with mock.patch.object(sys, "argv", argv), silent[0], silent[1]:
        try:
            command_line()
        except SystemExit as left:
            if left.code:
                raise


def forget() -> None:
    """Take all jobs away, so that the next submission finds what this one found."""
    subprocess.run(["scancel", "--user", str(os.getuid())], check=True)
    while subprocess.run(["squeue", "--noheader"], check=True, capture_output=True, text=True).stdout:
        time.sleep(0.1)


def measure(runs: int, pairs: int, loop: int) -> int:
    calls = Calls()
    with mock.patch.object(subprocess, "run", calls):
        whole = seconds(lambda: submit(runs))
    forget()
    lines = Path("runs/many/job.sh").read_text().splitlines()
    asks = [
        line for line in lines if line.startswith("#") and not line.startswith(("#SBATCH --array", "#SBATCH --output"))
    ]
    script = Path("bare.sh")
    script.write_text("\n".join([*asks, "#SBATCH --output=/dev/null", "true", ""]))
    handed = [os.open(script, os.O_RDONLY) for _ in range(max(files for _, files in calls.made))]

    def again() -> None:
        for command, files in calls.made:
            call(command, handed[:files])

    taken = []
    for _ in range(pairs):
        bare = seconds(lambda: call(["sbatch", f"--array=0-{runs - 1}", script]))
        forget()
        taken.append((seconds(again), bare))
        forget()
    one_by_one = seconds(lambda: [call(["sbatch", script]) for _ in range(loop)]) / loop * runs
    ratio = statistics.median(own / bare for own, bare in taken)
    own, bare = (statistics.median(each) for each in zip(*taken, strict=True))
    print(f"Slurm's part of submit --array of {runs}: {ratio:.2f} × sbatch --array (median of {pairs} pairs)")
    print(f"  {own * 1000:.0f} ms in {len(calls.made)} call(s); bare: {bare * 1000:.0f} ms")
    print(f"  a loop of {runs} sbatch calls: {one_by_one:.1f} s, {one_by_one / bare:.0f} × sbatch --array")
    print(f"  submit --array as a whole: {whole:.1f} s, {whole / one_by_one:.2f} × that loop")
    return int(ratio > LIMIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--loop", type=int, default=100)
    given = parser.parse_args()
    # Sockets have short names.
    base = Path(tempfile.mkdtemp(prefix="ts-", dir="/tmp"))
    try:
        up = subprocess.run([TOOL, "up", base / "slurm", "--nodes", "2"], capture_output=True, text=True, check=True)
        for line in up.stdout.splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            os.environ[name] = shlex.split(value)[0]
        os.chdir(base)
        return measure(given.runs, given.pairs, given.loop)
    finally:
        subprocess.run([TOOL, "down", base / "slurm"], capture_output=True, check=False)
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
