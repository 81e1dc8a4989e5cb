"""What score.py writes for a reference model, against the outputs that the original code gave
(refine_mcore/evaluation/golden.py)."""

from __future__ import annotations

from pathlib import Path

from refine_mcore.evaluation.differences import broken
from refine_mcore.evaluation.golden import (
    ROLLOUT_TOKENS,
    Outputs,
    rollout_positions,
    text_a_differences,
    text_b_differences,
)
from tests.conversion.helpers import reference

# The two texts of every reference and the options that ask for all it holds of them.
TEXT_A = ("input_ids_a", "--gradients", "--rollout-tokens", str(ROLLOUT_TOKENS), "--greedy")
TEXT_B = ("input_ids_b", "--gradients")


def score_arguments(
    golden: Path, name: str, checkpoint: Path, output: Path, key: str, *options: str
) -> list[str]:
    """Command line of score.py for tokens `key` of reference `name`, imported as `checkpoint`."""
    folder = reference(golden, name)
    tokens = folder / "inputs.safetensors"
    files = {"--checkpoint": checkpoint, "--tokens": tokens, "--output": output}
    if (key, *options[: len(TEXT_A) - 1]) == TEXT_A:
        options = (*options, "--rollout-at", ",".join(map(str, rollout_positions(folder))))
    return [*(str(word) for pair in files.items() for word in pair), "--key", key, *options]


def assert_text_a(scored: Outputs, golden: Path, name: str) -> None:
    """Texts with their rollouts and gradients."""
    assert not [str(d) for d in broken(text_a_differences(scored, reference(golden, name)))]


def assert_text_b(scored: Outputs, golden: Path, name: str) -> None:
    """Other texts, with their gradients."""
    assert not [str(d) for d in broken(text_b_differences(scored, reference(golden, name)))]
