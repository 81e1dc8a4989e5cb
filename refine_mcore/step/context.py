"""What every part of an optimizer step knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from refine_mcore.config import RefineConfig
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.refine_loss import TextBatch


@dataclass(frozen=True)
class StepContext:
    """What every mode needs: the unwrapped model, the objective, this step's randomness, the
    data-parallel group."""

    model: FastWeightModel
    config: RefineConfig
    randomness: Randomness
    dp_group: dist.ProcessGroup

    def global_targets(self, batches: Sequence[TextBatch]) -> Tensor:
        """Valid next-token targets of these micro-batches over all data-parallel ranks; stays on
        the device."""
        count = torch.stack([batch.num_targets() for batch in batches]).sum()
        dist.all_reduce(count, group=self.dp_group)
        return count

    def policy_denominator(self, batches: Sequence[TextBatch]) -> float:
        """What the policy loss of these micro-batches is divided by: their rollout tokens over all
        data-parallel ranks, each of which has as many, or their rollouts.

        Where rollouts end earlier (`rollout_entropy`) their tokens are still taken to be k: how
        many there are in all is known when the first micro-batch has had its backward.
        """
        config, local = self.config, sum(batch.tokens.shape[0] for batch in batches)
        texts = local * self.dp_group.size()
        rollouts = texts * config.num_chunks * config.rollouts_per_position
        per_token = config.aggregation == "token-mean"
        return float(rollouts * (config.rollout_tokens if per_token else 1))
