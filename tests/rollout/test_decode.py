"""Decoding branches together from the tape against a full run for every token."""

from collections.abc import Callable

import pytest
import torch

from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.state import map_tensors
from refine_mcore.rollout.branches import Branches, Randomness
from refine_mcore.rollout.decode import decode
from tests.models.zoo import FAMILIES, VOCAB, assert_same, random_tokens, score

ModelOf = Callable[[str], FastWeightModel]
BRANCHES = Branches((0, 1, 1), (3, 11, 6))
K = 6


def start(model: FastWeightModel) -> tuple:
    """Text, hidden states [B, S, d], the branches' states and the logits of their first tokens."""
    tokens = random_tokens(2, 14)
    out = model(tokens, record=True)
    states = out.tape.at(BRANCHES.batch_index, BRANCHES.position)
    return tokens, out.hidden, states, BRANCHES.rows_before(model.logits(out.hidden))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_decoding_takes_the_best_token_of_a_full_run(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    tokens, _, states, logits = start(model)
    seen: list[torch.Tensor] = []
    rollouts, log_probs = decode(model, states, logits, K, keys=None, observe=seen.append)
    emitted = torch.stack(seen, 1)
    for row, (text, position) in enumerate(
        zip(BRANCHES.batch_index, BRANCHES.position, strict=True)
    ):
        run = tokens[text : text + 1, :position]
        for j in range(K):
            full = model.logits(model(run).hidden)[0, -1]
            assert_same([emitted[row, j], log_probs[row, j]], [full, full.log_softmax(-1).max()])
            assert rollouts[row, j] == full.argmax()
            run = torch.cat([run, full.argmax().reshape(1, 1)], dim=1)
    assert not (log_probs.requires_grad or any(x.requires_grad for x in seen[1:]))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_the_log_probs_that_decoding_saw(
    name: str, temperature: float, model_of: ModelOf
) -> None:
    model = model_of(name)
    _, hidden, states, logits = start(model)
    keys = Randomness(5, 0).token_keys(torch.tensor([0, 1]), BRANCHES, 1, K)
    seen: list[torch.Tensor] = []
    rollouts, log_probs = decode(model, states, logits, K, keys, temperature, observe=seen.append)
    emitted = torch.stack(seen, 1)
    scores = score(model, states, BRANCHES.rows_before(hidden), rollouts, temperature)
    assert_same([scores.log_probs], [log_probs])
    expected = (emitted / temperature).log_softmax(-1).gather(2, rollouts[..., None])[..., 0]
    assert_same([log_probs], [expected])
    assert scores.hidden.shape == (3, K, 16)


def test_tokens_are_drawn_from_the_tempered_distribution(model_of: ModelOf) -> None:
    """20 000 first tokens of one branch, against softmax(logits / temperature)."""
    model, draws, temperature = model_of("delta_net"), 20_000, 0.7
    _, _, states, logits = start(model)
    many = [state.select([0] * draws) for state in states]
    keys = Randomness(5, 0).token_keys(torch.tensor([0]), Branches((0,), (3,)), draws, 1)
    drawn, _ = decode(model, many, logits[:1].expand(draws, -1), 1, keys, temperature)
    frequency = drawn.flatten().bincount(minlength=VOCAB) / draws
    expected = (logits[0] / temperature).softmax(-1)
    assert (frequency - expected).abs().max() < 0.015


def test_decoding_leaves_states_and_gradients_alone(model_of: ModelOf) -> None:
    model = model_of("lact")
    _, hidden, states, logits = start(model)
    before = map_tensors(torch.Tensor.detach, states)
    rollouts = decode(model, states, logits, K, keys=None)[0]
    prefix_hidden = BRANCHES.rows_before(hidden)
    scores = score(model, states, prefix_hidden, rollouts)
    again = score(model, before, prefix_hidden, rollouts)
    assert_same(scores[:2], again[:2], tolerance=0)
    assert scores.log_probs.requires_grad
