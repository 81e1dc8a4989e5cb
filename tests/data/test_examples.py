"""Prompts with answers: read from both formats, padded behind, in an order that is the windows'."""

from __future__ import annotations

import json
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from refine_mcore.config import DataConfig
from refine_mcore.data import (
    LongDocumentWindows,
    ShuffledExamples,
    TokenizedExample,
    batch_iterator,
    build_examples,
    read_examples,
    tokenize_examples,
)
from refine_mcore.errors import UserError
from tests.data.test_windows import CodePoints, numbered
from tests.distributed.harness import run_distributed

ROWS = [
    {"prompt": "what is it", "answers": ["a cat", "cat"], "task": "qa", "max_gen_tokens": 32},
    {"prompt": "and this", "answers": ["dog"], "task": "qa", "max_gen_tokens": 64},
]


class WithEnd(CodePoints):
    eos_id = 3


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(path: str, **options: Any) -> DataConfig:
    return DataConfig(paths=(path,), **{"sequence_length": 24, "max_answer_tokens": 8} | options)


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    of_lines, of_table = (list(read_examples([path])) for path in (lines, tmp_path / "a.parquet"))
    for line, row, expected in zip(of_lines, of_table, ROWS, strict=True):
        assert line.prompt == row.prompt == expected["prompt"]
        assert list(line.answers) == list(row.answers) == expected["answers"]
        assert line.row == row.row == expected
    assert [item.origin for item in of_lines] == [f"{lines}:1", f"{lines}:2"]
    assert of_table[1].origin == f"{tmp_path / 'a.parquet'}: row 2"


@pytest.mark.parametrize(
    "field",
    [
        {"answer": "x"},
        {"answer": ["x", "y"]},
        {"answers": "x"},
        {"answers": None, "answer": "x"},
        {"answers": ["x"], "answer": None},
    ],
)
def test_references_by_either_name(tmp_path: Path, field: dict[str, Any]) -> None:
    (example,) = read_examples([write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p"} | field])])
    assert example.answers[0] == "x"


def test_only_parquet_takes_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert list(read_examples([write_jsonl(tmp_path / "a.jsonl", ROWS)]))
    with pytest.raises(UserError, match=r"a\.parquet: reading \.parquet takes pyarrow"):
        list(read_examples([tmp_path / "a.parquet"]))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "p"}, ":1 has no text, or list of texts, in a field 'answer' or 'answers'"),
        ({"prompt": "p", "answer": 3}, ":1 has no text, or list of texts, in a field 'answer'"),
        ({"prompt": "p", "answers": ["a", 3]}, ":1 has no text, or list of texts"),
        ({"prompt": "p", "answer": " "}, ":1 has an empty answer in the field 'answer'"),
        ({"prompt": "p", "answers": []}, ":1 has an empty answer in the field 'answers'"),
        ({"answer": "a"}, ":1 has no text in the field 'prompt'"),
        ({"prompt": "\n", "answer": "a"}, ":1 has no text in the field 'prompt'"),
        ([1], ":1 has no text in the field 'prompt'"),
        (
            {"prompt": "seventeen letters", "answer": "a"},
            ":1: the prompt has 17 tokens, more than the 16 that data.sequence_length (24) leaves",
        ),
        ({"prompt": "p", "answer": "a"}, ":1: the prompt has 1 tokens, the rollouts of"),
    ],
)
def test_bad_examples_are_named(tmp_path: Path, row: Any, complaint: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as error:
        tokenize_examples(settings(path), CodePoints(), 128, shortest_prompt=2)
    assert str(error.value).startswith(path + complaint)
    assert "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "cut.jsonl").write_text('{"prompt": ')
    parquet.write_table(pyarrow.table({"prompt": ["p"]}), tmp_path / "lacks.parquet")
    for name, complaint in {
        "a.txt": "a.txt: examples are read from .jsonl and .parquet files only",
        "bad.parquet": "bad.parquet is not a readable parquet file",
        "empty.jsonl": "empty.jsonl: holds no examples",
        "cut.jsonl": "cut.jsonl:1: the line is not valid JSON in UTF-8",
        "none.jsonl": "none.jsonl: No such file or directory",
        "none.parquet": "none.parquet: No such file or directory",
        "lacks.parquet": "row 1 has no text, or list of texts, in a field 'answer' or 'answers'",
    }.items():
        with pytest.raises(UserError) as error:
            list(read_examples([tmp_path / name]))
        assert str(error.value).endswith(complaint), name


def column(kind: pyarrow.DataType, values: list[Any], stored: pyarrow.DataType) -> pyarrow.Array:
    """Values of one kind that are said to be of another, as faulty writers leave them."""
    array = pyarrow.array(values, type=stored)
    return pyarrow.Array.from_buffers(kind, len(array), array.buffers())


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            column(pyarrow.string(), [b"p", b"\xff"], pyarrow.binary()),
            "'utf-8' codec can't decode byte 0xff in position 0",
        ),
        (column(pyarrow.timestamp("ns"), [0, 1], pyarrow.int64()), "Nanosecond resolution"),
        (column(pyarrow.timestamp("us"), [0, 1 << 62], pyarrow.int64()), "date value out of"),
    ],
)
def test_values_that_cannot_be_read_are_named(
    tmp_path: Path, values: pyarrow.Array, complaint: str
) -> None:
    table = pyarrow.table({"prompt": ["p", "q"], "answer": ["a", "b"], "other": values})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        list(read_examples([tmp_path / "a.parquet"]))
    assert str(error.value).startswith(f"{tmp_path}/a.parquet: row 2 cannot be read: {complaint}")


