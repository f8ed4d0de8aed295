"""What may differ where a run goes on."""

from collections.abc import Callable

import pytest

from titan_slurm.errors import BadInputError
from titan_slurm.launch import create
from titan_slurm.launch.resume import plan_to_go_on
from titan_slurm.launch.submit import Prepared

Prepare = Callable[..., Prepared]
C4 = ("data.dataset=c4", "training.batch_size=1")


def go_on(prepare: Prepare, before: tuple[str, ...], after: tuple[str, ...]) -> list[str]:
    """Make a run from llama3_debug and go on with it. Returns what is in the way of that."""
    first, second = prepare("llama3_debug", *before), prepare("llama3_debug", *after)
    first.run.path.parent.mkdir()
    create.create(first.run, first.plan, first.resolved, first.script)
    try:
        plan_to_go_on(first.run, second.plan)
    except BadInputError as error:
        return [problem.what for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "change",
    [
        ("slurm.nodes=2",),
        ("slurm.tasks_per_node=1", "training.batch_size=16"),
        ("slurm.tasks_per_node=4", "parallelism.tensor_parallel=2", "training.batch_size=2"),
        ("data.num_workers=3", "torchtitan.dataloader.prefetch_factor=4"),
    ],
)
def test_layout_and_workers_may_change_where_samples_have_numbers(prepare: Prepare, change: tuple[str, ...]) -> None:
    assert go_on(prepare, (), change) == []


def test_a_streamed_dataset_is_tied_to_its_number_of_ranks(prepare: Prepare) -> None:
    assert go_on(prepare, C4, (*C4, "slurm.tasks_per_node=4", "data.num_workers=1")) == [
        "the data-parallel degree, to which the place in 'c4' is tied, was 2 in this run and is now 4",
        "dataloader.num_workers was 0 in this run and is now 1",
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("training.global_batch_size=32", "training.global_batch_size was 16"),
        ("training.seq_len=128", "training.seq_len was 256"),
        ("training.seed=1", "debug.seed was 42"),
    ],
)
def test_what_changes_the_data_of_a_step_may_not_change(prepare: Prepare, change: str, named: str) -> None:
    (problem,) = go_on(prepare, (), (change,))
    assert named in problem
