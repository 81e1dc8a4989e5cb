"""Scores of a converted model (evaluation/score.py) against the outputs that the original code gave
for it: a folder of tests/golden/models or tests/golden/hybrids, whose README says what each tensor
is."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from refine_mcore.evaluation.differences import Difference, largest, unequal

Outputs = dict[str, Tensor]
ROLLOUT_TOKENS = 5


def rollout_positions(model: Path) -> list[int]:
    """Where the greedy rollouts of text A leave it."""
    with safe_open(model / "outputs.safetensors", "pt") as file:
        found = (re.fullmatch(r"rollout_t(\d+)\.tokens", key) for key in file.keys())  # noqa: SIM118
        return sorted(int(match[1]) for match in found if match)


def text_a_differences(scored: Outputs, model: Path) -> list[Difference]:
    """Texts with their rollouts and gradients, of the reference in folder `model`."""
    expected, limit = _reference(model), _value_limit(model)
    found = [
        largest("logits", scored["logits"], expected["logits_a"], limit),
        largest("hidden states", scored["hidden"], expected["hidden_last_a"], limit),
        largest("entropy", scored["entropy"], expected["entropy_a"], limit),
        largest("loss", scored["loss"], expected["loss_a"], limit),
    ]
    for position in rollout_positions(model):
        key = f"rollout_t{position}"
        found += [
            unequal(f"tokens at {position}", scored[f"{key}.tokens"], expected[f"{key}.tokens"]),
            largest(
                f"logits of the rollouts at {position}",
                scored[f"{key}.logits"],
                expected[f"{key}.logits"],
                limit,
            ),
        ]
    return found + _gradient_differences(scored, expected, model, "a")


def text_b_differences(scored: Outputs, model: Path) -> list[Difference]:
    """Other texts, of which the reference may keep the last positions only."""
    expected, limit = _reference(model), _value_limit(model)
    hidden = next(value for key, value in expected.items() if key.startswith("hidden_last_b"))
    logits = expected["logits_b"]
    return [
        largest("logits", scored["logits"][:, -logits.shape[1] :], logits, limit),
        largest("hidden states", scored["hidden"][:, -hidden.shape[1] :], hidden, limit),
        largest("entropy", scored["entropy"], expected["entropy_b"], limit),
        largest("loss", scored["loss"], expected["loss_b"], limit),
        *_gradient_differences(scored, expected, model, "b"),
    ]


def _reference(model: Path) -> Outputs:
    return load_file(model / "outputs.safetensors")


def _value_limit(model: Path) -> float:
    """Muon's Newton-Schulz iterations amplify rounding, and the hybrids' reference computes in
    float32 what it is an approximation of by up to 1.1e-4; the others agree to float32's noise."""
    if model.parent.name == "hybrids":
        return 5e-4
    return 2e-3 if "muon" in model.name else 5e-5


def _gradient_differences(
    scored: Outputs, expected: Outputs, model: Path, text: str
) -> list[Difference]:
    """Every parameter's gradient, by its norm and whatever else the reference holds of it: all of
    it, or its head and its projection on cos(0), cos(1), ...; errors are relative to the norm."""
    limit = 1e-2 if "muon" in model.name else 1e-4
    if model.parent.name == "hybrids":
        limit = 1e-3
    prefix = f"gradnorm_{text}."
    names = {key.removeprefix(prefix) for key in expected if key.startswith(prefix)}
    scored_names = {key.removeprefix("gradient.") for key in scored if key.startswith("gradient.")}
    found = [Difference("gradients missing or too many", len(names ^ scored_names), 0.0)]
    for name in sorted(names & scored_names):
        actual = scored[f"gradient.{name}"].double().flatten()
        norm = expected[prefix + name].double().item()
        assert norm > 0
        parts = {
            "norm": actual.norm(),
            "proj": actual @ torch.arange(actual.numel(), dtype=torch.float64).cos(),
            "head": actual[:16],
            "": actual,
        }
        for part, value in parts.items():
            if (stored := expected.get(f"grad{part}_{text}.{name}")) is not None:
                error = (value - stored.double().flatten()).norm().item() / norm
                found.append(Difference(f"{part or 'whole'} gradient of {name}", error, limit))
    return found
