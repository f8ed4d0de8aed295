"""Predicted GPU memory against what trainings took (tests/data/memory.json says where)."""

import json
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from titan_slurm.recipe.estimate import estimate
from titan_slurm.recipe.resolve import parse_set, resolve

GIB = 2**30
TOLERANCE = 0.1
CASES = json.loads((REPOSITORY / "tests" / "data" / "memory.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_what_a_training_took_was_to_be_expected(case: dict[str, Any]) -> None:
    resolved = resolve("llama3_debug", [parse_set(text) for text in case["settings"]], {})
    taken = estimate(resolved.recipe, resolved.layout, torchtitan=resolved.torchtitan).memory
    assert taken is not None
    if "used" in case:
        assert taken.total / GIB == pytest.approx(case["used"], rel=TOLERANCE)
    else:
        # Torch's own count knows neither CUDA's context nor NCCL's buffers.
        assert taken.total / GIB - 1.5 == pytest.approx(case["reserved"], rel=TOLERANCE)
