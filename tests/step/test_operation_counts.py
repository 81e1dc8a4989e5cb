"""What a GPU is given for a micro-batch at full size: more operations than it takes to keep it busy
are a step that waits for the host.

Counted on the meta device with all Triton kernels that there are and FlashAttention; each launch is
one operation.
"""

import importlib.util

import pytest

from refine_mcore.config import RefineConfig
from refine_mcore.models.presets import preset

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from tests.step.operations import count_operations

REFINE = RefineConfig(num_chunks=8, rollout_tokens=5)


@pytest.mark.parametrize(
    ("name", "overrides", "most", "most_extra"),
    [
        ("deltanet-1.3b", {}, 1435, 1460),
        # as in the recipes
        ("lact-760m", {"mixer.muon_dtype": "bfloat16"}, 13150, 1500),
    ],
)
def test_operations_of_a_micro_batch(monkeypatch, single_rank, name, overrides, most, most_extra):
    counts = []
    for rolls_out in (False, True):
        with monkeypatch.context() as patch:
            counted = count_operations(
                preset(name).with_overrides(overrides),
                single_rank,
                patch,
                tokens=16384,
                rolls_out=rolls_out,
                tape_interval=512,
                refine=REFINE,
            )
        counts.append(counted.total)
    plain, fused = counts
    assert 0 < plain <= most
    assert 0 < fused - plain <= most_extra
