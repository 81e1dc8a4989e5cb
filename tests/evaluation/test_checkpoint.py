"""What distinguishes the figures of one checkpoint, arithmetic and data from those of another, and
what ends a text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from refine_mcore.config import Config, config_from_dict
from refine_mcore.conversion.description import LATEST_FILE, write_description
from refine_mcore.data import load_tokenizer
from refine_mcore.errors import UserError
from refine_mcore.evaluation.checkpoint import arithmetic, end_tokens, identity
from refine_mcore.models.presets import preset
from refine_mcore.training.setup import with_one_checkpoint
from tests.data.test_windows import CodePoints
from tests.training.jobs import TOKENIZER

SENTENCEPIECE = load_tokenizer(TOKENIZER)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of two iterations without weights, of which the first is the newest."""
    for iteration in (2, 4):
        directory = tmp_path / "checkpoints" / f"iter_{iteration:07d}"
        (directory / "hf").mkdir(parents=True)
        write_description(directory, preset("tiny-lact"))
    (tmp_path / "checkpoints" / LATEST_FILE).write_text("2")
    return tmp_path / "checkpoints"


def config(checkpoints: Path, *overrides: str) -> Config:
    settings = {"model": {"checkpoint": str(checkpoints)}, "training": {"dtype": "float32"}}
    return config_from_dict(settings, "a test", list(overrides))


def test_figures_of_something_else_have_another_identity(
    checkpoints: Path, tmp_path: Path, single_rank: Any
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("1")

    def now(*overrides: str, tokenizer: Any = SENTENCEPIECE, files: tuple[Path, ...] = ()) -> str:
        opened = with_one_checkpoint(config(checkpoints, *overrides))
        found = identity(opened, tokenizer, (rows, *files))
        return json.dumps(found)

    first = now()
    others = [
        now("training.dtype=bfloat16"),
        now("model.overrides={mixer.muon_dtype: bfloat16}"),
        now("model.overrides={mixer.window_size: 8}"),
        now("model.fast_weight_matmul=bfloat16"),
        now(tokenizer=CodePoints()),
        now(files=(TOKENIZER,)),
    ]
    assert now() == first
    rows.write_text("12")
    others.append(now())
    (checkpoints / "iter_0000002" / "hf" / "generation_config.json").write_text("{}")
    others.append(now())
    (checkpoints / LATEST_FILE).write_text("4")
    others.append(now())
    assert len({first, *others}) == 10
    with pytest.raises(UserError, match=r"cannot read .*missing\.jsonl: No such file"):
        now(files=(tmp_path / "missing.jsonl",))


def test_what_was_opened_stays_that_when_the_run_saves_again(
    checkpoints: Path, single_rank: Any
) -> None:
    opened = with_one_checkpoint(config(checkpoints))
    before = identity(opened, SENTENCEPIECE, ())
    (checkpoints / LATEST_FILE).write_text("4")
    assert identity(with_one_checkpoint(opened), SENTENCEPIECE, ()) == before
    assert opened.model.checkpoint == str(checkpoints / "iter_0000002")


def test_the_arithmetic_is_named(checkpoints: Path) -> None:
    assert arithmetic(config(checkpoints, "model.overrides={mixer.use_muon: true}")) == {
        "training.dtype": "float32",
        "model.fast_weight_matmul": "float32",
        "mixer.muon_dtype": "float32",
    }


@pytest.mark.parametrize(
    ("content", "ends"),
    [(None, {2}), ({}, {2}), ({"eos_token_id": 5}, {2, 5}), ({"eos_token_id": [7, 9]}, {2, 7, 9})],
)
def test_texts_end_where_tokenizer_and_settings_say(
    content: Any, ends: set[int], tmp_path: Path
) -> None:
    (tmp_path / "hf").mkdir()
    if content is not None:
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(content))
    assert end_tokens(SENTENCEPIECE, tmp_path) == ends
    assert end_tokens(CodePoints(), tmp_path) == ends - {2}


@pytest.mark.parametrize("value", ["</s>", [1, None], -1, True, 1.0, {"a": 1}])
def test_bad_ends_are_refused(value: Any, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"config\.json: eos_token_id must be a token id or a list"):
        end_tokens(SENTENCEPIECE, tmp_path)


def test_texts_without_an_end_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not end_tokens(CodePoints(), tmp_path)
        assert end_tokens(SENTENCEPIECE, tmp_path)
    (record,) = caplog.records
    assert "name a token that ends a text" in record.getMessage()
