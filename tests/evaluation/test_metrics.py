"""Scores against the published code's, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refine_mcore.errors import UserError
from refine_mcore.evaluation.metrics import score


def test_every_row_of_the_published_code(golden: Path) -> None:
    reference = json.loads((golden / "metrics.json").read_text())
    assert len(reference["rows"]) == 173
    for row in reference["rows"]:
        found = score(row["task"], row["response"], row["answers"])
        assert found == pytest.approx(row["score"], abs=1e-9), row


def test_references_are_compared_whole(golden: Path) -> None:
    """Where the published code cuts them at a bar."""
    for row in json.loads((golden / "metrics.json").read_text())["pipe_rows"]:
        found = score(row["task"], row["response"], row["answers_stored"])
        assert found == pytest.approx(row["score_without_split"], abs=1e-9), row
        cut = score(row["task"], row["response"], row["answers_passed"])
        assert cut == pytest.approx(row["score"], abs=1e-9), row


def test_needles(golden: Path) -> None:
    for row in json.loads((golden / "niah_scores.json").read_text()):
        assert score("niah_multiquery", row["response"], row["outputs"]) == row["score"], row


def test_bad_rows() -> None:
    with pytest.raises(UserError, match="no metric is known for task 'mmlu'; known: narrativeqa"):
        score("mmlu", "x", ["x"])
    with pytest.raises(UserError, match="task trec: a row without reference answers"):
        score("trec", "x", [])
