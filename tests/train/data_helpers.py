"""Prepared data and the loaders of ranks over it, with no training around them."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from titan_slurm.cli import options
from titan_slurm.run.directory import RunDirectory
from titan_slurm.train import cpu

# Before torchtitan is first imported, whichever test does it.
cpu.install()

from torchtitan.components.tokenizer import HuggingFaceTokenizer  # noqa: E402

from titan_slurm.train.data import prepare_assets, tokenizer_folder, tokens_folder  # noqa: E402
from titan_slurm.train.dataloader import TokenDataLoader  # noqa: E402
from titan_slurm.train.tokens import TokenDataset  # noqa: E402

EPOCH = 128


@dataclass(frozen=True)
class Prepared:
    """What a run has in its assets after its first start."""

    run: RunDirectory
    tokens: Path
    tokenizer: Any

    @property
    def seq_len(self) -> int:
        """The length at which the data makes EPOCH samples: another Python has a little more or less text."""
        return len(TokenDataset(self.tokens, 1, self.tokenizer)) // EPOCH

    def loader(self, rank: int, ranks: int, batch: int, **settings: Any) -> TokenDataLoader:
        """The loader of one data-parallel rank, whose epoch has EPOCH samples."""
        config = TokenDataLoader.Config(dataset_path=str(self.tokens), seed=1, **settings)
        loader: TokenDataLoader = config.build(
            dp_world_size=ranks, dp_rank=rank, tokenizer=self.tokenizer, seq_len=self.seq_len, local_batch_size=batch
        )
        return loader


def prepare(folder: Path, *settings: str) -> Prepared:
    """Plan llama3_debug with these settings and prepare its data in a run below `folder`."""
    plan = options.prepare("llama3_debug", None, list(settings), "slurm", "mine", folder).plan
    run = RunDirectory(folder / "mine")
    run.path.mkdir()
    prepare_assets(run, plan)
    tokenizer = HuggingFaceTokenizer(tokenizer_path=tokenizer_folder(run, plan))
    return Prepared(run, Path(tokens_folder(run, plan)), tokenizer)


def draw(loaders: list[TokenDataLoader], draws: int) -> list[str]:
    """What these ranks draw next: one hash for each sample, in global-batch order. Ends their workers."""
    drawn = [list(islice(iter(loader), draws)) for loader in loaders]
    for loader in loaders:
        if loader._loader.num_workers:
            loader._iterator._shutdown_workers()
    return [hashed for batches in zip(*drawn, strict=True) for batch in batches for hashed in hashes(batch)]


def hashes(batch: tuple[dict[str, torch.Tensor], torch.Tensor]) -> Iterable[str]:
    """One for each sample of a batch, over input, positions and labels."""
    inputs, labels = batch
    for row in zip(inputs["input"], inputs["positions"], labels, strict=True):
        yield hashlib.sha256(torch.stack(row).numpy().tobytes()).hexdigest()
