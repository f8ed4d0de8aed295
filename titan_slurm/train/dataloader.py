"""A data loader for prepared tokens whose place is one number: how many samples the whole run has consumed. From it
each rank of any layout finds its own next samples, so a run goes on with the same data on any number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from titan_slurm.train.tokens import TokenDataset


class SampleOrder:
    """The sample at each position of a run: every epoch, the first one too, visits all `count` samples in an order of
    its own, which depends on the seed and nothing else."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        """The index of the sample at `position`, counted from the run's first sample over all epochs."""
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            # The one generator of numpy's that is promised to shuffle the same in every version.
            generator = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self._seed, epoch))))
            self._epoch, self._permutation = epoch, generator.permutation(self.count)
        return int(self._permutation[place])


class _RankBatches(Sampler[list[int]]):
    """The batches of one rank. All ranks together draw the run's samples in order: of each stretch of
    `dp_world_size` × `batch_size` samples, rank r takes the r-th part. Accumulated and pipelined batches are draws like
    any other, so a step takes the same samples however it is divided."""

    def __init__(
        self, order: SampleOrder, dp_rank: int, dp_world_size: int, batch_size: int, *, infinite: bool
    ) -> None:
        self.stride = dp_world_size * batch_size
        self.start = 0
        self._order = order
        self._own = range(dp_rank * batch_size, (dp_rank + 1) * batch_size)
        self._infinite = infinite

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        # All ranks stop after the same draw, also where the rest would do for some of them.
        while self._infinite or position + self.stride <= self._order.count:
            yield [self._order[position + offset] for offset in self._own]
            position += self.stride


class TokenDataLoader(BaseDataLoader):
    """Built by torchtitan's trainer in place of its own text data loader. Raises ValueError if the data cannot fill one
    global batch."""

    @dataclass(kw_only=True, slots=True)
    class Config(HuggingFaceTextDataLoader.Config):
        """`dataset_path` is a folder that `write_tokens` wrote."""

        seed: int = 0
        """Decides the order of the samples."""
        global_batch_size: int = 1
        """Samples per step over all ranks."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = None,  # noqa: ARG002 (torchtitan passes it; a position needs no snapshots)
    ) -> None:
        dataset = TokenDataset(Path(config.dataset_path or ""), seq_len, tokenizer)
        if len(dataset) < config.global_batch_size:
            raise ValueError(
                f"the data makes {len(dataset)} samples of {seq_len} tokens, fewer than one global batch of "
                f"{config.global_batch_size}"
            )
        order = SampleOrder(len(dataset), config.seed)
        self._samples = 0
        self._batches = _RankBatches(order, dp_rank, dp_world_size, local_batch_size, infinite=config.infinite)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=config.num_workers,
            pin_memory=config.pin_memory,
            # torch refuses these two without workers.
            persistent_workers=config.persistent_workers and config.num_workers > 0,
            prefetch_factor=config.prefetch_factor if config.num_workers else None,
            # Its own, so that drawing a seed for the workers leaves the training's random numbers alone.
            generator=torch.Generator(),
        )
        # As torch's loaders call it: who ends the process early shuts the workers down by it.
        self._iterator: Any = None

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Batches from the position on: ({"input", "positions"}, labels), each of shape (batch, seq_len)."""
        self._batches.start = self._samples
        self._iterator = iter(self._loader)
        for batch in self._iterator:
            # Counted as the trainer takes it, whatever workers have fetched ahead.
            self._samples += self._batches.stride
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The run's position; the same on all ranks."""
        return {"samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position, before iterating."""
        self._samples = state_dict["samples"]
