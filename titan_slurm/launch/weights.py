"""A folder with weights in Hugging Face's format, looked at without torch: whether a model could start from it."""

import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_slurm.recipe.model import ModelSizes

_INDEX = "model.safetensors.index.json"
_EMBEDDING = "embed_tokens.weight"
_LAYER = re.compile(r"\blayers\.(\d+)\.")
# No header is longer (safetensors).
_LONGEST_HEADER = 100_000_000


def problems_with(folder: Path, sizes: ModelSizes | None) -> Iterable[tuple[str, str]]:
    """What is wrong with the weights in `folder` for a model of these sizes, and what would be right."""
    if not folder.is_dir():
        return [(f"there is no folder {folder}", "a folder with *.safetensors, as a model's page has them")]
    files = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    if not files:
        return [(f"{folder} holds no *.safetensors", "weights in another format have to be converted first")]
    try:
        index = json.loads((folder / _INDEX).read_text())["weight_map"] if (folder / _INDEX).exists() else {}
        if missing := sorted({name for name in index.values() if name not in files}):
            return [(f"{folder} lacks {', '.join(missing)}, which its {_INDEX} names", "")]
        if len(files) > 1 and not index:
            return [(f"{folder} holds {len(files)} *.safetensors and no {_INDEX}", "")]
        names = index or dict.fromkeys(_header(next(iter(files.values()))), next(iter(files)))
        embeddings = [name for name in names if name.endswith(_EMBEDDING)]
        shape = _header(files[names[embeddings[0]]])[embeddings[0]]["shape"] if embeddings else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        return [(f"{folder} cannot be read: {type(error).__name__}: {error}", "")]
    if shape is None:
        return [(f"{folder} holds no weights of a language model: none is called …{_EMBEDDING}", "")]
    return _misfits(shape, {found[1] for name in names if (found := _LAYER.search(name))}, sizes) if sizes else []


def _misfits(shape: list[int], layers: set[str], sizes: ModelSizes) -> Iterable[tuple[str, str]]:
    wanted = [sizes.vocab_size, sizes.embed_dim]
    if shape != wanted:
        yield f"its embedding is {shape[0]} × {shape[1]}, the model's {wanted[0]} × {wanted[1]}", ""
    # DeepSeek's weights have a layer more, of a kind that is not trained here.
    if len(layers) < sizes.num_layers:
        yield f"it has {len(layers)} layers, the model {sizes.num_layers}", ""


def _header(path: Path) -> dict[str, Any]:
    """Name, shape and type of each tensor in a file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LONGEST_HEADER:
            raise ValueError(f"{path.name} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return header
