"""Converted models give the numbers of their Hugging Face originals, through the tools a user runs.

For each reference model: `convert_hf.py import`, then `score.py`, against the outputs that the
original code gave (tests/golden/models/*/README.md says how they were made).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conversion.helpers import MODELS, to_checkpoint
from tools.score import main as score

Outputs = dict[str, Tensor]
POSITIONS = (14, 32, 61)


@pytest.fixture(scope="module")
def checkpoint_of(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint_of(name)`: the reference model, imported once."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            to_checkpoint(golden / "models" / name, folder / name)
        return folder / name

    return get


@pytest.fixture
def score_model(golden: Path, tmp_path: Path, checkpoint_of) -> Callable[..., Outputs]:
    """`score_model(name, key, *options)`: what score.py writes for tokens `key` of a reference."""

    def run(name: str, key: str, *options: str) -> Outputs:
        output = tmp_path / f"scores-{len(list(tmp_path.iterdir()))}.safetensors"
        tokens = golden / "models" / name / "inputs.safetensors"
        arguments = ["--checkpoint", str(checkpoint_of(name)), "--tokens", str(tokens)]
        score([*arguments, "--key", key, "--output", str(output), *options])
        return load_file(output)

    return run


def reference(golden: Path, name: str) -> Outputs:
    return load_file(golden / "models" / name / "outputs.safetensors")


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Muon's Newton-Schulz iterations amplify rounding; the others agree to float32's noise."""
    tolerance = 2e-3 if "muon" in name else 5e-5
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_text_rollouts_and_gradients(golden, score_model, name: str) -> None:
    at = ",".join(map(str, POSITIONS))
    scored = score_model(
        name, "input_ids_a", "--rollout-at", at, "--rollout-tokens", "5", "--greedy", "--gradients"
    )
    expected = reference(golden, name)
    assert_close(scored["logits"], expected["logits_a"], name)
    assert_close(scored["hidden"], expected["hidden_last_a"], name)
    assert_close(scored["entropy"], expected["entropy_a"], name)
    assert_close(scored["loss"], expected["loss_a"], name)
    for position in POSITIONS:
        rollout = f"rollout_t{position}"
        assert torch.equal(scored[f"{rollout}.tokens"], expected[f"{rollout}.tokens"])
        assert_close(scored[f"{rollout}.logits"], expected[f"{rollout}.logits"], name)
    assert_gradients_close(scored, expected, "a", 1e-2 if "muon" in name else 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_longer_text(golden, score_model, name: str) -> None:
    """128 tokens, which the chunk sizes divide; of the hidden states the reference keeps 32."""
    scored = score_model(name, "input_ids_b", "--gradients")
    expected = reference(golden, name)
    assert_close(scored["logits"], expected["logits_b"], name)
    assert_close(scored["hidden"][:, -32:], expected["hidden_last_b_tail32"], name)
    assert_close(scored["entropy"], expected["entropy_b"], name)
    assert_close(scored["loss"], expected["loss_b"], name)
    assert_gradients_close(scored, expected, "b", 1e-2 if "muon" in name else 1e-4)


def assert_gradients_close(scored: Outputs, expected: Outputs, text: str, tolerance: float) -> None:
    """Every parameter's gradient, by its norm and whatever else the reference holds of it: all of
    it, or its head and its projection on cos(0), cos(1), ...; errors are relative to the norm."""
    prefix = f"gradnorm_{text}."
    names = {key.removeprefix(prefix) for key in expected if key.startswith(prefix)}
    assert {f"gradient.{name}" for name in names} == {k for k in scored if k.startswith("gradient")}
    for name in names:
        actual = scored[f"gradient.{name}"].double().flatten()
        norm = expected[prefix + name].double().item()
        assert norm > 0
        found = {
            "norm": actual.norm(),
            "proj": actual @ torch.arange(actual.numel(), dtype=torch.float64).cos(),
            "head": actual[:16],
            "": actual,
        }
        for part, value in found.items():
            if (stored := expected.get(f"grad{part}_{text}.{name}")) is not None:
                error = (value - stored.double().flatten()).norm().item() / norm
                assert error <= tolerance, f"{part or 'gradient'} of {name} is off by {error:.1e}"


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
