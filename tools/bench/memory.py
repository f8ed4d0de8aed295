#!/usr/bin/env python3
"""GPU memory that `titan-slurm validate` predicts, against what a training takes.

    python tools/bench/memory.py --list                             # names and groups of cases
    python tools/bench/memory.py --cases one --results FILE.json    # measure on this machine's GPUs; adds to FILE
    python tools/bench/memory.py --compare FILE.json [--json]       # predicted against measured; needs no GPU

Each case is a fresh process per GPU that trains a few steps on the built-in text, without checkpoints, with the
configuration that the toolkit makes of a recipe. Peaks are over all steps and the worst GPU, in GiB: "allocated" is
what tensors took, "reserved" what torch's allocator took from the driver, "used" what the driver says is gone, with
CUDA's and NCCL's own. Exit code 1 where the predicted total is more than 15 % away from "used".
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIMIT = 0.15
STEPS = 4
GIB = 2**30
CASE_SECONDS = 150
# Compiled kernels are the same for every case of a shape.
CACHES = Path(tempfile.gettempdir()) / "titan-slurm-bench-caches"


@dataclass(frozen=True)
class Case:
    """A training on `gpus` GPUs of this machine."""

    group: str
    model: str
    seq_len: int
    batch_size: int
    activation_checkpointing: str
    gpus: int = 1
    compile: bool = False
    more: tuple[str, ...] = ()
    """Further `section.key=value`."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.seq_len}x{self.batch_size}", self.activation_checkpointing]
        parts += ["compile"] * self.compile
        parts += [setting.partition(".")[2] for setting in self.more]
        parts += [f"{name}={value}" for name, value in self.environment.items()]
        return f"{self.gpus}gpu/" + "/".join(parts)

    @property
    def settings(self) -> list[str]:
        """What it sets over the debug recipe."""
        family, flavor = self.model.split(":") if ":" in self.model else ("llama3", self.model)
        return [
            f"model.name={family}",
            f"model.flavor={flavor}",
            f"slurm.gpus_per_node={self.gpus}",
            f"slurm.tasks_per_node={self.gpus}",
            f"training.seq_len={self.seq_len}",
            f"training.batch_size={self.batch_size}",
            "training.gradient_accumulation_steps=1",
            f"training.max_steps={STEPS}",
            "training.mixed_precision=bf16",
            f"memory.activation_checkpointing={self.activation_checkpointing}",
            f"compile.enabled={str(self.compile).lower()}",
            "wandb.enabled=false",
            *self.more,
        ]


