"""Generation at other layouts against one rank."""

from __future__ import annotations

from typing import Any

import torch

from refine_mcore import platform
from refine_mcore.generation import Sampling, generate
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.models.whole_model import whole_model
from tests.distributed.harness import run_distributed
from tests.distributed.test_layouts import FAMILIES
from tests.generation.test_generate import prompts
from tests.models import zoo

SAMPLINGS = (Sampling(), Sampling(1.2, top_k=5, seed=1), Sampling(0.8))
LAYOUTS = ((2, 1, False), (1, 2, False), (2, 1, True))


def test_other_layouts_generate_the_same(single_rank: Any) -> None:
    """Tensor and pipeline parallel, and with the sequence sharded."""
    expected = {family: _generated(family, (1, 1, False)) for family in FAMILIES}
    platform.shutdown()
    run_distributed(_compare, 2, expected)


def _compare(expected: dict[str, list[list[list[int]]]]) -> None:
    for layout in LAYOUTS:
        for family, tokens in expected.items():
            assert _generated(family, layout) == tokens, (layout, family)


@zoo.short_chunks()
def _generated(family: str, layout: tuple[int, int, bool]) -> list[list[list[int]]]:
    tensor, pipeline, sequence_parallel = layout
    groups = platform.initialize_model_parallel(tensor, pipeline)
    config = transformer_config(
        FAMILIES[family],
        dtype=torch.float64,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        sequence_parallel=sequence_parallel,
    )
    stage = build_model(config, groups)
    initialize(stage, seed=1)
    model = whole_model(stage)
    return [generate(model, prompts(), 5, sampling=x, slice_length=6) for x in SAMPLINGS]
