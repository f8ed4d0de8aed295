"""A tokenizer's folder is looked at before anything is submitted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine
from titan_slurm.errors import BadInputError
from titan_slurm.launch.submit import Prepared

# The debug model's vocabulary is of 2048.
LAST = 2047
NEITHER = "it holds no tokenizer"


@pytest.fixture
def folder(clean_environment: Path) -> Path:
    path = clean_environment / "tokenizer"
    path.mkdir()
    return path


@pytest.fixture
def problem(prepare: Callable[..., Prepared], folder: Path) -> Callable[[], str]:
    """What submit says of the folder; nothing if it is right."""

    def ask() -> str:
        try:
            prepare("llama3_debug", "data.tokenizer=tokenizer")
        except BadInputError as error:
            [one] = error.problems
            return one.what.removeprefix("data.tokenizer: ").replace(str(folder), "it")
        return ""

    return ask


def write(folder: Path, vocabulary: dict[str, int] | list[Any], **added: int) -> None:
    """A tokenizer.json, as far as its ids go."""
    tokens = [{"id": number, "content": f"<{name}>"} for name, number in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": vocabulary}}))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["vocab.json", "merges.txt"], ""),
        (["vocab.txt"], ""),
        ([], NEITHER),
        # SentencePiece's own format.
        (["tokenizer.model", "tokenizer_config.json"], NEITHER),
        (["tokenizer_config.json", "merges.txt"], NEITHER),
    ],
)
def test_one_of_the_files_that_torchtitan_loads(
    folder: Path, problem: Callable[[], str], files: list[str], says: str
) -> None:
    for file in files:
        (folder / file).touch()
    assert problem() == says


@pytest.mark.parametrize(
    ("vocabulary", "added", "says"),
    [
        ({"a": 0, "b": LAST}, {}, ""),
        ({"a": 0}, {"end": LAST}, ""),
        ([["a", -1.0]] * (LAST + 1), {}, ""),
        # Of Gemma 3's tokenizer, with which its model for text only is trained.
        ({"a": LAST}, {"image_soft_token": LAST + 1}, ""),
        ({"a": 0, "b": LAST + 1}, {}, "2048"),
        ({"a": 0}, {"end": LAST + 3}, "2050"),
        ([["a", -1.0]] * (LAST + 2), {}, "2048"),
    ],
)
def test_every_token_has_an_embedding(
    folder: Path, problem: Callable[[], str], vocabulary: dict[str, int], added: dict[str, int], says: str
) -> None:
    write(folder, vocabulary, **added)
    assert problem() == (says and f"it has token ids up to {says}, and the model a vocab_size of 2048")


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"model": {"vocab": {}}}'])
def test_a_tokenizer_that_cannot_be_read(folder: Path, problem: Callable[[], str], text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert problem().startswith("it/tokenizer.json cannot be read: ")


def test_what_is_only_shown_says_it_in_a_note(cli: CommandLine) -> None:
    Path("tokenizer").mkdir()
    shown = cli("render", "llama3_debug", "--cluster", "slurm", "--set", "data.tokenizer=tokenizer")
    assert shown.code == 0
    assert "submit would refuse it: --set data.tokenizer=tokenizer: data.tokenizer: " in shown.err
    refused = cli("validate", "llama3_debug", "--cluster", "slurm", "--set", "data.tokenizer=tokenizer")
    assert [error.split(" (")[0] for error in refused.errors] == [
        f"--set data.tokenizer=tokenizer: data.tokenizer: {Path('tokenizer').absolute()} holds no tokenizer"
    ]
