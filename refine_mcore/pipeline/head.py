"""What the last stage makes of one micro-batch's final hidden states: losses, positions, tokens,
rewards.

It is the same step as `training/step_modes.py` describes for whole texts, from the same parts
(`training/refine_loss.py`), taken apart at the points where the pipeline goes on elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from refine_mcore.models.fast_weight_model import ModelOutput
from refine_mcore.rollout.branches import Branches
from refine_mcore.rollout.decode import draw_tokens
from refine_mcore.rollout.scoring import score_hidden
from refine_mcore.training.refine_loss import (
    Rollouts,
    TextBatch,
    TextPass,
    choose_branches,
    describe,
    ntp_loss,
    policy_loss,
    predict,
    reward_rollouts,
)
from refine_mcore.training.step_metrics import StepAccumulator, WorkMetrics
from refine_mcore.training.step_modes import StepContext


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

    def read(self, out: ModelOutput, start: int) -> tuple[TextPass, Tensor]:
        """What a slice from token `start` on predicts, and its part of the loss."""
        text = predict(
            self.context.model, out, self.batch, with_entropy=self.rolls_out, start=start
        )
        loss = ntp_loss(text, self.batch, self.denominators.targets)
        weight = self.context.config.ntp_weight if self.rolls_out else 1.0
        return text, weight * loss

    def report(self, text: TextPass) -> None:
        """Keep of a slice, read for the first time, what the rollouts and the log need."""
        loss = ntp_loss(text, self.batch, self.denominators.targets)
        self.metrics.add(WorkMetrics({"loss_ntp": loss.detach()}))
        if self.rolls_out:
            assert text.entropy is not None
            self._entropy.append(text.entropy)
            self._hidden.append(text.hidden.detach())

    def choose_branches(self) -> Branches:
        """Where rollouts leave the texts, once all slices have been read."""
        context, config = self.context, self.context.config
        self._whole_entropy = torch.cat(self._entropy, dim=1)
        self._branches = choose_branches(
            context.model, self._whole_entropy, self.batch, config, context.randomness
        )
        self._streams = self._branches.fork(config.rollouts_per_position)
        hidden = torch.cat(self._hidden, dim=1)
        self._following = self._streams.rows_after(hidden, config.rollout_tokens)
        self._entropy, self._hidden = [], []
        return self._branches

    def draw(self, hidden: Tensor) -> Tensor:
        """The next token [R n] of every rollout, emitted by the hidden states [R n, d]."""
        context, config = self.context, self.context.config
        with torch.no_grad():
            logits = context.model.logits(hidden[:, None])[:, 0]
        keys = context.randomness.token_keys(
            self.batch.sample_index,
            self._branches,
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
        context, config = self.context, self.context.config
        rollouts = Rollouts(
            self._branches, torch.stack(self._tokens, 1), torch.stack(self._log_probs, 1)
        )
        scores = score_hidden(
            context.model, hidden, prefix_hidden, rollouts.tokens, config.rollout_temperature
        )
        scored = reward_rollouts(self._following, self.batch, rollouts, scores, config)
        loss, sums = policy_loss(scores.log_probs, scored, config, self.denominators.rollouts)
        described = describe(self.batch, self._whole_entropy, scored)
        self.metrics.add(WorkMetrics(sums | described.sums, described.texts))
        return config.policy_weight * loss
