"""Converted models give the numbers of their Hugging Face originals, through the tools a user runs.

For each reference model: `convert_hf.py import`, then `score.py`. The same on several ranks is in
tests/distributed/test_score.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conversion.helpers import HYBRIDS, MODELS, reference, to_checkpoint
from tests.golden_scores import (
    TEXT_A,
    TEXT_B,
    Outputs,
    assert_text_a,
    assert_text_b,
    score_arguments,
)
from tools.score import main as score


@pytest.fixture(scope="module")
def checkpoint_of(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint_of(name)`: the reference model, imported once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            to_checkpoint(reference(golden, name), folder / name)
        return folder / name

    return get


@pytest.fixture
def score_model(golden: Path, tmp_path: Path, checkpoint_of) -> Callable[..., Outputs]:
    """`score_model(name, key, *options)`: what score.py writes for tokens `key` of a reference."""

    def run(name: str, key: str, *options: str) -> Outputs:
        output = tmp_path / f"scores-{len(list(tmp_path.iterdir()))}.safetensors"
        score(score_arguments(golden, name, checkpoint_of(name), output, key, *options))
        return load_file(output)

    return run


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_text_rollouts_and_gradients(golden, score_model, name: str) -> None:
    assert_text_a(score_model(name, *TEXT_A), golden, name)


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_longer_text(golden, score_model, name: str) -> None:
    assert_text_b(score_model(name, *TEXT_B), golden, name)


def test_log_probabilities_and_loss_are_those_of_the_logits(golden, score_model) -> None:
    scored = score_model("lact_lowrank_momentum", "input_ids_a")
    tokens = load_file(golden / "models" / "lact_lowrank_momentum" / "inputs.safetensors")
    log_probs = scored["logits"].double().log_softmax(-1)[:, :-1]
    targets = tokens["input_ids_a"][:, 1:, None]
    torch.testing.assert_close(
        scored["logprob"].double(), log_probs.gather(-1, targets)[..., 0], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(scored["loss"], -scored["logprob"].mean()[None])
    assert set(scored) == {"logits", "hidden", "entropy", "logprob", "loss"}


def test_drawn_rollouts_repeat_with_their_seed(score_model) -> None:
    options = ("--rollout-at", "14,83", "--rollout-tokens", "12")
    first = score_model("deltanet", "input_ids_a", *options)
    again = score_model("deltanet", "input_ids_a", *options)
    other = score_model("deltanet", "input_ids_a", *options, "training.seed=5")
    for position in (14, 83):  # 83: after the last token of the text
        key = f"rollout_t{position}.tokens"
        assert first[key].shape == (2, 12)
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], other[key])
        logits = first[f"rollout_t{position}.logits"]
        torch.testing.assert_close(logits[:, 0], first["logits"][:, position - 1])


def test_precision_is_chosen_by_override(score_model) -> None:
    exact = score_model("gated_deltanet", "input_ids_a", "training.dtype=float64")
    single = score_model("gated_deltanet", "input_ids_a")
    half = score_model("gated_deltanet", "input_ids_a", "training.dtype=bfloat16")
    assert exact["logits"].dtype == torch.float64
    assert (single["logits"] - exact["logits"]).abs().max() < 5e-5
    assert half["hidden"].dtype == torch.bfloat16
    assert 1e-4 < (half["loss"].double() - exact["loss"]).abs().item() < 0.1
