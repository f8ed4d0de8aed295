"""A folder with a tokenizer, looked at without the library that loads it: whether a run could use it."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FILE = "tokenizer.json"
# Any one of them is what torchtitan loads a tokenizer from (torchtitan/components/tokenizer.py).
_LOADED = (_FILE, "vocab.json", "vocab.txt")
# Gemma 3's tokenizer has it for all sizes. The smallest model, which takes no pictures, has no embedding for it.
_NEVER_IN_TEXT = "<image_soft_token>"


def problems_with(folder: Path, vocab_size: int | None) -> Iterable[tuple[str, str]]:
    """What is wrong with the tokenizer in `folder`, and what would be right. `vocab_size`: the model's, which all ids
    are held against; None to leave the vocabulary, which may take a second to read, unread."""
    if not folder.is_dir():
        hint = f"a folder with {_FILE}; torchtitan's scripts/download_hf_assets.py fetches one"
        return [(f"there is no folder {folder}", hint)]
    if not any((folder / name).exists() for name in _LOADED):
        return [(f"{folder} holds no tokenizer", " or ".join(_LOADED))]
    if vocab_size is None or not (folder / _FILE).exists():
        return []
    try:
        ids = _size(folder / _FILE)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [(f"{folder / _FILE} cannot be read: {type(error).__name__}: {error}", "")]
    if ids <= vocab_size:
        return []
    what = f"{folder} has token ids up to {ids - 1}, and the model a vocab_size of {vocab_size}"
    return [(what, "another tokenizer, or a larger vocabulary")]


@functools.cache
def _size(file: Path) -> int:
    """The number of embeddings that a tokenizer.json needs: the largest id and one. Once for all runs of an array."""
    contents: dict[str, Any] = json.loads(file.read_bytes())
    vocabulary = contents["model"]["vocab"]
    # Of a unigram model, a list: a token's id is its place.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token["id"] for token in contents.get("added_tokens") or () if token["content"] != _NEVER_IN_TEXT]
    return int(max(ids)) + 1
