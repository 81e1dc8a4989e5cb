"""Windows: one document each, every one once an epoch, the same order in every layout."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_mcore.config import DataConfig, load_config
from refine_mcore.data import (
    LongDocumentWindows,
    batch_iterator,
    build_dataset,
    load_tokenizer,
)
from refine_mcore.errors import UserError
from refine_mcore.training.setup import resolve_architecture
from tests.training.jobs import ROOT


class CodePoints:
    """Tokenizer whose ids are the characters' code points."""

    vocab_size, eos_id = 128, -1
    special_ids: frozenset[int] = frozenset()

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def texts_to_ids(self, texts: list[str]) -> list[list[int]]:
        return list(map(self.text_to_ids, texts))

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def write_corpus(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(paths=(str(path),), sequence_length=4, seed=7)


def contents(dataset: LongDocumentWindows, epoch: int = 0) -> list[str]:
    samples = range(epoch * len(dataset), (epoch + 1) * len(dataset))
    return ["".join(map(chr, dataset[sample].tolist())) for sample in samples]


def numbered(count: int, length: int = 3, seed: int = 0) -> LongDocumentWindows:
    """A data set whose window i is filled with i."""
    return LongDocumentWindows(np.arange(count, dtype=np.int32)[:, None].repeat(length, 1), seed)


def test_windows_lie_in_one_document_and_remainders_are_dropped(tmp_path):
    config = write_corpus(tmp_path / "a.jsonl", ["abcdefgh", "ij", "klmnop", "", "qrst"])
    dataset = build_dataset(config, CodePoints(), 128, tmp_path / "data")
    assert sorted(contents(dataset)) == ["abcd", "efgh", "klmn", "qrst"]
    assert (len(dataset), dataset.sequence_length) == (4, 4)
    assert dataset[0].dtype == torch.int64 and dataset[0].shape == (4,)
    assert dataset.origin == "4 windows of 4 tokens from 3 of 5 documents, 2 are too short"


def test_text_too_short_names_file_and_lengths(tmp_path):
    config = write_corpus(tmp_path / "a.jsonl", ["a", "bcd"])
    with pytest.raises(UserError) as error:
        build_dataset(config, CodePoints(), 128, tmp_path / "data")
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl: no document is as long as data.sequence_length (4 tokens), "
        f"the longest is {tmp_path}/a.jsonl:2 with 3"
    )


def test_tokenizer_of_another_model(tmp_path, monkeypatch):
    """By its size; vocabularies may be padded, by so many rows and no more."""
    config = write_corpus(tmp_path / "a.jsonl", ["abcd", "wxyz"])
    monkeypatch.chdir(tmp_path)
    Path("some.model").touch()
    config = replace(config, tokenizer="some.model", unused_vocabulary=3)
    for fits in (128, 131):
        assert len(build_dataset(config, CodePoints(), fits, tmp_path / "data")) == 2
    refusal = "tokenizer some.model is not the model's: it has 128 pieces, the model a "
    for vocab_size, rest in (
        (127, "vocabulary of 127"),
        (132, "vocabulary of 132 and data.unused_vocabulary allows 3 more than there are pieces"),
    ):
        with pytest.raises(UserError) as error:
            build_dataset(config, CodePoints(), vocab_size, tmp_path / "data")
        assert str(error.value) == refusal + rest


@given(count=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_epoch_is_a_permutation(count, seed):
    dataset = numbered(count, seed=seed)
    for epoch in (0, 1, 5):
        drawn = [int(dataset[epoch * count + i][0]) for i in range(count)]
        assert sorted(drawn) == list(range(count))


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[int]:
        dataset = numbered(50, seed=seed)
        return [int(dataset[epoch * 50 + i][0]) for i in range(50)]

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert order(1, 1) == orders[1]
    dataset = numbered(50, seed=1)
    backwards = [int(dataset[sample][0]) for sample in reversed(range(100))]
    assert backwards == [*reversed(orders[1]), *reversed(orders[0])]


@given(
    micro_batch=st.integers(1, 4),
    data_parallel=st.integers(1, 4),
    per_rank=st.integers(1, 3),
    steps=st.integers(1, 4),
)
def test_a_step_takes_the_same_samples_in_every_layout(micro_batch, data_parallel, per_rank, steps):
    dataset = numbered(11)
    size = micro_batch * data_parallel * per_rank
    ranks = [
        batch_iterator(dataset, 0, micro_batch, rank, data_parallel)
        for rank in range(data_parallel)
    ]
    for step in range(steps):
        batches = [next(rank) for _ in range(per_rank) for rank in ranks]
        samples = torch.cat([batch["sample_index"] for batch in batches])
        tokens = torch.cat([batch["tokens"] for batch in batches])
        assert samples.tolist() == list(range(step * size, (step + 1) * size))
        assert torch.equal(tokens, torch.stack([dataset[int(sample)] for sample in samples]))


@given(consumed=st.integers(0, 30), rank=st.integers(0, 1))
def test_resuming_continues_exactly(consumed, rank):
    dataset = numbered(7)
    # One run to the end, and one that stops after `consumed` rounds of 2 ranks x 2 sequences.
    whole = itertools.islice(batch_iterator(dataset, 0, 2, rank, 2), consumed, consumed + 5)
    resumed = batch_iterator(numbered(7), consumed * 4, 2, rank, 2)
    for expected, batch in zip(whole, resumed, strict=False):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_batches_have_the_promised_shapes():
    batch = next(batch_iterator(numbered(5), 3, 2))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "tokens": (torch.int64, (2, 3)),
        "mask": (torch.bool, (2, 3)),
        "sample_index": (torch.int64, (2,)),
    }
    assert batch["mask"].all()
    assert batch["sample_index"].tolist() == [3, 4]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.yaml")))
def test_shipped_configurations_fit_their_tokenizers(path, monkeypatch, tmp_path):
    """Those that name one; all have a text as long as their windows."""
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        vocab_size = resolve_architecture(config).vocab_size
        assert len(build_dataset(config.data, tokenizer, vocab_size, tmp_path))
    else:
        assert not path.name.startswith(("demo", "bench")) and not config.data.paths
