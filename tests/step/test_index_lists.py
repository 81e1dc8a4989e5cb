"""Lists of positions and rows reach the device once a micro-batch, however many layers ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refine_kernels import host

from refine_mcore.models import recorded_tokens
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.rollout.branches import Branches
from refine_mcore.rollout.decode import decode
from refine_mcore.step.refine_loss import TextBatch, text_pass
from tests.models.zoo import score


def copies(name: str, layers: int, groups: Any) -> int:
    """Lists that a text pass, rollouts from it and their scores send to the device."""
    architecture = preset(name).with_overrides({"num_layers": layers})
    model = build_model(transformer_config(architecture), groups)
    initialize(model, 0)
    tokens = torch.randint(61, (2, 40))
    batch = TextBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(2))
    branches = Branches.at([[5, 17, 33], [8, 16, 39]])
    caches: list[Any] = [host._on_device, recorded_tokens._places_on_device]
    for cache in caches:
        cache.cache_clear()
    text = text_pass(model, batch, with_entropy=True, record=True)
    assert text.tape is not None
    states = [x.fork(2) for x in text.tape.at(branches.batch_index, branches.position)]
    streams = branches.fork(2)
    logits = model.logits(streams.rows_before(text.hidden)[:, None])[:, 0]
    rollouts, _ = decode(model, states, logits, 4, None)
    score(model, states, streams.rows_before(text.hidden), rollouts)
    return sum(cache.cache_info().misses for cache in caches)


@pytest.mark.parametrize("name", ["tiny-deltanet", "tiny-gated-deltanet", "tiny-lact"])
def test_layers_share_them(name: str, single_rank: Any) -> None:
    assert copies(name, 6, single_rank) == copies(name, 2, single_rank) > 0
