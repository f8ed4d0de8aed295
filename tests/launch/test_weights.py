"""A folder of weights is looked at before anything is submitted."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_slurm.errors import BadInputError
from titan_slurm.launch.submit import Prepared

# The debug model: six layers, 256 wide, 2048 tokens.
SHAPES = {"model.embed_tokens.weight": [2048, 256]} | {f"model.layers.{n}.x.weight": [1] for n in range(6)}
ONE, FIRST, SECOND = "model.safetensors", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(file: Path, shapes: dict[str, list[int]]) -> None:
    """A file in the format of safetensors, without its data."""
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode())


def index(folder: Path, files: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.fixture
def folder(clean_environment: Path) -> Path:
    path = clean_environment / "weights"
    path.mkdir()
    return path


@pytest.fixture
def problem(prepare: Callable[..., Prepared], folder: Path) -> Callable[[], str]:
    """What submit says of the folder; nothing if it is right."""

    def ask() -> str:
        try:
            plan = prepare("llama3_debug", "model.initial_weights=weights").plan
        except BadInputError as error:
            [one] = error.problems
            return one.what.removeprefix("model.initial_weights: ").replace(str(folder), "it")
        wanted = {"path": str(folder), "in_hf": True, "model_only": True}
        assert {name: plan.torchtitan[f"checkpoint.initial_load_{name}"] for name in wanted} == wanted
        return ""

    return ask


def test_one_file(folder: Path, problem: Callable[[], str]) -> None:
    write(folder / ONE, SHAPES)
    assert problem() == ""


def test_several_files(folder: Path, problem: Callable[[], str]) -> None:
    for file in (FIRST, SECOND):
        write(folder / file, SHAPES)
    assert problem() == "it holds 2 *.safetensors and no model.safetensors.index.json"
    index(folder, dict.fromkeys(SHAPES, FIRST) | {"model.layers.3.x.weight": SECOND})
    assert problem() == ""
    (folder / SECOND).unlink()
    assert problem() == f"it lacks {SECOND}, which its model.safetensors.index.json names"


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        (SHAPES | {"model.embed_tokens.weight": [32000, 256]}, "its embedding is 32000 × 256, the model's 2048 × 256"),
        ({name: shape for name, shape in SHAPES.items() if ".5." not in name}, "it has 5 layers, the model 6"),
        ({"a": [1]}, "it holds no weights of a language model: none is called …embed_tokens.weight"),
    ],
)
def test_weights_of_another_model(
    folder: Path, problem: Callable[[], str], shapes: dict[str, list[int]], what: str
) -> None:
    write(folder / ONE, shapes)
    assert problem() == what


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, struct.pack("<Q", 10) + b"{"])
def test_what_is_no_safetensors(folder: Path, problem: Callable[[], str], content: bytes) -> None:
    (folder / ONE).write_bytes(content)
    assert problem().startswith("it cannot be read: ")


def test_nothing(folder: Path, problem: Callable[[], str]) -> None:
    (folder / "pytorch_model.bin").touch()
    assert problem() == "it holds no *.safetensors"
