"""Which nodes a run leaves out after they have failed it."""

from collections.abc import Callable

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.nodes import blame, excluded, failures

MakeRun = Callable[..., RunDirectory]


def test_a_node_that_failed_twice_is_left_out(make_run: MakeRun) -> None:
    run = make_run()
    blame(run, ["n1", "n2"], 1, "crashed", None)
    assert excluded(run) == []
    blame(run, ["n1"], 2, "hung", None)
    assert excluded(run) == ["n1"]


def test_no_more_are_left_out_than_the_run_can_do_without(make_run: MakeRun) -> None:
    run = make_run()
    for attempt, node in enumerate(["n1", "n1", "n2", "n2", "n3", "n3"], 1):
        blame(run, [node], attempt, "crashed", 2)
    # The one that failed longest ago is let back, with its past forgotten: what fails everywhere is no node's fault.
    assert excluded(run) == ["n2", "n3"]
    assert "n1" not in failures(run)
    blame(run, [], 7, "crashed", 0)
    assert excluded(run) == []
