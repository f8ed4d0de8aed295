"""What `doctor --job` makes of a job that goes wrong in a way that the test cluster cannot, or not soon."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_slurm.cluster.profile import Profile, Settings
from titan_slurm.launch import doctor
from titan_slurm.launch.submit import Prepared
from titan_slurm.run.finding import OK

FakeCommand = Callable[[str, str], Callable[[], list[str]]]


# By the shell, when the job is there.
NOW = "$(date +%s.%N)"


def look(prepare: Callable[..., Prepared]) -> list[str]:
    """The lines of `doctor --job` on two nodes that are not ok."""
    prepared = prepare("llama3_debug", "slurm.nodes=2", *doctor.settings(2, None))
    prepared.run.path.parent.mkdir(exist_ok=True)
    return [str(each) for each in doctor.on_nodes(prepared, 5) if each.level != OK]


def job_that_leaves(fake_command: FakeCommand, **files: object) -> None:
    """The job has ended by the time sbatch returns; what its first node has left is in these files."""
    attempt = Path("runs/mine/attempts/0001").absolute()
    lines = [f"/bin/mkdir -p {attempt}/nodes"]
    for name, content in files.items():
        lines.append(f"cat > {attempt}/{name}.json <<END\n{json.dumps(content)}\nEND".replace(f'"{NOW}"', NOW))
    fake_command("sbatch", "\n".join([*lines, "echo Submitted batch job 7"]))


def test_sbatch_refuses_the_job(prepare: Callable[..., Prepared], fake_command: FakeCommand) -> None:
    fake_command(
        "sbatch", "echo 'sbatch: error: Invalid account or account/partition combination specified' >&2; exit 1"
    )
    [line] = look(prepare)
    assert line.startswith("FAIL job: sbatch refused the job: sbatch: error: Invalid account")
    assert not Path("runs/mine").exists()


def test_clocks_that_differ_and_ranks_that_fail(prepare: Callable[..., Prepared], fake_command: FakeCommand) -> None:
    error = {"rank": 1, "host": "n2", "error": "RuntimeError: NCCL error", "time": 1.0, "traceback": ""}
    verdict = {"verdict": "crashed", "reason": "", "again": False}
    facts = {"started": time.time() - 1000, "host": "n1", "job_id": "7"}
    looked = {"findings": [], "nodes": ["n1", "n2"], "bad": {}}
    job_that_leaves(fake_command, attempt=facts, preflight=looked, verdict=verdict, error_rank_1=error)
    clock, ranks = look(prepare)
    assert clock.startswith("warn n1 clock: ")
    assert " s behind the one here — have chrony" in clock
    assert float(clock.split()[3]) == pytest.approx(1000, abs=60)
    assert ranks.startswith("FAIL all-reduce: failed: rank 1 on n2: RuntimeError: NCCL error — ")
    # For whoever wants to know more.
    assert Path("runs/mine/plan.json").exists()


def test_what_a_node_wrote_is_not_seen_here(
    prepare: Callable[..., Prepared], fake_command: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_SHOWN_S", 0.0)
    wrote = {"name": "shared folder", "level": OK, "what": "takes files", "advice": "", "nodes": ["n1", "n2"]}
    looked = {"findings": [wrote], "nodes": ["n1", "n2"], "bad": {}}
    measured = {"backend": "gloo", "bytes": 2**23, "rows": [{"nodes": 2, "ranks": 2, "bus_bytes_per_second": 1e9}]}
    verdict = {"verdict": "completed", "reason": "", "again": False}
    facts = {"started": NOW, "host": "n1", "job_id": "7"}
    job_that_leaves(
        fake_command, attempt=facts, preflight=looked, bandwidth=measured, verdict=verdict, **{"nodes/n1": {}}
    )
    [line] = look(prepare)
    assert line.startswith("FAIL n2 shared folder: a file made there is not seen here — ")


def test_a_rank_for_each_gpu(prepare: Callable[..., Prepared]) -> None:
    profile = Profile("hpc", "hpc.toml", Settings.model_validate({"nodes": {"gpus": 8}}), {})
    plan = prepare("llama3_debug", "slurm.nodes=3", *doctor.settings(3, profile)).plan
    assert (plan.device, plan.layout.world_size, plan.slurm["preflight"]) == ("cuda", 24, True)
    assert not plan.requeue["enabled"]
