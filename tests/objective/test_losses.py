"""The clipped policy loss and its gradient against the authors' numbers."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from refine_mcore.objective.losses import AGGREGATIONS, clipped_policy_loss

DTYPES = {"f32": (torch.float32, 1e-5), "f64": (torch.float64, 1e-9)}
RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "objective.json").read_text())
CASES = [case for case in RECORDED["policy_loss"]["cases"] if case["loss_agg_mode"] in AGGREGATIONS]


def reference_inputs(reference, dtype):
    names = ("log_prob", "old_log_prob", "advantages")
    log_probs, old, advantages = (reference[f"pl.{name}"].to(dtype) for name in names)
    return log_probs.clone().requires_grad_(), old, advantages


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["id"]))
def test_loss_metrics_and_gradient_match_golden(reference, case):
    dtype, tolerance = DTYPES[case["dtype"]]
    log_probs, old, advantages = reference_inputs(reference, dtype)
    loss, metrics = clipped_policy_loss(
        log_probs,
        old,
        advantages,
        reference[f"pl.mask.{case['mask']}"],
        case["clip_low"],
        case["clip_high"],
        case["dual_clip_c"],
        case["loss_agg_mode"],
    )
    assert loss.dtype == dtype
    (gradient,) = torch.autograd.grad(loss, log_probs)
    official = {"clip_fraction": "clipfrac", "clip_fraction_lower": "clipfrac_lower"}
    for name, value in metrics.items():
        assert value.dtype == dtype and not value.requires_grad
        expected = case[official.get(name, name)]
        assert value.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    if case["loss"] is None:
        # NaN in the authors' code, from the sequence without a valid token.
        assert loss.isfinite() and gradient.isfinite().all()
        return
    assert loss.item() == pytest.approx(case["loss"], rel=tolerance, abs=tolerance)
    if case["grad"]:
        assert_close(gradient, reference[case["grad"]].to(dtype), rtol=tolerance, atol=tolerance)


def test_on_policy_gradient_matches_golden(reference, reference_cases):
    case = reference_cases["policy_loss"]["on_policy"]
    log_probs, _, advantages = reference_inputs(reference, torch.float32)
    loss, metrics = clipped_policy_loss(
        log_probs, log_probs, advantages, reference[f"pl.mask.{case['mask']}"]
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert_close(gradient, reference["pl.on_policy.grad"], rtol=1e-5, atol=1e-5)
    assert [value.item() for value in metrics.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_without_valid_tokens_loss_and_gradient_are_zero(reference, reference_cases, aggregation):
    log_probs, old, advantages = reference_inputs(reference, torch.float32)
    mask = torch.zeros_like(reference["pl.mask.full"])
    loss, metrics = clipped_policy_loss(log_probs, old, advantages, mask, aggregation=aggregation)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    results = [loss.item(), *(value.item() for value in metrics.values())]
    assert results == reference_cases["policy_loss"]["all_masked_token_mean"]
    assert not gradient.any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_sequence_adds_nothing_but_counts(reference, aggregation):
    log_probs, old, advantages = reference_inputs(reference, torch.float64)
    mask = reference["pl.mask.some_emptyrow"]
    kept = mask.bool().any(-1)
    loss, _ = clipped_policy_loss(log_probs, old, advantages, mask, aggregation=aggregation)
    rest, _ = clipped_policy_loss(
        log_probs[kept], old[kept], advantages[kept], mask[kept], aggregation=aggregation
    )
    share = 1.0 if aggregation == "token-mean" else kept.double().mean()
    assert_close(loss, rest * share, rtol=1e-12, atol=0.0)


@given(
    st.sampled_from(AGGREGATIONS),
    st.integers(2, 9),
    st.integers(1, 6),
    st.integers(0, 2**31),
    st.data(),
)
def test_parts_with_a_shared_denominator_add_up(aggregation, rows, tokens, seed, data):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(3, rows, tokens, generator=generator, dtype=torch.float64)
    log_probs, old, advantages = draws[0].requires_grad_(), draws[1], draws[2, :, 0]
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    assume(bool(mask.any()))
    cut = data.draw(st.integers(0, rows))
    whole, _ = clipped_policy_loss(log_probs, old, advantages, mask, aggregation=aggregation)
    count = mask.sum() if aggregation == "token-mean" else float(rows)
    parts = [
        clipped_policy_loss(
            log_probs[part],
            old[part],
            advantages[part],
            mask[part],
            aggregation=aggregation,
            denominator=count,
        )[0]
        for part in (slice(0, cut), slice(cut, rows))
    ]
    assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(whole, log_probs)
    (actual,) = torch.autograd.grad(parts[0] + parts[1], log_probs)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_loss_matches_a_loop_over_tokens(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs, old, advantages = torch.randn(
        3, rows, tokens, generator=generator, dtype=torch.float64
    )
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    total, clipped, lower = 0.0, 0, 0
    for new, before, advantage in zip(
        log_probs[mask].tolist(), old[mask].tolist(), advantages[mask].tolist(), strict=True
    ):
        ratio = torch.tensor(new - before, dtype=torch.float64).exp().item()
        plain, bounded = -advantage * ratio, -advantage * min(max(ratio, 0.9), 1.3)
        value = max(plain, bounded)
        clipped += bounded > plain
        if advantage < 0:
            lower += value > -2 * advantage
            value = min(value, -2 * advantage)
        total += value
    loss, metrics = clipped_policy_loss(log_probs, old, advantages, mask, 0.1, 0.3, 2.0)
    count = max(int(mask.sum()), 1)
    assert loss.item() == pytest.approx(total / count, rel=1e-12, abs=1e-12)
    assert metrics["clip_fraction"].item() == pytest.approx(clipped / count)
    assert metrics["clip_fraction_lower"].item() == pytest.approx(lower / count)


def test_masked_tokens_may_hold_anything():
    log_probs = torch.tensor([[-1.0, float("-inf"), float("nan")]], requires_grad=True)
    old = torch.tensor([[-1.0, float("-inf"), 0.0]])
    advantages = torch.tensor([[2.0, float("nan"), float("inf")]])
    loss, metrics = clipped_policy_loss(log_probs, old, advantages, torch.tensor([[1, 0, 0]]))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == -2.0
    assert gradient.tolist() == [[-2.0, 0.0, 0.0]]
    assert all(value.isfinite() for value in metrics.values())


def test_gradient_reaches_only_the_new_log_probs():
    log_probs, old, advantages = (torch.rand(2, 4) for _ in range(3))
    for tensor in (log_probs, old, advantages):
        tensor.requires_grad_()
    loss, _ = clipped_policy_loss(log_probs, old, advantages, torch.ones(2, 4))
    loss.backward()
    assert log_probs.grad is not None
    assert old.grad is None and advantages.grad is None


def test_a_far_log_ratio_is_clamped():
    log_probs = torch.tensor([[30.0]], requires_grad=True)
    loss, metrics = clipped_policy_loss(
        log_probs, torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1), dual_clip=1e30
    )
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(20.0).exp().item())
    assert metrics["approx_kl"].item() == -20.0
    assert log_probs.grad is not None and not log_probs.grad.any()


def test_bf16_log_probs_are_computed_in_fp32():
    log_probs, old = torch.rand(2, 3, 4).bfloat16().unbind()
    mask = torch.ones(3, 4)
    loss, _ = clipped_policy_loss(log_probs, old, torch.ones(3), mask)
    expected, _ = clipped_policy_loss(log_probs.float(), old.float(), torch.ones(3), mask)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_never_waits_for_the_device(aggregation):
    """Meta tensors hold no data, so anything that reads a value on the host raises."""
    tokens = torch.empty(6, 3, device="meta")
    loss, metrics = clipped_policy_loss(tokens, tokens, tokens, tokens, aggregation=aggregation)
    assert loss.shape == () and all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"aggregation": "sum"}, "unknown loss aggregation 'sum'"),
        ({"dual_clip": 1.0}, "dual clip must be above 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(zeros, zeros, zeros, zeros, **options)