def test_a_damaged_parquet_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    whole = path.read_bytes()
    for place in (4, 5, 6, len(whole) - 20, len(whole) - 60):  # heads of pages, and the file's
        path.write_bytes(whole[:place] + b"\xff\xff" + whole[place + 2 :])
        with pytest.raises(UserError) as error:
            list(read_examples([path]))
        assert str(error.value) == f"{path} is not a readable parquet file"


def test_sequence_has_room_for_answers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        tokenize_examples(settings(path, max_answer_tokens=24), CodePoints(), 128)
    with pytest.raises(UserError, match="has no EOS"):
        tokenize_examples(settings(path, answer_eos=True), CodePoints(), 128)


def test_first_reference_is_the_target_and_padding_is_behind(tmp_path: Path) -> None:
    config = settings(write_jsonl(tmp_path / "a.jsonl", ROWS[:1]))
    examples = build_examples(config, CodePoints(), 128, 1)
    batch = examples.batch([0])
    text = "what is ita cat"
    assert batch["tokens"].tolist() == [[ord(letter) for letter in text] + [0] * 9]
    assert batch["mask"].tolist() == [[True] * 15 + [False] * 9]
    assert batch["targets"].tolist() == [[False] * 10 + [True] * 5 + [False] * 9]


@pytest.mark.parametrize(
    ("most", "answer"), [(8, "a cat\3"), (6, "a cat\3"), (5, "a cat"), (1, "a")]
)
def test_eos_is_one_of_an_answers_tokens(tmp_path: Path, most: int, answer: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    config = settings(path, answer_eos=True, max_answer_tokens=most)
    (example,) = tokenize_examples(config, WithEnd(), 128)
    assert "".join(map(chr, example.answer)) == answer


def plain(count: int, length: int, seed: int) -> ShuffledExamples:
    """Example i is i, answered by i."""
    tokens = [np.array([i], dtype=np.int32) for i in range(count)]
    return ShuffledExamples([TokenizedExample(ids, ids) for ids in tokens], length, seed)


@given(
    count=st.integers(1, 9),
    start=st.integers(0, 30),
    micro_batch=st.integers(1, 3),
    ranks=st.integers(1, 3),
)
def test_order_is_that_of_windows(count: int, start: int, micro_batch: int, ranks: int) -> None:
    """Whatever the layout, and from wherever a run goes on."""
    windows: LongDocumentWindows = numbered(count, length=2, seed=5)
    for rank in range(ranks):
        ours, theirs = (
            batch_iterator(dataset, start, micro_batch, rank, ranks)
            for dataset in (plain(count, 2, 5), windows)
        )
        for _ in range(4):
            a, b = next(ours), next(theirs)
            assert torch.equal(a["tokens"], b["tokens"])
            assert torch.equal(a["sample_index"], b["sample_index"])


def test_examples_take_as_much_memory_as_their_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": "語" * 20_000, "answer": "a", "title": "t" * 20_000}] * 10
    config = settings(write_jsonl(tmp_path / "a.jsonl", rows), sequence_length=20_008)
    tracemalloc.start()
    try:
        examples = tokenize_examples(config, CodePoints(), 128)
        assert tracemalloc.get_traced_memory()[0] < 4.2 * 10 * 20_000
    finally:
        tracemalloc.stop()
    assert examples[9].prompt.tolist() == [ord("語")] * 20_000


def test_ranks_share_examples(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p" * 1990, "answer": "answer"}] * 10)
    run_distributed(_share, 2, settings(path, sequence_length=2000))


def _share(config: DataConfig) -> None:
    """Without a collective in which every rank makes room for as much of every other."""
    gathered, gather = [], dist.all_gather_object

    def counted(found: list[Any], mine: Any) -> None:
        gathered.append(len(pickle.dumps(mine)))
        gather(found, mine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", counted)
        examples = build_examples(config, CodePoints(), 128, 1)
    assert 0 < max(gathered) < 100
    assert examples.batch([9])["tokens"][0, 1988:1992].tolist() == [112, 112, 97, 110]
