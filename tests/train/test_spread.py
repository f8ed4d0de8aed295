"""Which rank is slow, as the ranks tell each other."""

import json
import subprocess
import sys
from pathlib import Path

from tests.train import data_helpers  # noqa: F401 (torchtitan on a CPU)
from titan_slurm.train.spread import OptimizerTimes

RANK = """
import json, sys
from titan_slurm.train import cpu
cpu.install()
import torch.distributed as dist
from titan_slurm.train.spread import Spread
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
spread = Spread(rank)
said = [spread.exchange(step, {"a": (0.5, 0.25, 1.0)[rank] * step, "b": 7.0 - rank, "c": 0.0}) for step in (1, 2, 3)]
print(json.dumps(said))
dist.barrier()
"""


def test_the_slowest_and_the_fastest_rank_are_known_to_all(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")] for rank in range(3)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    for step in (1, 2):
        expected = {
            "step": step,
            "a": {"min": 0.25 * step, "min_rank": 1, "max": 1.0 * step, "max_rank": 2},
            "b": {"min": 5.0, "min_rank": 2, "max": 7.0, "max_rank": 0},
            "c": {"min": 0.0, "min_rank": 2, "max": 0.0, "max_rank": 2},
        }
        # What all said at one step, each knows at the next.
        assert [each[step] for each in said] == [expected] * 3
    assert [each[0] for each in said] == [None] * 3


def test_the_optimizer_keeps_what_others_have_marked_it_with() -> None:
    times = OptimizerTimes(on_host=True)

    def step(closure: object = None) -> object:
        return closure

    step.marked = True  # type: ignore[attr-defined]
    timed = times.timed(step)
    assert timed("x") == "x"
    assert timed.marked  # type: ignore[attr-defined]
    assert times.take() > 0
    assert times.take() == 0
