"""What only this machine can tell of a recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest

from titan_slurm.errors import BadInputError
from titan_slurm.launch.submit import Prepared


@pytest.mark.parametrize(
    ("dataset", "path", "problem"),
    [
        ("text", None, "data.dataset_path: data.dataset = 'text' needs one"),
        ("tokens", None, "data.dataset_path: data.dataset = 'tokens' needs one"),
        ("text", "nowhere", "data.dataset_path: there is no {here}/nowhere"),
        ("text", "empty", "data.dataset_path: {here}/empty holds no text"),
        ("text", "a.json", "data.dataset_path: {here}/a.json holds no text"),
        ("tokens", "empty", "data.dataset_path: {here}/empty holds no prepared tokens"),
    ],
)
def test_data_that_is_not_there_is_named(
    prepare: Callable[..., Prepared], clean_environment: Path, dataset: str, path: str | None, problem: str
) -> None:
    (clean_environment / "empty").mkdir()
    (clean_environment / "a.json").touch()
    settings = [f"data.dataset={dataset}"] + ([f"data.dataset_path={path}"] if path else [])
    with pytest.raises(BadInputError) as error:
        prepare("llama3_debug", *settings)
    assert [each.what for each in error.value.problems] == [problem.format(here=clean_environment)]


def test_own_data_is_planned_by_its_whole_path(prepare: Callable[..., Prepared], clean_environment: Path) -> None:
    (clean_environment / "a.jsonl").touch()
    plan = prepare("llama3_debug", "data.dataset=text", "data.dataset_path=a.jsonl", "data.num_workers=4").plan
    assert plan.data["dataset_path"] == str(clean_environment / "a.jsonl")
    assert plan.data["map_style"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (("lr_schedule.warmup_steps=1500", "training.max_steps=1200"), "1,500 steps is longer than … of 1,200:"),
        (("lr_schedule.warmup_steps=90", "lr_schedule.total_steps=80"), "90 steps is longer than … of 80:"),
        (("lr_schedule.warmup_steps=90", "lr_schedule.total_steps=90"), ""),
    ],
)
def test_a_warm_up_that_torchtitan_cuts_is_told(
    prepare: Callable[..., Prepared], settings: tuple[str, ...], steps: str
) -> None:
    notes = [note for note in prepare("llama3_debug", *settings).notes if "warm-up" in note]
    assert len(notes) == bool(steps)
    assert all(steps in note.replace("the schedule", "…") for note in notes)
