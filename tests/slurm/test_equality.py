"""A run that was stopped and went on is the run that nothing has disturbed, to the last bit."""

import functools
import sys
from collections.abc import Callable

import pytest

from tests.slurm.conftest import NO_WANDB, REPOSITORY, Cluster

# Short enough to be compared step by step, and with saves wherever it is stopped.
FORTY = ("training.max_steps=40", "checkpointing.save_interval=3", NO_WANDB)
# Which ranks hold what, and the run that all of its kind are to equal: neither workers nor saves change a bit.
LAYOUTS = {
    "fsdp": (2, ()),
    "pp": (1, ("parallelism.pipeline_parallel=2",)),
    "tp": (1, ("parallelism.tensor_parallel=2",)),
}


@pytest.fixture(scope="module")
def left_alone(cluster: Cluster) -> Callable[[str], str]:
    """The name of a completed run with that layout which nothing has disturbed."""

    @functools.cache
    def run(layout: str) -> str:
        nodes, settings = LAYOUTS[layout]
        name = f"alone-{layout}"
        cluster.submit(name, *FORTY, *settings, nodes=nodes)
        assert cluster.wait_for_end(name)["state"] == "completed"
        return name

    return run


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_run_equals_one_that_was_left_alone(
    cluster: Cluster, left_alone: Callable[[str], str], layout: str, workers: int, async_mode: str
) -> None:
    nodes, settings = LAYOUTS[layout]
    stopped = f"stopped-{layout}-{workers}-{async_mode}"
    more = (f"data.num_workers={workers}", f"checkpointing.async_mode={async_mode}")
    cluster.submit(stopped, *FORTY, *settings, *more, nodes=nodes)
    status = cluster.wait(stopped, lambda status: status["step"] >= 4)
    cluster.run("scancel", "--signal=USR2", status["job_id"])
    # The one waits for Slurm to start it again while the other trains.
    alone = left_alone(layout)
    assert cluster.wait_for_end(stopped)["state"] == "completed"
    assert len(cluster.verdicts(stopped)) == 2
    losses = [[(line["step"], line["loss"]) for line in cluster.metrics(run)] for run in (stopped, alone)]
    assert losses[0] == losses[1]
    last = [str(cluster.path(run) / "checkpoints" / "step-40") for run in (stopped, alone)]
    cluster.run(sys.executable, str(REPOSITORY / "tools" / "same_checkpoint.py"), *last)
