"""What a recipe is checked against is what the installed torchtitan has."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from titan_slurm.launch.submit import Prepared
from titan_slurm.recipe.mapping import WORDS, torchtitan_schema
from titan_slurm.recipe.schema import Recipe


def test_the_schema_is_that_of_the_installed_torchtitan(clean_environment: Path) -> None:
    tool = REPOSITORY / "tools" / "generate_torchtitan_schema.py"
    done = subprocess.run([sys.executable, tool, "--check"], cwd=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_word_of_the_recipe_leads_to_a_field_of_torchtitan() -> None:
    recipe = Recipe()
    for (section, field), path in WORDS.items():
        assert hasattr(getattr(recipe, section), field), f"[{section}] {field}"
        assert path in torchtitan_schema()["fields"], path


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("slurm.gpus_per_node=2", "checkpointing.async_mode=async"),
        ("parallelism.pipeline_parallel=2", "compile.enabled=true", "lr_schedule.decay_ratio=0.5"),
    ],
    ids=["cpu", "gpu", "pipeline"],
)
def test_everything_that_a_plan_sets_is_a_field_of_its_type(
    prepare: Callable[..., Prepared], settings: tuple[str, ...]
) -> None:
    fields = torchtitan_schema()["fields"]
    types = {"bool": bool, "int": int, "float": (int, float), "str": str, "list[str]": list}
    for path, value in prepare("llama3_debug", *settings).plan.torchtitan.items():
        assert path in fields, path
        assert isinstance(value, types[fields[path]["type"]]), path
        assert value in fields[path].get("choices", [value]), path
