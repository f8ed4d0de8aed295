"""The order of the data is the run's, not the layout's: whoever draws it, from wherever, in whatever portions."""

import itertools
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.conftest import CommandLine
from tests.train.data_helpers import EPOCH, HuggingFaceTokenizer, Prepared, draw, hashes, prepare
from titan_slurm.train.dataloader import TokenDataLoader
from titan_slurm.train.tokens import TokenDataset

GLOBAL_BATCH = 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The built-in text, EPOCH samples of it."""
    return prepare(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def order(prepared: Prepared) -> list[str]:
    """Two epochs and a half as one rank draws them, one sample at a time."""
    return draw([prepared.loader(0, 1, 1)], 5 * EPOCH // 2)


def ranks_at(prepared: Prepared, samples: int, ranks: int, batch: int, **settings: object) -> list[TokenDataLoader]:
    loaders = [prepared.loader(rank, ranks, batch, **settings) for rank in range(ranks)]
    for loader in loaders:
        loader.load_state_dict({"samples": samples})
    return loaders


def test_every_epoch_has_every_sample_once_and_in_an_order_of_its_own(prepared: Prepared, order: list[str]) -> None:
    first, second = order[:EPOCH], order[EPOCH : 2 * EPOCH]
    dataset = TokenDataset(prepared.tokens, prepared.seq_len, prepared.tokenizer)
    unshuffled = [
        hashed for index in range(len(dataset)) for hashed in hashes(torch.utils.data.default_collate([dataset[index]]))
    ]
    assert len(set(unshuffled)) == EPOCH
    assert sorted(first) == sorted(second) == sorted(unshuffled)
    assert len({tuple(first), tuple(second), tuple(unshuffled)}) == 3


@pytest.mark.parametrize("start", [0, 7, EPOCH - 5])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_any_number_of_ranks_and_any_micro_batch_draw_the_same(
    prepared: Prepared, order: list[str], ranks: int, start: int
) -> None:
    for batch in (1, 2, 3, 4, 6, 12):
        if GLOBAL_BATCH % (ranks * batch):
            continue
        steps = 2 * GLOBAL_BATCH // (ranks * batch)
        assert draw(ranks_at(prepared, start, ranks, batch), steps) == order[start : start + 2 * GLOBAL_BATCH]


@pytest.mark.parametrize(("workers", "prefetch"), [(0, None), (1, None), (2, 5), (4, None)])
def test_the_position_is_that_of_the_trainer_and_not_of_workers_ahead(
    prepared: Prepared, order: list[str], workers: int, prefetch: int | None
) -> None:
    before = ranks_at(prepared, EPOCH - 7, 2, 1, num_workers=workers, prefetch_factor=prefetch)
    assert draw(before, 5) == order[EPOCH - 7 : EPOCH + 3]
    assert [loader.state_dict() for loader in before] == 2 * [{"samples": EPOCH + 3}]
    # On with other ranks, other micro-batches and other workers than before.
    after = ranks_at(prepared, EPOCH + 3, 3, 2, num_workers=2 - workers // 2)
    assert draw(after, 4) == order[EPOCH + 3 : EPOCH + 27]


def test_a_checkpoint_holds_the_position(prepared: Prepared, tmp_path: Path) -> None:
    (before,) = ranks_at(prepared, 0, 1, 4)
    draw([before], 3)
    dcp.save({"dataloader": before}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    after = prepared.loader(2, 4, 1)
    dcp.load({"dataloader": after}, checkpoint_id=tmp_path / "step-3", no_dist=True)
    assert after.state_dict() == {"samples": 12}


def test_data_that_ends_ends_for_all_ranks_at_the_same_draw(prepared: Prepared, order: list[str]) -> None:
    loaders = [prepared.loader(rank, 3, 2, infinite=False) for rank in range(3)]
    assert draw(loaders, 1000) == order[: EPOCH // 6 * 6]


@pytest.mark.parametrize("seq_len", [16, 256, 5000])
def test_samples_are_packed_as_torchtitan_packs_them(
    prepared: Prepared, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    texts = [json.loads(line) for line in (prepared.run.assets_folder / "python_docs.jsonl").read_text().splitlines()]
    known = DatasetConfig("", lambda _: Dataset.from_list(texts), lambda sample: sample["text"])
    monkeypatch.setitem(text_datasets.DATASETS, "known", known)
    theirs = list(text_datasets.HuggingFaceTextDataset("known", None, prepared.tokenizer, seq_len))
    ours = TokenDataset(prepared.tokens, seq_len, prepared.tokenizer)
    assert len(ours) == len(theirs) > 20
    for index, (inputs, labels) in enumerate(theirs):
        own_inputs, own_labels = ours[index]
        assert torch.equal(own_labels, labels)
        assert all(torch.equal(own_inputs[name], inputs[name]) for name in ("input", "positions"))


def test_too_little_data_for_one_step_is_an_error(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match=rf"{EPOCH} samples of \d+ tokens, fewer than one global batch of 129"):
        prepared.loader(0, 1, 1, global_batch_size=129)


def test_own_texts_are_read_in_the_order_of_their_files(prepared: Prepared, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    (texts / "a.jsonl").write_text('{"text": "one", "id": 1}\n{"text": ""}\n{"id": 2, "text": "two\\n"}\n')
    (texts / "b.txt").write_text("three\nthree\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["four", "5 " * 4000]}), texts / "more/c.parquet")
    (texts / "README.md").write_text("not a text to train on")
    tokenizer = prepared.run.assets_folder / "tokenizer"
    own = prepare(tmp_path, "data.dataset=text", f"data.dataset_path={texts}", f"data.tokenizer={tokenizer}")
    ids = [
        prepared.tokenizer.encode(text, add_bos=True, add_eos=True)
        for text in ("one", "", "two\n", "three\nthree\n", "four", "5 " * 4000)
    ]
    dataset = TokenDataset(own.tokens, 1, own.tokenizer)
    samples = [dataset[index] for index in range(len(dataset))]
    pairs = [(int(inputs["input"]), int(labels)) for inputs, labels in samples]
    assert pairs == [pair for document in ids for pair in itertools.pairwise(document)]
    # What one run has tokenized another may use, with the same tokenizer.
    settings = ("data.dataset=tokens", f"data.dataset_path={own.tokens}")
    (tmp_path / "again").mkdir()
    again = prepare(tmp_path / "again", *settings, f"data.tokenizer={tokenizer}")
    assert again.tokens == own.tokens
    assert not again.run.assets_folder.exists()


def test_tokens_of_another_tokenizer_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    folder = shutil.copytree(prepared.run.assets_folder / "tokenizer", tmp_path / "tokenizer")
    # The same vocabulary, but it no longer knows which of its words begin and end a document.
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        TokenDataset(prepared.tokens, 16, HuggingFaceTokenizer(tokenizer_path=str(folder)))


def test_a_line_that_is_no_document_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"content": "no text"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2 is not a line of JSON with a field"):
        prepare(tmp_path, "data.dataset=text", f"data.dataset_path={tmp_path / 'bad.jsonl'}")


def test_a_training_goes_on_with_other_ranks_and_another_layout(cli: CommandLine) -> None:
    def train(name: str, steps: int, *settings: str) -> dict[int, float]:
        small = ("seq_len=64", "batch_size=1", "global_batch_size=4", f"max_steps={steps}")
        words = [f"training.{word}" for word in small] + ["lr_schedule.total_steps=15", *settings]
        more = ["--resume"] if Path("runs", name).exists() else []
        done = cli.process(
            "submit", "llama3_debug", "--cluster", "local", "--follow", "--name", name, *more,
            *(word for setting in words for word in ("--set", setting)),
        )  # fmt: skip
        assert done.code == 0, done.out + done.err
        lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines}

    undisturbed = train("whole", 15, "data.num_workers=2")
    train("moved", 3)
    same_layout = train("moved", 5, "data.num_workers=2")
    assert same_layout == {step: undisturbed[step] for step in range(1, 6)}
    train("moved", 8, "slurm.tasks_per_node=4")
    train("moved", 11, "slurm.tasks_per_node=4", "parallelism.tensor_parallel=2")
    moved = train("moved", 15, "training.batch_size=2")
    assert moved == pytest.approx(undisturbed, abs=1e-4)
