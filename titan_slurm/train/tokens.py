"""A text as token ids in one flat file, written once and read in samples of a fixed length. Which sample is whose turn
does not live here.

A folder holds `tokens.bin` (the ids of all documents, one after the other), `documents.bin` (int64: how many pairs of
input and label come before each document) and `tokens.json`.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchtitan.tools.logging import logger

from titan_slurm.run.files import read_json, write_json

# Encoded the same by two tokenizers, they are the same for all that matters; a checksum of their files would also tell
# apart the two spellings that two versions of a library save.
_PROBE = "Tokenizers differ: déjà vu, 東京 42,000.5\n\n\tif (x >= y):  return «ω» 🙂 naïve_CamelCase don't"
_SECONDS_BETWEEN_NEWS = 30.0

Sample = tuple[dict[str, torch.Tensor], torch.Tensor]


def write_tokens(folder: Path, documents: Iterable[list[int]], tokenizer: Any) -> None:
    """Write documents, each a list of ids as the tokenizer made them with BOS and EOS, into a new folder.

    Uses memory for one document. Raises ValueError if there is nothing to learn from in them.
    """
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    count = pairs = tokens = 0
    news = time.monotonic() + _SECONDS_BETWEEN_NEWS
    folder.mkdir()
    with (folder / "tokens.bin").open("wb") as ids_file, (folder / "documents.bin").open("wb") as documents_file:
        for ids in documents:
            if len(ids) < 2:
                continue  # There is nothing to predict in it.
            ids_file.write(np.array(ids, dtype).tobytes())
            documents_file.write(np.int64(pairs).tobytes())
            count, pairs, tokens = count + 1, pairs + len(ids) - 1, tokens + len(ids)
            if time.monotonic() > news:
                logger.info(f"Tokenizing the data: {count:,} documents, {tokens:,} tokens so far")
                news = time.monotonic() + _SECONDS_BETWEEN_NEWS
        for file in (ids_file, documents_file):
            file.flush()
            os.fsync(file.fileno())
    if not count:
        raise ValueError("the data holds no text")
    about = {"schema": 1, "dtype": dtype.name, "tokens": tokens, "documents": count, "probe": _probe(tokenizer)}
    write_json(folder / "tokens.json", about)
    logger.info(f"Tokenized the data: {count:,} documents, {tokens:,} tokens")


class TokenDataset(Dataset[Sample]):
    """Samples of `seq_len` pairs of input and label, packed as torchtitan packs a text: documents one after the other,
    and no pair whose label would be another document's first token. What is left after the last whole sample is not
    used. Raises ValueError if the folder holds no tokens, or another tokenizer's.
    """

    def __init__(self, folder: Path, seq_len: int, tokenizer: Any) -> None:
        about = read_json(folder / "tokens.json")
        if about is None:
            raise ValueError(f"{folder} holds no prepared tokens: there is no tokens.json in it")
        if about["probe"] != _probe(tokenizer):
            raise ValueError(f"{folder} was prepared with another tokenizer than this run's")
        self.seq_len = seq_len
        self._ids = np.memmap(folder / "tokens.bin", about["dtype"], mode="r", shape=(about["tokens"],))
        self._documents = np.memmap(folder / "documents.bin", np.int64, mode="r", shape=(about["documents"],))

    def __len__(self) -> int:
        return (len(self._ids) - len(self._documents)) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        """({"input", "positions"}, labels), each int64 of shape (seq_len,); positions count from 0 in each document."""
        first, end = index * self.seq_len, (index + 1) * self.seq_len
        # A document of n ids has n - 1 pairs, so the ids of a pair lie as many places on as documents lie before it.
        before, last = np.searchsorted(self._documents, (first, end - 1), side="right") - 1
        ids = self._ids[first + before : end + last + 1].astype(np.int64)
        begins = self._documents[before + 1 : last + 1] - first
        across_documents = begins + np.arange(len(begins))
        inputs, labels = np.delete(ids[:-1], across_documents), np.delete(ids[1:], across_documents)
        begin = np.zeros(self.seq_len, np.int64)
        begin[begins] = begins
        positions = np.arange(self.seq_len) - np.maximum.accumulate(begin)
        return (
            {"input": torch.from_numpy(inputs), "positions": torch.from_numpy(positions)},
            torch.from_numpy(labels),
        )


def _probe(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(_PROBE, add_bos=True, add_eos=True)
    return ids
