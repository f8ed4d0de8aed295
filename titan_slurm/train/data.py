"""The built-in text: CPython's own reference pages on language topics, which every installation carries, and a
byte-level BPE tokenizer trained on them. For debugging and first runs; no download."""

import json
import tempfile
from pathlib import Path
from typing import Any

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.plan import Plan

PYTHON_DOCS = "python_docs"
_BOS, _EOS = "<|begin_of_text|>", "<|end_of_text|>"


def prepare_assets(run: RunDirectory, plan: Plan) -> None:
    """Write text and tokenizer into the run, once: another Python on a later attempt may carry other pages."""
    if PYTHON_DOCS not in (plan.data["dataset"], plan.data["tokenizer"]) or run.assets_folder.is_dir():
        return
    texts = _topics()
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".assets.") as temporary:
        folder = Path(temporary) / "assets"
        folder.mkdir(mode=0o777)
        (folder / "python_docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        _train_tokenizer(texts, plan.data["tokenizer_vocab_size"], folder / "tokenizer")
        folder.rename(run.assets_folder)


def register() -> None:
    """Make `python_docs` a dataset that torchtitan's data loader knows."""
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS

    DATASETS[PYTHON_DOCS] = DatasetConfig(path="", loader=_load, sample_processor=lambda sample: sample["text"])


def _load(path: str) -> Any:
    from datasets import Dataset

    with Path(path).open() as file:
        return Dataset.from_list([json.loads(line) for line in file])


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": _BOS, "eos_token": _EOS}))
