"""Texts packed whole into rows: of documents, and of prompts with answers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_mcore.config import DataConfig
from refine_mcore.data import build_examples, build_packed
from refine_mcore.data.packing import pack, packed
from refine_mcore.errors import UserError
from tests.data.test_windows import CodePoints

SHORTEST = 3


def write_corpus(path: Path, texts: list[str]) -> DataConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(paths=(str(path),), sequence_length=8, seed=7, packing="documents")


def documents_of(batch: dict[str, torch.Tensor]) -> list[list[str]]:
    """The texts of each row, by their numbers."""
    rows = []
    for tokens, mask, numbers in zip(
        batch["tokens"], batch["mask"], batch["documents"], strict=True
    ):
        assert torch.equal(numbers, numbers.cummax(0).values) and numbers[0] == 0
        texts = [tokens[mask & (numbers == n)].tolist() for n in numbers.unique()]
        rows.append(["".join(map(chr, text)) for text in texts])
    return rows


@given(st.integers(1, 50).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n)))))
def test_every_text_is_packed_once_and_no_row_could_have_been_spared(case):
    size, lengths = case
    rows = pack(lengths, size)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    filled = [sum(lengths[text] for text in row) for row in rows]
    assert all(0 < tokens <= size for tokens in filled)
    for later, row in enumerate(rows):
        assert all(tokens + lengths[row[0]] > size for tokens in filled[:later])


def test_the_fullest_row_that_holds_a_text_takes_it():
    assert pack([6, 5, 4, 3, 1, 1], 10) == [[0, 2], [1, 3, 4, 5]]
    assert pack([7, 8, 2, 1], 10) == [[1, 2], [0, 3]]


def test_many_short_texts_leave_little_empty():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(2000, generator=generator) ** 3 * 1000 + 1).int().tolist()
    rows = pack(lengths, 1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.97


def test_rows_are_padded_behind_their_last_text():
    batch = packed([[[5, 6], [7]], [[1, 2, 3, 4]]], 4)
    assert batch["tokens"].tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]
    assert batch["mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert batch["documents"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_documents_of_all_lengths_share_windows(tmp_path):
    texts = ["abcdefghijkl", "mno", "", "pqrstuvw", "x", "yz", "ABCDEFGHI", "01"]
    config = write_corpus(tmp_path / "a.jsonl", texts)
    dataset = build_packed(config, CodePoints(), 128, tmp_path / "data", shortest=2)
    rows = documents_of(dataset.batch(range(len(dataset))))
    # three full windows, and the rest of one document with others; a single token predicts nothing
    assert Counter(text for row in rows for text in row) == Counter(
        ["abcdefgh", "ABCDEFGH", "pqrstuvw", "ijkl", "mno", "yz", "01"]
    )
    assert dataset.origin.startswith(f"{len(rows)} windows of 8 tokens packed of 8 documents")
    again = documents_of(dataset.batch(range(len(dataset), 2 * len(dataset))))
    assert sorted(again) == sorted(rows) and again != rows


def test_windows_without_a_document_to_roll_out_in_are_left_out(tmp_path):
    config = write_corpus(tmp_path / "a.jsonl", ["abcdefg", "hi", "jk", "lm"])
    dataset = build_packed(config, CodePoints(), 128, tmp_path / "data", SHORTEST)
    assert documents_of(dataset.batch([0])) == [["abcdefg"]] and len(dataset) == 1
    assert "1 of documents below 3 tokens left out" in dataset.origin
    everything = build_packed(config, CodePoints(), 128, tmp_path / "data", 2)
    assert len(everything) == 2


def test_documents_that_are_all_too_short(tmp_path):
    config = write_corpus(tmp_path / "a.jsonl", ["ab", "c"])
    with pytest.raises(UserError) as error:
        build_packed(config, CodePoints(), 128, tmp_path / "data", SHORTEST)
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl: no document is as long as refine.margin_left + refine.margin_right "
        f"(3 tokens), the longest is {tmp_path}/a.jsonl:1 with 2"
    )


def test_examples_share_rows_with_targets_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    examples = [("abcd", "e"), ("fg", "hi"), ("jk", "l"), ("mnopqr", "s")]
    path.write_text("".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in examples))
    config = DataConfig(
        paths=(str(path),), sequence_length=10, max_answer_tokens=2, packing="documents"
    )
    dataset = build_examples(config, CodePoints(), 128, 1)
    batch = dataset.batch(range(len(dataset)))
    assert len(dataset) == 2 and dataset.origin == f"2 rows packed of 4 examples from {path}"
    found = [text for row in documents_of(batch) for text in row]
    assert sorted(found) == sorted(prompt + answer for prompt, answer in examples)
    answers = documents_of(batch | {"mask": batch["mask"] & batch["targets"]})
    assert sorted(a for row in answers for a in row) == sorted(a for _, a in examples)
    # without packing a row each, and no documents
    alone = build_examples(replace(config, packing="none"), CodePoints(), 128, 1)
    assert len(alone) == 4 and alone.batch([0]).keys() == {"tokens", "mask", "targets"}
