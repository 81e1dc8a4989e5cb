"""Group-relative advantages against the authors' numbers, and the meaning of the groupings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from refine_mcore.objective.advantages import GROUPINGS, group_ids, group_relative_advantages

DTYPES = {"f32": (torch.float32, 1e-5), "f64": (torch.float64, 1e-6)}
CASES = [
    "sequence_n1",
    "position_n4",
    "binary_position_n4",
    "mixed_masked",
    "all_equal_n8",
    "group_of_one",
]


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_advantages_match_golden(reference, case, normalize_std, dtype):
    kind, tolerance = DTYPES[dtype]
    name = f"grpo.{case}"
    rewards = reference[f"{name}.token_level_rewards"].to(kind).sum(-1)
    advantages = group_relative_advantages(rewards, reference[f"{name}.group"], normalize_std)
    assert advantages.dtype == kind
    expected = reference[f"{name}.adv.{'std' if normalize_std else 'nostd'}.{dtype}"]
    if case == "all_equal_n8":
        # The fixture's fp32 mean rounds; what it stands for is 0.
        assert not advantages.any()
    else:
        actual = advantages[:, None] * reference[f"{name}.response_mask"]
        assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_groupings_match_golden(reference, reference_cases):
    sampling = reference_cases["sampling"]
    for case, positions in (("c4_k4", 4), ("c8_k5", 8)):
        expected = sampling["cases"][case]["uid_groups_n1"]
        assert group_ids("sequence", 3, positions, 1).tolist() == expected
        assert group_ids("joint", 3, positions, 1).tolist() == expected
    expected = sampling["n3_c4_k5_argmax"]["uid_groups"]
    assert group_ids("position", 3, 4, 3).tolist() == expected
    assert group_ids("position", 24, 1, 4).tolist() == reference["grpo.position_n4.group"].tolist()


@pytest.mark.parametrize(
    "grouping, expected",
    [
        ("sequence", [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]),
        ("position", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        ("joint", [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_rows_are_sequence_then_position_then_rollout(grouping, expected):
    ids = group_ids(grouping, 2, 3, 2)
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


@given(
    st.sampled_from(GROUPINGS),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_advantages_standardise_each_group(grouping, batch, positions, rollouts, binary, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(batch * positions * rollouts, generator=generator, dtype=torch.float64)
    rewards = rewards.round() if binary else rewards
    ids = group_ids(grouping, batch, positions, rollouts)
    # The order of the rows must not matter.
    order = torch.randperm(len(ids), generator=generator)
    advantages = group_relative_advantages(rewards[order], ids[order])
    centred = group_relative_advantages(rewards[order], ids[order], normalize_std=False)
    for group in ids.unique():
        members = ids[order] == group
        values, result = rewards[order][members], advantages[members]
        if len(values) == 1:
            assert_close(result, values / (1 + 1e-6), rtol=1e-12, atol=0.0)
            assert centred[members].tolist() == values.tolist()
            continue
        assert_close(result.sum(), torch.zeros_like(result.sum()), rtol=0.0, atol=1e-9)
        assert_close(centred[members], values - values.mean(), rtol=0.0, atol=1e-12)
        if (values == values[0]).all():
            assert not result.any()
        else:
            assert_close(result * (values.std() + 1e-6), values - values.mean(), rtol=0, atol=1e-9)


@given(st.floats(-1e3, 1e3), st.integers(2, 40), st.sampled_from(list(DTYPES)))
def test_equal_rewards_give_exactly_zero(value, size, dtype):
    rewards = torch.full((size,), value, dtype=DTYPES[dtype][0])
    advantages = group_relative_advantages(rewards, torch.zeros(size, dtype=torch.int64))
    assert not advantages.any()


def test_epsilon_and_low_precision():
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.bfloat16)
    advantages = group_relative_advantages(rewards, torch.zeros(4, dtype=torch.int32), eps=1.0)
    deviation = (1 / 3) ** 0.5
    expected = torch.tensor([-0.5, 0.5, -0.5, 0.5]) / (deviation + 1.0)
    assert_close(advantages, expected, rtol=1e-6, atol=0.0)


def test_advantages_carry_no_gradient():
    rewards = torch.rand(4, requires_grad=True)
    assert not group_relative_advantages(rewards, torch.zeros(4).long()).requires_grad


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_advantages_never_wait_for_the_device(grouping):
    """Meta tensors hold no data, so anything that reads a value on the host raises."""
    ids = group_ids(grouping, 2, 3, 2, device="meta")
    assert group_relative_advantages(torch.empty(12, device="meta"), ids).shape == (12,)


def test_unknown_grouping_is_refused():
    with pytest.raises(ValueError, match="unknown grouping 'batch'"):
        group_ids("batch", 1, 1, 1)
