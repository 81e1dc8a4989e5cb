"""What a micro-batch does in an optimizer step, and what is stored of its rollouts between the two
phases of the paper's regime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from refine_mcore.rollout.branches import Branches
from refine_mcore.step.refine_loss import ScoredRollouts, TextBatch


@dataclass(frozen=True)
class StoredRollouts:
    """What one stage needs to train on rollouts made before: every one where they leave the texts,
    the first their tokens [R n, k], the last what the policy loss needs."""

    branches: Branches
    tokens: Tensor | None
    scored: ScoredRollouts | None


@dataclass(frozen=True)
class MicroBatch:
    """Texts that train on the next-token loss alone or, where `rolls_out`, on the ReFINE loss: with
    new rollouts, or with those stored."""

    texts: TextBatch
    rolls_out: bool
    stored: StoredRollouts | None = None

    def at(self, positions: Sequence[int]) -> MicroBatch:
        """The same, with stored rollouts as if they had left every text at these positions."""
        if self.stored is None:
            return self
        at = tuple(positions) * self.texts.tokens.shape[0]
        branches = replace(self.stored.branches, position=at)
        return replace(self, stored=replace(self.stored, branches=branches))
