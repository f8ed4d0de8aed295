"""The recipe's own data for a script: the samples, and their order, that torchtitan's loop would take."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from titan_slurm.errors import bad_input
from titan_slurm.recipe.accelerate import Setup
from titan_slurm.run.directory import RunDirectory
from titan_slurm.train.data import prepare_assets, tokenizer_folder, tokens_folder
from titan_slurm.train.dataloader import SampleOrder
from titan_slurm.train.tokens import TokenDataset


def training_data(plan: Setup, folder: RunDirectory) -> "DataLoader[dict[str, torch.Tensor]]":
    """A loader over the data that has been `prepared` in `folder`, not yet for several ranks: batches of "input_ids",
    "position_ids" (from 0 in each document) and "labels" (the tokens after those), each int64 of shape
    (batch_size, seq_len)."""
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    like: Any = SimpleNamespace(data=plan.data)
    tokenizer = HuggingFaceTokenizer(tokenizer_path=tokenizer_folder(folder, like))
    samples = _Samples(TokenDataset(Path(tokens_folder(folder, like)), plan.seq_len, tokenizer))
    order = _Order(SampleOrder(len(samples), plan.seed))
    return DataLoader(samples, batch_size=plan.batch_size, sampler=order, drop_last=True)


def prepare(plan: Setup, folder: RunDirectory) -> None:
    """Tokenize the recipe's data into `folder`, once; for one rank. Raises BadInputError for a streamed dataset."""
    if not plan.data["map_style"]:
        what = f"{plan.data['dataset']!r} is streamed by torchtitan's own loader"
        raise bad_input("data.dataset", what, "python_docs, text or tokens; or a data loader of the script's own")
    folder.path.mkdir(parents=True, exist_ok=True)
    like: Any = SimpleNamespace(data=plan.data)
    prepare_assets(folder, like)


class _Samples(Dataset[dict[str, torch.Tensor]]):
    """Under Hugging Face's names."""

    def __init__(self, tokens: TokenDataset) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs, labels = self._tokens[index]
        return {"input_ids": inputs["input"], "position_ids": inputs["positions"], "labels": labels}


class _Order(Sampler[int]):
    """Every pass in an order of its own."""

    def __init__(self, order: SampleOrder) -> None:
        self._order = order
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Accelerate before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._order.count

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._order.count
        return (self._order[first + place] for place in range(self._order.count))
