"""What the last stage makes of one micro-batch's final hidden states: losses, positions, tokens,
rewards.

It is the same step as `training/step_modes.py` describes for whole texts, from the same parts
(`step/refine_loss.py`), taken apart at the points where the pipeline goes on elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from refine_mcore.models.fast_weight_model import ModelOutput
from refine_mcore.rollout.branches import Branches
from refine_mcore.rollout.decode import draw_tokens
from refine_mcore.rollout.scoring import score_hidden
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator, WorkMetrics
from refine_mcore.step.refine_loss import (
    Rollouts,
    TextBatch,
    TextPass,
    choose_branches,
    ntp_loss,
    policy_loss,
    predict,
    reward_rollouts,
    rollout_metrics,
)


@dataclass(frozen=True)
class _BranchContext:
    """What the rollouts of a micro-batch need of its texts: where they leave them, the texts'
    entropies [B, S], the hidden states [R n, k, d] that follow each branch."""

    branches: Branches
    entropy: Tensor
    following: Tensor


@dataclass(frozen=True)
class Denominators:
    """What the losses of one optimizer step are divided by, over all micro-batches and ranks."""

    targets: Tensor
    rollouts: float


@dataclass
class Head:
    """One micro-batch's objective; reports to `metrics`. `rolls_out` is False for a micro-batch
    that trains on the next-token loss alone."""

    context: StepContext
    batch: TextBatch
    rolls_out: bool
    denominators: Denominators
    metrics: StepAccumulator
    _entropy: list[Tensor] = field(default_factory=list)
    _hidden: list[Tensor] = field(default_factory=list)
    _tokens: list[Tensor] = field(default_factory=list)
    _log_probs: list[Tensor] = field(default_factory=list)
    _branched: _BranchContext | None = None

    @property
    def ntp_weight(self) -> float:
        """Of this micro-batch's next-token loss."""
        return self.context.config.ntp_weight if self.rolls_out else 1.0

    def read(self, out: ModelOutput, start: int, *, again: bool) -> tuple[TextPass, Tensor]:
        """What a slice from token `start` on predicts, and its part of the next-token loss; read
        again for its backward, without the entropies."""
        with_entropy = self.rolls_out and not again
        text = predict(self.context.model, out, self.batch, with_entropy=with_entropy, start=start)
        return text, ntp_loss(text, self.batch, self.denominators.targets)

    def report(self, text: TextPass, loss: Tensor) -> None:
        """Keep of a slice, read for the first time, what the rollouts and the log need."""
        self.metrics.add(WorkMetrics({"loss_ntp": loss.detach()}))
        if self.rolls_out:
            assert text.entropy is not None
            self._entropy.append(text.entropy)
            self._hidden.append(text.hidden.detach())

    def choose_branches(self) -> Branches:
        """Where rollouts leave the texts, once all slices have been read."""
        context, config = self.context, self.context.config
        entropy, hidden = torch.cat(self._entropy, dim=1), torch.cat(self._hidden, dim=1)
        branches = choose_branches(context.model, entropy, self.batch, config, context.randomness)
        streams = branches.fork(config.rollouts_per_position)
        following = streams.rows_after(hidden, config.rollout_tokens)
        self._branched = _BranchContext(branches, entropy, following)
        self._entropy, self._hidden = [], []
        return branches

    def draw(self, hidden: Tensor) -> Tensor:
        """The next token [R n] of every rollout, emitted by the hidden states [R n, d]."""
        context, config = self.context, self.context.config
        assert self._branched is not None
        with torch.no_grad():
            logits = context.model.logits(hidden[:, None])[:, 0]
        keys = context.randomness.token_keys(
            self.batch.sample_index,
            self._branched.branches,
            config.rollouts_per_position,
            len(self._tokens),
        )
        tokens, log_probs = draw_tokens(context.model, logits, keys, config.rollout_temperature)
        self._tokens.append(tokens)
        self._log_probs.append(log_probs)
        return tokens

    def policy(self, hidden: Tensor, prefix_hidden: Tensor) -> Tensor:
        """The policy loss, weighted, of the rollouts whose hidden states are [R n, k, d] and whose
        first tokens `prefix_hidden` [R n, d] emits."""
        context, config, branched = self.context, self.context.config, self._branched
        assert branched is not None
        rollouts = Rollouts(
            branched.branches, torch.stack(self._tokens, 1), torch.stack(self._log_probs, 1)
        )
        scores = score_hidden(
            context.model, hidden, prefix_hidden, rollouts.tokens, config.rollout_temperature
        )
        scored = reward_rollouts(branched.following, self.batch, rollouts, scores, config)
        loss, sums = policy_loss(scores.log_probs, scored, config, self.denominators.rollouts)
        described = rollout_metrics(self.batch, branched.entropy, scored)
        self.metrics.add(WorkMetrics(sums | described.sums, described.texts))
        return config.policy_weight * loss
