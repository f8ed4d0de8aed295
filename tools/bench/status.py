#!/usr/bin/env python3
"""What `titan-slurm status` takes for many runs with a job each, on a Slurm of its own (as root): in seconds, and as
ratios to the same `squeue` alone and to `titan-slurm --help`; and how often it calls Slurm's commands.

    python tools/bench/status.py [--runs 1000] [--steps 2000] [--times 5]

Each run has a job that waits, held, and an attempt that has logged so many steps. Prints the medians of runs in turn:
the machine's speed drifts. Exit code 1 where it takes more than 2 s, or more than one call.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from titan_slurm.cli import options
from titan_slurm.launch import create
from titan_slurm.run.attempt import new_attempt
from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import write_json

LIMIT_S = 2.0
REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOOL = REPOSITORY / "tools" / "slurm-cluster"
PROGRAM = [sys.executable, "-m", "titan_slurm"]
COMMANDS = ("squeue", "sacct", "scontrol", "sinfo")


def make_runs(folder: Path, count: int, steps: int, environment: dict[str, str]) -> list[str]:
    """Runs that wait to be started again. Returns the ids of their jobs."""
    prepared = options.prepare("llama3_debug", None, ["wandb.enabled=false"], "slurm", "run-0000", folder)
    create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
    # What status does not read need not be there a thousand times.
    shutil.rmtree(prepared.run.code_folder)
    line = {"step": 0, "time": 0.0, "attempt": 1, "replayed": False, "loss": 2.345678, "max_loss": 3.456789}
    line |= {"grad_norm": 1.234567, "lr": 3e-4, "tokens": 4096, "tokens_per_second": 12345.6, "step_seconds": 0.1234}
    line |= {"data_seconds": 0.0012, "ranks": {"step_seconds": [0.12, 0.13, 0.14], "slowest": 1, "host": "n1"}}
    text = "".join(json.dumps(line | {"step": step, "time": float(step)}) + "\n" for step in range(1, steps + 1))
    jobs = []
    for number in range(count):
        run = RunDirectory(folder / f"run-{number:04d}")
        if number:
            shutil.copytree(prepared.run.path, run.path)
    for number in range(count):
        run = RunDirectory(folder / f"run-{number:04d}")
        command = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"]
        jobs.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip())
        run.add_job({"job_id": jobs[-1], "cluster": "slurm", "time": time.time(), "user": "root"})
        facts = {"started": time.time(), "job_id": jobs[-1], "nodes": "n1", "restart_count": 0, "saved_step": 0}
        write_json(new_attempt(run.attempts_folder).path / "attempt.json", facts)
        run.metrics_file.write_text(text)
    return jobs


def count_calls(folder: Path) -> Path:
    """Put programs that write down each call before Slurm's own. Returns the file."""
    folder.mkdir()
    calls = folder / "calls"
    for name in COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec {shutil.which(name)} "$@"\n')
        (folder / name).chmod(0o755)
    return calls


def seconds(command: list[str], environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(folder: Path, arguments: argparse.Namespace, environment: dict[str, str]) -> int:
    runs = folder / "runs"
    jobs = make_runs(runs, arguments.runs, arguments.steps, environment)
    calls = count_calls(folder / "bin")
    status = [*PROGRAM, "status", "--runs-dir", str(runs)]
    subprocess.run(
        status,
        check=True,
        env=environment | {"PATH": f"{calls.parent}:{environment['PATH']}"},
        stdout=subprocess.DEVNULL,
    )
    called = calls.read_text().split()
    squeue = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r|%N"]
    commands = (status, squeue, [*PROGRAM, "--help"])
    taken = [[seconds(command, environment) for command in commands] for _ in range(arguments.times)]
    took, to_squeue, to_help = (
        statistics.median(values)
        for values in ([each[0] for each in taken], *([each[0] / each[other] for each in taken] for other in (1, 2)))
    )
    ratios = f"{to_help:.1f} × --help, {to_squeue:.0f} × the same squeue alone"
    print(f"status of {arguments.runs} runs: {took:.2f} s; {ratios}")
    print(f"calls: {', '.join(called)}")
    return int(took > LIMIT_S or len(called) > 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000, help="logged by each run")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    # Sockets have short names.
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/tmp") as base:
        cluster = Path(base) / "slurm"
        up = subprocess.run([TOOL, "up", cluster, "--nodes", "1"], check=True, capture_output=True, text=True)
        exports = (line.removeprefix("export ").split("=", 1) for line in up.stdout.splitlines())
        environment = os.environ | {name: shlex.split(value)[0] for name, value in exports}
        try:
            return measure(Path(base), arguments, {**environment, "PYTHONPATH": str(REPOSITORY)})
        finally:
            subprocess.run([TOOL, "down", cluster], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
