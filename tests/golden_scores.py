"""What score.py writes for a reference model, against the outputs that the original code gave
(tests/golden/models/*/README.md)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Outputs = dict[str, Tensor]
POSITIONS = (14, 32, 61)
# The two texts of every reference and the options that ask for all it holds of them.
TEXT_A = (
    *("input_ids_a", "--gradients", "--rollout-at", ",".join(map(str, POSITIONS))),
    *("--rollout-tokens", "5", "--greedy"),
)
TEXT_B = ("input_ids_b", "--gradients")


def score_arguments(
    golden: Path, name: str, checkpoint: Path, output: Path, key: str, *options: str
) -> list[str]:
    """Command line of score.py for tokens `key` of reference `name`, imported as `checkpoint`."""
    tokens = golden / "models" / name / "inputs.safetensors"
    files = {"--checkpoint": checkpoint, "--tokens": tokens, "--output": output}
    return [*(str(word) for pair in files.items() for word in pair), "--key", key, *options]


def assert_text_a(scored: Outputs, golden: Path, name: str) -> None:
    """Two texts of 83 tokens, their rollouts and gradients."""
    expected = _reference(golden, name)
    assert_close(scored["logits"], expected["logits_a"], name)
    assert_close(scored["hidden"], expected["hidden_last_a"], name)
    assert_close(scored["entropy"], expected["entropy_a"], name)
    assert_close(scored["loss"], expected["loss_a"], name)
    for position in POSITIONS:
        rollout = f"rollout_t{position}"
        assert torch.equal(scored[f"{rollout}.tokens"], expected[f"{rollout}.tokens"])
        assert_close(scored[f"{rollout}.logits"], expected[f"{rollout}.logits"], name)
    _assert_gradients_close(scored, expected, name, "a")


def assert_text_b(scored: Outputs, golden: Path, name: str) -> None:
    """128 tokens, which the chunk sizes divide; of the hidden states the reference keeps 32."""
    expected = _reference(golden, name)
    assert_close(scored["logits"], expected["logits_b"], name)
    assert_close(scored["hidden"][:, -32:], expected["hidden_last_b_tail32"], name)
    assert_close(scored["entropy"], expected["entropy_b"], name)
    assert_close(scored["loss"], expected["loss_b"], name)
    _assert_gradients_close(scored, expected, name, "b")


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Muon's Newton-Schulz iterations amplify rounding; the others agree to float32's noise."""
    tolerance = 2e-3 if "muon" in name else 5e-5
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def _reference(golden: Path, name: str) -> Outputs:
    return load_file(golden / "models" / name / "outputs.safetensors")


def _assert_gradients_close(scored: Outputs, expected: Outputs, name: str, text: str) -> None:
    """Every parameter's gradient, by its norm and whatever else the reference holds of it: all of
    it, or its head and its projection on cos(0), cos(1), ...; errors are relative to the norm."""
    tolerance = 1e-2 if "muon" in name else 1e-4
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
