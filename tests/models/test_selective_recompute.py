"""Selective recomputation: less is kept, and no bit of outputs and gradients changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refine_mcore import platform
from refine_mcore.benchmark.memory import saved_tensors
from refine_mcore.models.delta_rule_mixer import DeltaRuleMixer
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.rollout.branches import Branches
from tests.distributed.harness import run_distributed
from tests.models.test_state import Alive
from tests.models.zoo import NAMES, gradients, make_model, random_tokens, score, weights_like

pytestmark = pytest.mark.usefixtures("short_chunks")


def step(model: FastWeightModel, *, pieces: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Hidden states of two texts in pieces and the scores of branches that left the last of them,
    and every parameter's gradient."""
    tokens, rollouts = random_tokens(2, 18), random_tokens(3, 5, seed=1)
    branches = Branches((0, 1, 1), (14, 18, 16))
    states: Any = None
    hidden: list[Tensor] = []
    for piece in tokens.tensor_split(pieces, 1):
        start = sum(x.shape[1] for x in hidden)
        out = model(piece, states, start=start, output_states=True, record=True)
        states, hidden = out.states, [*hidden, out.hidden]
    text = torch.cat(hidden, dim=1)
    states = out.tape.at(branches.batch_index, branches.position)
    seen = [text, *score(model, states, branches.rows_before(text), rollouts)[:2]]
    loss = torch.stack([(x * weights_like(x, i)).sum() for i, x in enumerate(seen)]).sum()
    return seen, gradients(model, loss)


def assert_same_bits(models: list[FastWeightModel], pieces: int) -> None:
    (seen, found), (expected_seen, expected) = (step(model, pieces=pieces) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected_seen, strict=True))
    assert any(g.any() for g in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_have_the_same_bits(name: str, process_groups: Any) -> None:
    models = [
        make_model(name, process_groups, selective_recompute=selective)
        for selective in (True, False)
    ]
    for pieces in (1, 3):
        assert_same_bits(models, pieces)
    selective, none = map(kept_bytes, models)
    assert selective < 0.95 * none


def kept_bytes(model: FastWeightModel) -> int:
    """By a forward over a text."""
    tokens = random_tokens(1, 64)
    saved = saved_tensors(lambda: model(tokens, record=True).hidden, model.parameters())
    return sum(one.bytes for one in saved)


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net-window_attention"])
def test_a_tape_keeps_writes_and_few_states(name: str, process_groups: Any) -> None:
    """And no outputs of convolutions, which a text pass makes again."""
    model, tokens = make_model(name, process_groups, selective_recompute=True), 512
    kept = []
    for record in (False, True):
        with Alive() as alive:
            out = model(random_tokens(1, tokens), record=record)
            kept.append(alive.bytes)
        del out
    mixers = [x for x in model.modules() if isinstance(x, DeltaRuleMixer)]
    size = torch.float64.itemsize
    heads = [(x.heads.value_heads, x.heads.key, x.heads.value) for x in mixers]
    writes = sum(tokens * h * value for h, _, value in heads)
    gates = sum(tokens * h for h, _, _ in heads)
    states = sum((tokens // 8 + 1) * h * key * value for h, key, value in heads)
    assert 0 < kept[1] - kept[0] < 1.02 * size * (writes + gates + states)


def _on_two_ranks(names: list[str]) -> None:
    platform.initialize()
    groups = platform.initialize_model_parallel(2, seed=0)
    for name in names:
        layout = {"tensor_parallel": 2, "sequence_parallel": True}
        models = [
            make_model(name, groups, **layout, selective_recompute=selective)
            for selective in (True, False)
        ]
        assert_same_bits(models, pieces=2)


def test_sharded_heads_and_sequences_have_the_same_bits() -> None:
    run_distributed(
        _on_two_ranks, 2, ["delta_net-full_attention", "gated_delta_net", "lact-prenorm-qk_norm"]
    )
