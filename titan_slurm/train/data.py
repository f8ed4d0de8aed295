"""What a run trains on, prepared once into the run's own folder: texts become a file of token ids.

The built-in text is CPython's own reference pages on language topics, which every installation carries, with a
byte-level BPE tokenizer trained on them: for debugging and first runs, with no download.
"""

import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from titan_slurm.run.directory import RunDirectory
from titan_slurm.run.files import sync_directory
from titan_slurm.run.plan import Plan
from titan_slurm.train.tokens import write_tokens

PYTHON_DOCS, TEXT, TOKENS = "python_docs", "text", "tokens"
_BOS, _EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Texts tokenized at once by all processes: enough to keep them busy, few enough to hold in memory.
_BLOCK = 512
_LONGEST_PART = 1 << 20


def prepare_assets(run: RunDirectory, plan: Plan) -> None:
    """Write text, tokenizer and tokens into the run, once: on a later attempt the text may be another.

    Raises ValueError if the data cannot be read, naming the file.
    """
    dataset, tokenizer = plan.data["dataset"], plan.data["tokenizer"]
    if run.assets_folder.is_dir() or not (PYTHON_DOCS in (dataset, tokenizer) or dataset == TEXT):
        return
    partial = RunDirectory(run.path / ".partial")
    shutil.rmtree(partial.path, ignore_errors=True)
    partial.assets_folder.mkdir(parents=True)
    if PYTHON_DOCS in (dataset, tokenizer):
        texts = _topics()
        _built_in_text(partial).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if tokenizer == PYTHON_DOCS:
        _train_tokenizer(texts, plan.data["tokenizer_vocab_size"], Path(tokenizer_folder(partial, plan)))
    if dataset in (PYTHON_DOCS, TEXT):
        source = _built_in_text(partial) if dataset == PYTHON_DOCS else Path(plan.data["dataset_path"])
        _tokenize(source, tokenizer_folder(partial, plan), Path(tokens_folder(partial, plan)))
    partial.assets_folder.rename(run.assets_folder)
    partial.path.rmdir()
    sync_directory(run.path)


def tokenizer_folder(run: RunDirectory, plan: Plan) -> str:
    """Where the run's tokenizer lies."""
    built_in = plan.data["tokenizer"] == PYTHON_DOCS
    return str(run.assets_folder / "tokenizer") if built_in else str(plan.data["tokenizer"])


def tokens_folder(run: RunDirectory, plan: Plan) -> str:
    """Where the run's tokens lie, if its dataset is one that is tokenized once."""
    return str(plan.data["dataset_path"]) if plan.data["dataset"] == TOKENS else str(run.assets_folder / "tokens")


def _built_in_text(run: RunDirectory) -> Path:
    return run.assets_folder / "python_docs.jsonl"


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
    # Without its class, transformers would take it for the one that belongs to the kind of model.
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _BOS, "eos_token": _EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def _tokenize(source: Path, tokenizer_path: str, folder: Path) -> None:
    # torchtitan's, not transformers': whether BOS and EOS are added has to be as in training.
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(tokenizer_path=tokenizer_path)
    write_tokens(folder, _encoded(_texts(source), tokenizer), tokenizer)


def _encoded(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each text, in order, computed by as many processes as this one has cores."""
    cores, fork = len(os.sched_getaffinity(0)), multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cores, fork, initializer=_take_tokenizer, initargs=(tokenizer,)) as processes:
        while block := list(itertools.islice(texts, _BLOCK)):
            yield from processes.map(_encode, block, chunksize=8)


# Of a process that tokenizes: a large vocabulary is too slow to be sent with every text.
_tokenizer: Any = None


def _take_tokenizer(tokenizer: Any) -> None:
    global _tokenizer
    _tokenizer = tokenizer


def _encode(text: str) -> list[int]:
    ids: list[int] = _tokenizer.encode(text, add_bos=True, add_eos=True)
    return ids


def _texts(source: Path) -> Iterator[str]:
    """The documents of a file, or of all files in a folder in the order of their names."""
    files = sorted(path for path in source.rglob("*") if path.suffix in _READERS) if source.is_dir() else [source]
    for file in files:
        for text in _READERS[file.suffix](file):
            if not isinstance(text, str):
                raise ValueError(f"{file} has {text!r} where a text should be")
            yield text


def _json_lines(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f'{file}:{number} is not a line of JSON with a field "text"') from None


def _plain_text(file: Path) -> Iterator[str]:
    """One document; a long file is cut at line ends, so that it need not fit into memory."""
    with file.open(encoding="utf-8") as text:
        while lines := text.readlines(_LONGEST_PART):
            yield "".join(lines)


def _parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"]):
        yield from batch.column("text").to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _json_lines,
    ".txt": _plain_text,
    ".parquet": _parquet,
}
