"""A recipe's `[data]` as a plan has it. Whether what it names is there is looked at where a run is planned."""

from pathlib import Path
from typing import Any

from titan_slurm.recipe.mapping import MAP_STYLE_DATASETS
from titan_slurm.recipe.model import model_sizes
from titan_slurm.recipe.schema import Recipe

_BUILT_IN_VOCAB_SIZE = 2048


def data_values(recipe: Recipe) -> dict[str, Any]:
    """Dataset, tokenizer and their paths, which hold from any folder."""
    data, sizes = recipe.data, model_sizes(recipe)
    path, tokenizer = data.dataset_path, data.tokenizer
    map_style = data.dataset in MAP_STYLE_DATASETS
    if path and map_style:
        path = str(Path(path).expanduser().absolute())
    elif path and Path(path).exists():
        # If not, it is a name on a hub.
        path = str(Path(path).absolute())
    return {
        "dataset": data.dataset,
        "dataset_path": path,
        "map_style": map_style,
        "tokenizer": tokenizer if tokenizer == "python_docs" else str(Path(tokenizer).expanduser().absolute()),
        "tokenizer_vocab_size": min(_BUILT_IN_VOCAB_SIZE, sizes.vocab_size) if sizes else _BUILT_IN_VOCAB_SIZE,
    }
