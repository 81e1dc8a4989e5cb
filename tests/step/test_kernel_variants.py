"""Which kernels a step launches must not depend on where rollouts leave their texts: a pipeline
compiles and loads them in a rehearsal, and later it may be too late (pipeline/engine.py)."""

import importlib.util
import random

import pytest

from refine_mcore.config import RefineConfig
from refine_mcore.models.presets import preset
from refine_mcore.pipeline.stage import made_up_positions

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from tests.step.operations import count_operations

REFINE = RefineConfig(num_chunks=8, rollout_tokens=5)
TOKENS = 16384


def drawn(seed: int) -> list[int]:
    """One in each chunk of the text; some a few tokens before one of LaCT's ends."""
    rng, step = random.Random(seed), TOKENS // REFINE.num_chunks
    found = [rng.randrange(step * i, step * (i + 1)) for i in range(REFINE.num_chunks)]
    found[seed % 7] = 2048 * (1 + seed % 7) - rng.randrange(5)
    first, last = REFINE.margin_left, TOKENS - REFINE.margin_right
    return sorted(min(last, max(first, position)) for position in found)


def behind_states(tokens: int) -> list[int]:
    """All so many behind a state that a tape keeps."""
    return [2048 * i + 512 + tokens for i in range(REFINE.num_chunks)]


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("deltanet-1.3b", {"num_layers": 1}),
        ("gated-deltanet-1.3b", {"num_layers": 1}),
        ("lact-760m", {"num_layers": 1, "mixer.muon_dtype": "bfloat16"}),
    ],
)
def test_a_rehearsal_reaches_every_kernel(monkeypatch, single_rank, name, overrides, slices):
    launched = []
    architecture = preset(name).with_overrides(overrides)
    made_up = made_up_positions(architecture, REFINE, TOKENS)
    for positions in (made_up, [*map(drawn, range(8)), *map(behind_states, (1, 256))]):
        with monkeypatch.context() as patch:
            counted = count_operations(
                architecture,
                single_rank,
                patch,
                tokens=TOKENS,
                rolls_out=True,
                tape_interval=512,
                refine=REFINE,
                slices=slices,
                positions=positions,
            )
        launched.append(counted.launched)
    rehearsed, later = launched
    assert len(rehearsed) > 20
    new = sorted(later - rehearsed)
    assert not new, "\n".join(new)