NO_GRAPHS = "torchtitan.training.disable_cuda_graphs=true"
CASES = [
    *(Case("one", "1B", 4096, 4, mode) for mode in ("none", "selective", "full")),
    *(Case("one", "1B", 4096, 1, mode) for mode in ("none", "selective")),
    *(Case("one", "1B", 8192, 4, mode) for mode in ("none", "full")),
    *(Case("one", "1B", 4096, 4, mode, compile=True) for mode in ("none", "selective", "full")),
    *(Case("one", "3B", 4096, 2, mode) for mode in ("none", "selective", "full")),
    Case("one", "3B", 8192, 2, "selective"),
    Case("one-more", "3B", 8192, 2, "selective", compile=True),
    Case("one-more", "3B", 8192, 2, "none", compile=True),
    Case("one-more", "1B", 4096, 4, "memory_budget", compile=True),
    Case("one-more", "1B", 4096, 4, "selective", more=(NO_GRAPHS,)),
    Case("one-more", "1B", 4096, 4, "selective", more=(NO_GRAPHS, "training.gradient_accumulation_steps=2")),
    Case("one-more", "1B", 4096, 4, "selective", environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    Case("one-more", "1B", 4096, 4, "selective", more=("training.dtype=bf16",)),
    Case("one-more", "1B", 4096, 4, "selective", more=("torchtitan.loss.num_chunks=1",)),
    Case("one-more", "qwen3:0.6B", 4096, 4, "selective"),
    Case("one-more", "qwen3:0.6B", 4096, 4, "none"),
    Case("one-more", "qwen3:1.7B", 4096, 2, "none", compile=True),
    Case("one-more", "8B", 4096, 1, "full"),
    *(Case("two", "1B", 4096, 4, mode, gpus=2) for mode in ("none", "selective", "full")),
    *(Case("two", "3B", 4096, 2, mode, gpus=2) for mode in ("none", "selective", "full")),
    Case("two", "8B", 4096, 1, "full", gpus=2),
    Case("two", "8B", 8192, 1, "selective", gpus=2),
    Case("two", "8B", 4096, 1, "selective", gpus=2, compile=True),
    Case("two", "1B", 4096, 4, "selective", gpus=2, more=("parallelism.tensor_parallel=2",)),
    Case("two", "3B", 4096, 2, "none", gpus=2, more=("parallelism.tensor_parallel=2",)),
    Case("two-more", "3B", 4096, 2, "none", gpus=2, more=("parallelism.reshard_after_forward=never",)),
    Case("two-more", "1B", 4096, 4, "selective", gpus=2, more=("parallelism.data_parallel_replicate=2",)),
    Case("two-more", "1B", 8192, 2, "none", gpus=2, more=("parallelism.context_parallel=2",)),
    Case("two-more", "8B", 4096, 4, "selective", gpus=2, more=("parallelism.pipeline_parallel=2",)),
    Case("two-more", "8B", 4096, 4, "none", gpus=2, more=("parallelism.pipeline_parallel=2",)),
    Case("two-more", "3B", 4096, 2, "full", gpus=2, more=("parallelism.tensor_parallel=2",)),
    Case("two-more", "8B", 4096, 1, "full", gpus=2, more=("parallelism.tensor_parallel=2",)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--cases", help="names or groups, with commas between them")
    parser.add_argument("--results", type=Path, default=Path("memory.json"))
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=int, default=510, help="begin no case after that many")
    parser.add_argument("--rank", nargs=2, type=Path, metavar=("RUN", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        train(*arguments.rank)
        return 0
    if arguments.list:
        print("\n".join(f"{case.group:10}{case.name}" for case in CASES))
        return 0
    if arguments.compare:
        return compare(json.loads(arguments.compare.read_text()), as_json=arguments.json)
    wanted = (arguments.cases or "one").split(",")
    measure([case for case in CASES if case.group in wanted or case.name in wanted], arguments)
    return 0


def measure(cases: list[Case], arguments: argparse.Namespace) -> None:
    """Run the cases that have no result yet, and write each result as soon as it is there."""
    start = time.monotonic()
    results: dict[str, Any] = json.loads(arguments.results.read_text()) if arguments.results.is_file() else {}
    for case in cases:
        if case.name in results and "error" not in results[case.name]:
            continue
        if time.monotonic() - start > arguments.seconds:
            print(f"no time left for {case.name}", flush=True)
            continue
        began = time.monotonic()
        results[case.name] = run_case(case)
        results[case.name]["seconds"] = round(time.monotonic() - began, 1)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
        shown = {name: results[case.name].get(name) for name in ("used", "reserved", "allocated", "seconds", "error")}
        print(case.name, shown, flush=True)


def run_case(case: Case) -> dict[str, Any]:
    """Train it in processes of its own. Returns the worst GPU's peaks, or the end of what was printed."""
    from titan_slurm.cli import options
    from titan_slurm.launch import create

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepared = options.prepare("llama3_debug", None, case.settings, "local", "bench", folder)
        create.create(prepared.run, prepared.plan, prepared.resolved, prepared.script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.gpus}"]
        environment = os.environ | case.environment
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor"), "TRITON_CACHE_DIR": str(CACHES / "triton")}
        try:
            done = subprocess.run(
                [*command, __file__, "--rank", prepared.run.path, folder],
                capture_output=True,
                text=True,
                env=environment,
                timeout=CASE_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"more than {CASE_SECONDS} s"}
        ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        if done.returncode or len(ranks) < case.gpus:
            return {"error": (done.stdout + done.stderr)[-4000:]}
    worst = max(ranks, key=lambda rank: rank["used"])
    return worst | {"ranks": ranks}


def train(run_path: Path, out: Path) -> None:
    """One rank of a case: a few steps, and the peaks of each."""
    import torch
    import torch.distributed
    from torchtitan.tools.logging import init_logger
    from torchtitan.trainer import Trainer

    from titan_slurm.run.attempt import Attempt
    from titan_slurm.run.directory import RunDirectory
    from titan_slurm.train import data
    from titan_slurm.train.config import trainer_config

    init_logger()
    rank, run = int(os.environ["RANK"]), RunDirectory(run_path)
    plan = run.plan()
    wait_for_assets(rank, run, lambda: data.prepare_assets(run, plan))
    plan.torchtitan.update({"checkpoint.enable": False, "metrics.log_freq": 1})
    trainer = Trainer(trainer_config(Trainer.Config, plan, run, Attempt(out / "0001")))
    # torchtitan forgets the peak each time it logs.
    trainer.metrics_processor.device_memory_monitor.reset_peak_stats = lambda: None
    built = memory()
    steps = []
    step, forward_backward = trainer.train_step, trainer.forward_backward_step
    within: dict[str, float] = {}

    def measured_forward_backward(**batch: Any) -> Any:
        loss = forward_backward(**batch)
        within.update(forward_backward_peak=memory()["allocated_peak"], after_backward=memory()["allocated"])
        return loss

    def measured_step(batches: Any) -> None:
        torch.cuda.reset_peak_memory_stats()
        step(batches)
        torch.cuda.synchronize()
        steps.append(memory() | within)

    trainer.train_step, trainer.forward_backward_step = measured_step, measured_forward_backward
    trainer.train()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "used": max(step["used"] for step in steps),
        "reserved": max(step["reserved_peak"] for step in steps),
        "allocated": max(step["allocated_peak"] for step in steps),
        "built": built,
        "steps": steps,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(result))
    trainer.close()
    torch.distributed.destroy_process_group()


def wait_for_assets(rank: int, run: Any, prepare: Any) -> None:
    """Rank 0 makes the data; the others have no group yet to wait in."""
    if rank == 0:
        prepare()
    while not run.assets_folder.is_dir():
        time.sleep(0.1)


def memory() -> dict[str, float]:
    """What this process and its GPU take at this moment, and the peaks since they were reset, in GiB."""
    import torch

    free, total = torch.cuda.mem_get_info()
    taken = {
        "allocated": torch.cuda.memory_allocated(),
        "allocated_peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
        "reserved_peak": torch.cuda.max_memory_reserved(),
        "used": total - free,
    }
    return {name: round(value / GIB, 3) for name, value in taken.items()}


def compare(results: dict[str, Any], *, as_json: bool) -> int:
    """Print predicted against measured."""
    from titan_slurm.cli import options
    from titan_slurm.recipe.estimate import estimate

    rows = []
    for case in CASES:
        measured = results.get(case.name)
        if not measured or "error" in measured:
            continue
        resolved = options.resolve("llama3_debug", None, case.settings)
        memory = estimate(resolved.recipe, resolved.layout, torchtitan=resolved.torchtitan).memory
        assert memory is not None
        predicted = {name: value / GIB for name, value in memory.parts().items()}
        rows.append(
            {
                "case": case.name,
                "predicted": predicted,
                "predicted_total": memory.total / GIB,
                "used": measured["used"],
                "reserved": measured["reserved"],
                "allocated": measured["allocated"],
                "error": memory.total / GIB / measured["used"] - 1,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print("| case | predicted | used | reserved | allocated | error | parts |\n|---|---|---|---|---|---|---|")
        for row in rows:
            parts = ", ".join(f"{name} {value:.1f}" for name, value in row["predicted"].items())
            print(
                f"| {row['case']} | {row['predicted_total']:.1f} | {row['used']:.1f} | {row['reserved']:.1f} | "
                f"{row['allocated']:.1f} | {row['error']:+.0%} | {parts} |"
            )
    return int(any(abs(row["error"]) > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
