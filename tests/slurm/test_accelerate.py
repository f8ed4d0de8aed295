"""The example of a script that uses an Accelerator, on a real cluster: it is preempted and goes on, and its losses are
those that `accelerate launch` gives."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.accelerate.alone import train_in_turn
from tests.slurm.conftest import NO_WANDB, REPOSITORY, SMALL, Cluster

EXAMPLE = REPOSITORY / "tools" / "examples" / "train_with_accelerator.py"
STEPS = 60
KINDS = {"fsdp": ("llama", ()), "tensor": ("gemma", ("parallelism.tensor_parallel=2",))}


def submit(cluster: Cluster, name: str, model: str, *settings: str, nodes: int) -> None:
    given = (*SMALL, NO_WANDB, *settings)
    options = [word for setting in given for word in ("--set", setting)]
    cluster.titan_slurm(
        "submit", "llama3_debug", "--name", name, "--nodes", str(nodes), "--script", str(EXAMPLE), *options,
        "--", "--model", model,
    )  # fmt: skip


def losses(cluster: Cluster, name: str) -> list[str]:
    """As the example prints them, all digits of each."""
    lines = cluster.metrics(name)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [f"{line['loss']:.9g}" for line in lines]


def test_preempted_scripts_go_on_with_the_losses_of_undisturbed_ones(cluster: Cluster, tmp_path: Path) -> None:
    settings = (f"training.max_steps={STEPS}", "checkpointing.save_interval=1000")
    for kind, (model, layout) in KINDS.items():
        submit(cluster, f"script-{kind}", model, *settings, *layout, nodes=2)
    for kind in KINDS:
        cluster.wait(f"script-{kind}", lambda status: status["step"] >= 1)
    cluster.run("sbatch", "--partition=high", "--exclusive", "--nodes=4", "--output=/dev/null", "--wrap", "sleep 2")
    undisturbed = []
    for kind, (model, _) in KINDS.items():
        status = cluster.wait_for_end(f"script-{kind}", 300)
        assert (status["state"], status["step"], status["attempts"]) == ("completed", STEPS, 2)
        first = cluster.verdicts(f"script-{kind}")[0]
        assert first is not None
        assert (first["verdict"], 1 <= first["saved_step"] < STEPS) == ("preempted", True)
        recipe = tmp_path / f"{kind}.toml"
        original = cluster.path(f"script-{kind}") / "recipe.toml"
        recipe.write_text(f'[recipe]\nextends = "{original}"\n[checkpointing]\nsave_dir = "{kind}"\n')
        undisturbed.append(["--model", model, "--recipe", str(recipe)])
    alone = train_in_turn(tmp_path, EXAMPLE, 4, undisturbed)
    assert [losses(cluster, f"script-{kind}") for kind in KINDS] == alone


def test_accelerate_launch_gives_the_losses_of_slurm(cluster: Cluster, tmp_path: Path) -> None:
    submit(cluster, "script-two", "llama", nodes=1)
    assert cluster.wait_for_end("script-two")["state"] == "completed"
    environment = {**os.environ, "TORCHTITAN_CONFIG_PATH": str(cluster.path("script-two") / "recipe.toml")}
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--main_process_port", "0", str(EXAMPLE),
        ],
        env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^step \d+: loss (\S+)$", done.stdout, re.MULTILINE) == losses(cluster, "script-two")
