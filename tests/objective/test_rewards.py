"""Rewards against the authors' numbers, and the edit similarity against the textbook."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from refine_mcore.objective.rewards import REWARD_KINDS, sequence_reward

TOLERANCE = {"f32": 1e-5, "f64": 1e-9}
OFFICIAL = {"cosine": "cosine_similarity", "binary": "binary", "hybrid": "hybrid"}


def reference_reward(reference, kind, dtype, **options):
    return sequence_reward(
        kind,
        reference[f"rew.response_hidden.{dtype}"],
        reference[f"rew.gt_hidden.{dtype}"],
        reference["rew.response_ids"],
        reference["rew.gt_ids"],
        **options,
    )


def levenshtein(left: list[int], right: list[int]) -> int:
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        current = [i]
        for j, b in enumerate(right, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b))
            current.append(cost)
        previous = current
    return previous[-1]


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kind", ["cosine", "binary", "hybrid"])
def test_reward_matches_golden(reference, kind, dtype):
    name = f"rew.{OFFICIAL[kind]}"
    reward = reference_reward(reference, kind, dtype)
    suffix = "f32" if kind == "binary" else dtype
    per_token = reference[f"{name}.per_token.{suffix}"]
    tolerance = TOLERANCE[dtype]
    assert reward.dtype == reference[f"rew.gt_hidden.{dtype}"].dtype
    # The binary reward of the fixture is fp32 throughout, its mean over 5 included.
    expected = per_token.to(reward.dtype).mean(-1)
    assert_close(reward, expected, rtol=tolerance, atol=tolerance)
    flattened = reference[f"{name}.flattened.{suffix}"][:, -1]
    assert_close(reward.float(), flattened, rtol=1e-5, atol=1e-5)


def test_zero_vectors_count_zero(reference):
    zero = (reference["rew.response_hidden.f32"] == 0).all(-1)
    zero |= (reference["rew.gt_hidden.f32"] == 0).all(-1)
    assert zero.any()
    assert not reference["rew.cosine_similarity.per_token.f32"][zero].any()
    assert reference_reward(reference, "cosine", "f32").isfinite().all()


@pytest.mark.parametrize("kind", ["cosine", "hybrid"])
def test_bf16_hidden_states_are_compared_in_fp32(reference, kind):
    reward = reference_reward(reference, kind, "bf16")
    upcast = {
        f"rew.{name}.f32": reference[f"rew.{name}.bf16"].float()
        for name in ("response_hidden", "gt_hidden")
    }
    assert reward.dtype == torch.float32
    assert_close(reward, reference_reward({**reference, **upcast}, kind, "f32"), rtol=0.0, atol=0.0)


def test_hybrid_weights(reference):
    hybrid = reference_reward(reference, "hybrid", "f64", cosine_weight=0.3, binary_weight=2.0)
    cosine, binary = (reference_reward(reference, kind, "f64") for kind in ("cosine", "binary"))
    assert_close(hybrid, 0.3 * cosine + 2.0 * binary, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_edit_similarity_matches_levenshtein(length, vocabulary, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    rollout, target = torch.randint(vocabulary, (2, rows, length), generator=generator)
    hidden = torch.zeros(rows, length, 2, dtype=torch.float64)
    reward = sequence_reward("edit", hidden, hidden, rollout, target)
    distances = [levenshtein(*pair) for pair in zip(rollout.tolist(), target.tolist(), strict=True)]
    expected = 1 - torch.tensor(distances, dtype=torch.float64) / length
    assert_close(reward, expected, rtol=0.0, atol=1e-15)


def test_edit_similarity_forgives_a_shift():
    hidden = torch.zeros(1, 5, 1)
    rollout, target = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[2, 3, 4, 5, 6]])
    assert sequence_reward("binary", hidden, hidden, rollout, target).item() == 0
    assert_close(
        sequence_reward("edit", hidden, hidden, rollout, target),
        torch.tensor([0.6]),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", ["cosine", "hybrid"])
def test_rewards_carry_no_gradient(kind):
    hidden = torch.rand(2, 3, 4, requires_grad=True)
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    assert not sequence_reward(kind, hidden, hidden, tokens, tokens).requires_grad


@pytest.mark.parametrize("kind", REWARD_KINDS)
def test_rewards_never_wait_for_the_device(kind):
    """Meta tensors hold no data, so anything that reads a value on the host raises."""
    hidden = torch.empty(6, 3, 4, device="meta")
    tokens = torch.empty(6, 3, dtype=torch.int64, device="meta")
    behind = torch.empty(6, 2, device="meta")
    reward = sequence_reward(
        kind, hidden, hidden, tokens, tokens, future_log_probs=behind, text_log_probs=behind
    )
    assert reward.shape == (6,)


def test_future_is_what_the_text_behind_gains():
    hidden, tokens = torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.zeros(2, 3).long()
    after_rollout = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]], requires_grad=True)
    after_text = torch.tensor([[-2.0, -3.0], [-1.0, -0.5]], requires_grad=True)
    reward = sequence_reward(
        "future",
        hidden,
        hidden,
        tokens,
        tokens,
        future_log_probs=after_rollout,
        text_log_probs=after_text,
    )
    assert reward.tolist() == [0.5, -1.25]
    assert not reward.requires_grad
    with pytest.raises(ValueError, match="needs the log-probs of the text behind"):
        sequence_reward("future", hidden, hidden, tokens, tokens)


def test_unknown_kind_is_refused(reference):
    with pytest.raises(ValueError, match="unknown reward 'rouge'"):
        reference_reward(reference, "rouge", "f32")


@pytest.mark.parametrize("kind", ["cosine", "binary", "hybrid", "edit"])
def test_tokens_behind_the_length_of_a_rollout_do_not_count(kind):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 5, 3, generator=generator, dtype=torch.float64)
    tokens = torch.randint(3, (2, 6, 5), generator=generator)
    lengths = torch.tensor([1, 2, 3, 4, 5, 3])
    found = sequence_reward(kind, *hidden, *tokens, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = sequence_reward(
            kind, *hidden[:, row : row + 1, :length], *tokens[:, row : row + 1, :length]
        )
        torch.testing.assert_close(found[row], alone[0])
