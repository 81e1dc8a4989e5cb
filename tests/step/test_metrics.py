"""What a step reports: sums over its micro-batches, texts in sample order."""

import pytest
import torch

from refine_mcore.step.metrics import (
    ReducedMetrics,
    StepAccumulator,
    TextRecord,
)


def _record(*samples: int) -> TextRecord:
    """Two positions, rollouts of one token, rewards that tell the samples apart."""
    index = torch.tensor(samples)
    rows = index[:, None] * 10 + torch.arange(2)
    return TextRecord(index, rows, rows + 1, rows.double())


def test_sums_and_texts_of_a_step(process_groups) -> None:
    names = ("loss_ntp", "loss_policy", "entropy", "clipped", "drift")
    counts = ("entropy_count", "policy_tokens", "rollout_tokens")
    steps = StepAccumulator()
    for scale, samples in ((1.0, (7, 2)), (3.0, (5,))):
        sums = {name: torch.tensor(scale * (i + 1)) for i, name in enumerate(names)}
        sums |= {name: torch.tensor(len(samples) * 4) for name in counts}
        steps.add(sums, _record(*samples))
    reduced = steps.reduce(process_groups, optimizer_steps=2)
    assert reduced.loss_ntp == pytest.approx(4 / 2)
    assert reduced.loss_policy == pytest.approx(8 / 2)
    assert reduced.entropy_mean == pytest.approx(12 / 12)
    assert reduced.clip_fraction == pytest.approx(16 / 12)
    assert reduced.log_prob_drift == pytest.approx(20 / 12)
    assert reduced.rollout_length == pytest.approx(12 / 6)
    rewards = torch.tensor([20.0, 21, 50, 51, 70, 71])
    assert reduced.reward_mean == pytest.approx(rewards.mean().item())
    assert reduced.reward_std == pytest.approx(rewards.std().item())
    assert reduced.positions is not None and reduced.rollout_tokens is not None
    assert reduced.positions.tolist() == [[20, 21], [50, 51], [70, 71]]
    assert reduced.rollout_tokens.tolist() == [[21, 22], [51, 52], [71, 72]]


def test_a_step_without_rollouts_reports_the_loss_alone(process_groups) -> None:
    step = StepAccumulator()
    for loss in (1.0, 2.0):
        step.add({"loss_ntp": torch.tensor(loss)})
    reduced = step.reduce(process_groups, optimizer_steps=1)
    assert reduced == ReducedMetrics(loss_ntp=3.0)


def test_a_single_reward_has_no_spread(process_groups) -> None:
    step = StepAccumulator()
    one = torch.ones(())
    names = ("loss_ntp", "loss_policy", "entropy", "entropy_count", "clipped", "policy_tokens")
    sums = dict.fromkeys((*names, "drift", "rollout_tokens"), one)
    record = TextRecord(torch.tensor([0]), *(torch.ones(1, 1) for _ in range(3)))
    step.add(sums, record)
    assert step.reduce(process_groups, optimizer_steps=1).reward_std == 0.0
