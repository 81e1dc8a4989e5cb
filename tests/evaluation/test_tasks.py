"""Needles in haystacks, and rows of files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from refine_mcore.data import load_tokenizer
from refine_mcore.errors import UserError
from refine_mcore.evaluation.metrics import score
from refine_mcore.evaluation.tasks import VARIANTS, Row, niah_rows, rows_of_files
from refine_mcore.evaluation.tasks.files import files_of

TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "examples/data/tokenizer.model")


class Letters:
    """A tokenizer of another kind: every character is a token."""

    vocab_size, eos_id = 2**16, -1
    special_ids: frozenset[int] = frozenset()

    def text_to_ids(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def texts_to_ids(self, texts: list[str]) -> list[list[int]]:
        return list(map(self.text_to_ids, texts))

    def ids_to_text(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def parts(row: Row, tokenizer: object = TOKENIZER) -> tuple[str, str]:
    """The haystack and the question of a prompt."""
    _, *context, question = tokenizer.ids_to_text(row.prompt).split("\n")  # type: ignore[attr-defined]
    return "\n".join(context), question


def retrieve(row: Row) -> str:
    """What a perfect reader answers, from the text alone."""
    context, question = parts(row)
    asked = re.findall(r"[a-z]+-[a-z]+", question.split("?")[0])
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", context)
    return " and ".join(value for key, value in found if key in asked)


@pytest.mark.parametrize("name", VARIANTS)
def test_needles_are_where_they_are_said_to_be(name: str) -> None:
    for length in (1024, 3000):
        for row in niah_rows(TOKENIZER, [length], 4, 3, [name]):
            variant = VARIANTS[name]
            assert 0.97 * length <= len(row.prompt) + row.max_new_tokens <= length
            context, _ = parts(row)
            # a needle may stand behind a sentence that was cut off
            between = r"(?<=[.?!]) | (?=One of the special)" if variant.prose else "\n"
            sentences = re.split(between, context)
            places = [i for i, x in enumerate(sentences) if x.startswith("One of the special")]
            needles = variant.keys * variant.values
            assert len(places) == needles
            asked = [i for i in places if any(f"{value}." in sentences[i] for value in row.answers)]
            assert len(asked) == len(row.answers) == variant.queries * variant.values
            before = min(asked) - places.index(min(asked))  # sentences that are no needles
            depth, hay = row.group["depth"], len(sentences) - needles
            if variant.prose:
                assert before == hay * depth // 100
            else:
                assert 0 <= before - hay * depth // 100 <= 1 + hay // 100 and before < hay
            assert score(name, retrieve(row), row.answers) == 1
            assert score(name, "", row.answers) == 0


def test_noise_is_the_harness_s(golden: Path) -> None:
    """Whole lines of it, with the needle before one of them."""

    def form(text: str) -> tuple[set[str], bool]:
        """The lines there are, without key and value, and whether the needle is within."""
        lines = re.sub(r"\d{7}", "N", re.sub(r"[a-z]+-[a-z]+", "K", text)).split("\n")
        (place,) = (i for i, line in enumerate(lines) if line.startswith("One of"))
        assert len(lines) > 10 and lines.count(lines[1 + (place == 1)]) == len(lines) - 3
        return set(lines), 0 < place < len(lines) - 2

    samples = json.loads((golden / "niah_prompts.json").read_text())
    forms = [form(sample["prompt_lm_eval"]) for sample in samples]
    rows = niah_rows(TOKENIZER, [1024], 60, 0, ["niah_single_1"])
    forms += [form(TOKENIZER.ids_to_text(row.prompt)) for row in rows]
    assert all(found == forms[0] for found in forms)
    depths = sorted(row.group["depth"] for row in rows)
    assert depths[0] < 10 and 40 < depths[30] < 60 and depths[-1] > 90


def test_samples_follow_from_the_seed_and_differ() -> None:
    first, again = (niah_rows(TOKENIZER, [1024], 6, 1, list(VARIANTS)) for _ in range(2))
    assert first == again
    assert len({row.answers for row in first}) == len(first)
    assert len({row.group["depth"] for row in first}) > 6
    assert niah_rows(TOKENIZER, [1024], 6, 2, list(VARIANTS)) != first
    assert niah_rows(TOKENIZER, [1024], 2, 1, list(VARIANTS)[1:])[:2] == first[6:8]


def test_any_tokenizer_will_do() -> None:
    (row,) = niah_rows(Letters(), [4096], 1, 0, ["niah_multikey_1"])
    assert 0.97 * 4096 <= len(row.prompt) + row.max_new_tokens <= 4096
    with pytest.raises(UserError, match="niah_multivalue does not fit into 300 tokens"):
        niah_rows(Letters(), [300], 1, 0, ["niah_multivalue"])


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SQUAD = {"prompt": "Who?", "answer": ["Ann", "Bob"], "task": "ruler_squadqa", "index": 3}
TREC = {"prompt": "Type?", "answers": ["City"], "task": "trec", "max_gen_tokens": 64}


def test_rows_of_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", SQUAD, SQUAD, SQUAD)
    parquet.write_table(pyarrow.Table.from_pylist([TREC]), tmp_path / "b.parquet")
    (tmp_path / "notes.txt").write_text("no data")
    found = rows_of_files([str(tmp_path)], TOKENIZER, ["ruler_squadqa", "trec"], rows=2)
    assert [(row.task, row.key, row.max_new_tokens, row.one_line) for row in found] == [
        ("ruler_squadqa", f"{tmp_path / 'a.jsonl'}:0", 32, True),
        ("ruler_squadqa", f"{tmp_path / 'a.jsonl'}:1", 32, True),
        ("trec", f"{tmp_path / 'b.parquet'}:0", 64, False),
    ]
    assert found[0].answers == ("Ann", "Bob")
    assert TOKENIZER.ids_to_text(found[0].prompt) == "Who?"
    assert len(rows_of_files([str(tmp_path)], TOKENIZER, ["trec"])) == 1


def test_files_of_one_name_are_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        files.append(str(write(tmp_path / name / "a.jsonl", TREC, SQUAD | {"max_seq_length": 64})))
    found = rows_of_files(files, TOKENIZER, ["trec", "ruler_squadqa"])
    assert len({(row.task, row.key) for row in found}) == len(found) == 4
    assert [row.file for row in found] == [files[0]] * 2 + [files[1]] * 2
    assert [row.group for row in found] == [{}, {"length": 64}] * 2
    (record,) = caplog.records  # lengths that nobody has told might be mixed
    assert "the rows of trec, without 'max_seq_length'" in record.getMessage()
    assert record.getMessage().endswith(f"2 files: {files[0]}, {files[1]}")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "x", "answers": ["y"]}, "a.jsonl:1 has no text in the field 'task'"),
        (TREC | {"task": "mmlu"}, "a.jsonl:1 is of the unknown task 'mmlu'; known: narrativeqa"),
        (TREC | {"max_seq_length": "4k"}, "a.jsonl:1 has no positive number in 'max_seq_length'"),
        (TREC | {"max_gen_tokens": 0}, "a.jsonl:1 has no positive number in 'max_gen_tokens'"),
        (
            TREC | {"prompt": "x " * 50},
            r"a.jsonl:1: the prompt has \d+ tokens, more than the 9 all",
        ),
        (TREC | {"answers": []}, "a.jsonl:1 has an empty answer in the field 'answers'"),
        (SQUAD, r"a.jsonl: no rows of trec"),
    ],
)
def test_bad_rows(row: dict[str, object], complaint: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", row))
    with pytest.raises(UserError, match=complaint):
        rows_of_files([path], TOKENIZER, ["trec"], longest=9)


def test_directories_need_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.parquet or \.jsonl files"):
        files_of([str(tmp_path)])
