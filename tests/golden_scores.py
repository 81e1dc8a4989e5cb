"""What score.py writes for a reference model, against the outputs that the original code gave
(refine_mcore/evaluation/golden.py)."""

from __future__ import annotations

from pathlib import Path

from refine_mcore.evaluation.differences import broken
from refine_mcore.evaluation.golden import (
    POSITIONS,
    ROLLOUT_TOKENS,
    Outputs,
    text_a_differences,
    text_b_differences,
)

# The two texts of every reference and the options that ask for all it holds of them.
TEXT_A = (
    *("input_ids_a", "--gradients", "--rollout-at", ",".join(map(str, POSITIONS))),
    *("--rollout-tokens", str(ROLLOUT_TOKENS), "--greedy"),
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
    assert not [str(d) for d in broken(text_a_differences(scored, golden / "models" / name))]


def assert_text_b(scored: Outputs, golden: Path, name: str) -> None:
    """128 tokens, which the chunk sizes divide."""
    assert not [str(d) for d in broken(text_b_differences(scored, golden / "models" / name))]
