"""What a step reports: sums over micro-batches, and per text the positions, rollouts and rewards.

Everything stays on the device until `StepAccumulator.reduce`, at the end of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True)
class TextRecord:
    """Per text of a micro-batch: sample_index [B], positions [B, c], tokens [B, c n k], rewards [B,
    c n]."""

    sample_index: Tensor
    positions: Tensor
    tokens: Tensor
    rewards: Tensor


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one update comes to over all ranks. ReFINE's fields are None in a next-token step, all
    where there is no update."""

    # Mean next-token loss per target, in nats.
    loss_ntp: float | None = None
    # Clipped policy loss, unweighted.
    loss_policy: float | None = None
    # Mean and standard deviation of the rewards of all rollouts.
    reward_mean: float | None = None
    reward_std: float | None = None
    # Mean entropy over the text's positions, in nats.
    entropy_mean: float | None = None
    # Share of rollout tokens whose ratio was clipped.
    clip_fraction: float | None = None
    # Mean tokens of a rollout that count in its reward and loss.
    rollout_length: float | None = None
    # Mean absolute difference between the decode passes' log-probs and the scored ones, in nats.
    log_prob_drift: float | None = None
    # Optimizer steps of the batch that were not taken, as the gradient was not finite.
    skipped_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class ReducedMetrics(StepFigures):
    """One step on the host, with all its positions and rollout tokens in sample order."""

    loss_ntp: float
    positions: Tensor | None = None
    rollout_tokens: Tensor | None = None


@dataclass
class StepAccumulator:
    """Collects the metrics of one step (all its optimizer steps) on one rank."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    texts: list[TextRecord] = field(default_factory=list)
    skipped_steps: int = 0

    def add(self, sums: dict[str, Tensor], texts: TextRecord | None = None) -> None:
        """`sums` add up over micro-batches and ranks; `texts` come once per text and step."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        if texts is not None:
            self.texts.append(texts)

    def reduce(self, pg_collection: Any, optimizer_steps: int) -> ReducedMetrics:
        """Sum over data-parallel ranks, known to all stages. Losses are averaged over the optimizer
        steps of the batch."""
        pipeline = pg_collection.pp
        last = pipeline.size() - 1
        reduced: list[Any] = [None]
        if pipeline.rank() == last:
            reduced = [self._reduce(pg_collection.dp, optimizer_steps)]
        if last > 0:
            dist.broadcast_object_list(reduced, group=pipeline, group_src=last)
        return reduced[0]

    def _reduce(self, dp_group: dist.ProcessGroup, optimizer_steps: int) -> ReducedMetrics:
        names = sorted(self.sums)
        total = torch.stack([self.sums[name].double() for name in names])
        dist.all_reduce(total, group=dp_group)
        sums = dict(zip(names, total.tolist(), strict=True))
        values: dict[str, Any] = {"loss_ntp": sums["loss_ntp"] / optimizer_steps}
        if "loss_policy" in sums:
            values["loss_policy"] = sums["loss_policy"] / optimizer_steps
            values["entropy_mean"] = sums["entropy"] / sums["entropy_count"]
            values["clip_fraction"] = sums["clipped"] / sums["policy_tokens"]
            values["log_prob_drift"] = sums["drift"] / sums["rollout_tokens"]
            values |= self._reduce_texts(dp_group, sums["policy_tokens"])
        return ReducedMetrics(**values, skipped_steps=self.skipped_steps)

    def _reduce_texts(self, dp_group: dist.ProcessGroup, policy_tokens: float) -> dict[str, Any]:
        order = _gather([record.sample_index for record in self.texts], dp_group).argsort()
        rewards = _gather([record.rewards for record in self.texts], dp_group)[order].double()
        return {
            "rollout_length": policy_tokens / rewards.numel(),
            "reward_mean": rewards.mean().item(),
            "reward_std": rewards.std().item() if rewards.numel() > 1 else 0.0,
            "positions": _gather([record.positions for record in self.texts], dp_group)[order],
            "rollout_tokens": _gather([record.tokens for record in self.texts], dp_group)[order],
        }


def _gather(parts: list[Tensor], dp_group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows, on the host."""
    return gather_from_sequence_parallel_region(torch.cat(parts), group=dp_group).cpu()
