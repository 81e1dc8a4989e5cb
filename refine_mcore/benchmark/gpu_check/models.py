"""The reference models of tests/golden, scored on the device as tests/test_golden.py scores them on
the CPU, held to the same limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from refine_mcore.benchmark.gpu_check.jobs import score_reference
from refine_mcore.benchmark.gpu_check.results import Result, compared, raised
from refine_mcore.evaluation.golden import text_a_differences, text_b_differences


def check_models(golden: Path, scratch: Path) -> Iterator[Result]:
    """One row per reference model: logits, entropies, losses, rollouts, gradients. The converted
    weights go to `scratch`."""
    for model in sorted(config.parent for config in golden.glob("*/*/config.json")):
        try:
            text_a, text_b = score_reference(model, scratch / model.name)
        except Exception as error:  # says nothing of the other models
            yield raised(model.name, error)
            continue
        found = {"A": text_a_differences(text_a, model), "B": text_b_differences(text_b, model)}
        differences = [
            replace(difference, what=f"text {text}, {difference.what}")
            for text, of_text in found.items()
            for difference in of_text
        ]
        yield compared(model.name, differences)
