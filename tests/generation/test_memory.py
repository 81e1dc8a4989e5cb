"""Memory of generation does not grow with the prompt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A process of its own: its peak is that of this prompt alone.
PEAK = """
import resource, sys
import torch
from refine_mcore import platform
from refine_mcore.generation import generate
from tests.models.zoo import VOCAB, make_model

tokens, name = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
platform.initialize()
with platform.distributed(60):
    model = make_model(name, platform.initialize_model_parallel())
    prompt = torch.randint(VOCAB, (tokens,)).tolist()
    assert len(generate(model, [prompt], 8)[0]) == 8
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(name: str, tokens: int) -> int:
    """KiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tokens), name], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "lact"])
def test_128k_tokens_take_the_memory_of_4k(name: str) -> None:
    few, many = peak(name, 4096), peak(name, 131072)
    assert many <= 1.05 * few, f"{many / few:.3f} times the memory"
