"""What the last stage makes of one micro-batch's final hidden states: losses, positions, tokens,
rewards. The parts are those of `step/refine_loss.py`, at the points where the passes of the plan
need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from refine_kernels.host import without_waiting
from torch import Tensor

from refine_mcore.models.fast_weight_model import ModelOutput
from refine_mcore.pipeline.micro_batch import MicroBatch
from refine_mcore.rollout.branches import Branches
from refine_mcore.rollout.decode import draw_tokens
from refine_mcore.rollout.scoring import score_hidden
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import (
    Continuation,
    Rollouts,
    ScoredRollouts,
    choose_branches,
    continuation,
    ntp_loss,
    policy_loss,
    predict,
    reward_rollouts,
    rollout_metrics,
)


@dataclass(frozen=True)
class Objective:
    """How the losses of an optimizer step are weighted, and what they are divided by over all
    micro-batches and ranks."""

    ntp_weight: float
    targets: Tensor
    rollouts: float


@dataclass(frozen=True)
class _BranchContext:
    """What new rollouts need of their texts: where they leave them, the texts' entropies [B, S],
    how they go on behind each branch."""

    branches: Branches
    entropy: Tensor
    text: Continuation


@dataclass
class Head:
    """One micro-batch at the end of the model; reports to `metrics`. Without an `objective` there
    are no losses: its rollouts are only made and rewarded."""

    context: StepContext
    micro_batch: MicroBatch
    objective: Objective | None
    metrics: StepAccumulator
    # In a rehearsal, where new rollouts leave every text instead of where they would.
    positions: Sequence[int] | None = None
    # The rollouts to train on: stored ones, else those that `score` has rewarded.
    scored: ScoredRollouts | None = None
    _entropy: list[Tensor] = field(default_factory=list)
    _hidden: list[Tensor] = field(default_factory=list)
    _text_log_probs: list[Tensor] = field(default_factory=list)
    _keys: Tensor | None = None  # of all draws [k, R n]
    _tokens: list[Tensor] = field(default_factory=list)
    _log_probs: list[Tensor] = field(default_factory=list)
    _branched: _BranchContext | None = None

    def __post_init__(self) -> None:
        if self.micro_batch.stored is not None:
            self.scored = self.micro_batch.stored.scored

    def read(self, out: ModelOutput, start: int, *, again: bool) -> Tensor | None:
        """The weighted next-token loss of a slice from token `start` on. What rollouts and the log
        need is kept, but not where the slice is read `again`, for its backward."""
        texts = self.micro_batch.texts
        kept = self.micro_batch.rolls_out and self.micro_batch.stored is None and not again
        text = predict(self.context.model, out, texts, with_entropy=kept, start=start)
        if kept:
            assert text.entropy is not None
            self._entropy.append(text.entropy)
            self._hidden.append(text.hidden.detach())
            if self.context.config.tokens_behind:
                self._text_log_probs.append(text.log_probs.detach())
        if self.objective is None:
            return None
        loss = ntp_loss(text, texts, self.objective.targets)
        if not again:
            self.metrics.add({"loss_ntp": loss.detach()})
        return self.objective.ntp_weight * loss

    def choose_branches(self) -> tuple[Branches, int]:
        """Where new rollouts leave the texts, and up to which position that follows from the slices
        read so far; of those behind it nothing is said."""
        context, config, texts = self.context, self.context.config, self.micro_batch.texts
        entropy = torch.cat(self._entropy, dim=1)
        branches, known = choose_branches(context.model, entropy, texts, config, context.randomness)
        if self.positions is not None:
            branches = replace(branches, position=tuple(self.positions) * len(entropy))
        if entropy.shape == texts.tokens.shape:
            hidden = torch.cat(self._hidden, dim=1)
            behind = torch.cat(self._text_log_probs, dim=1) if config.tokens_behind else None
            text = continuation(branches, hidden, behind, texts, config)
            self._branched = _BranchContext(branches, entropy, text)
            self._entropy, self._hidden, self._text_log_probs = [], [], []
        return branches, known

    def draw(self, hidden: Tensor) -> Tensor:
        """The next token [R n] of every rollout, emitted by the hidden states [R n, d]."""
        context, config = self.context, self.context.config
        assert self._branched is not None
        with torch.no_grad():
            logits = context.model.logits(hidden[:, None])[:, 0]
        if self._keys is None:
            samples, branches = self.micro_batch.texts.sample_index, self._branched.branches
            n, k = config.rollouts_per_position, config.rollout_tokens
            keys = context.randomness.token_keys(samples, branches, n, k)
            self._keys = without_waiting(keys, hidden.device)
        keys = self._keys[len(self._tokens)]
        tokens, log_probs = draw_tokens(context.model, logits, keys, config.rollout_temperature)
        self._tokens.append(tokens)
        self._log_probs.append(log_probs)
        return tokens

    def score(self, hidden: Tensor, prefix_hidden: Tensor) -> Tensor | None:
        """The weighted policy loss of the rollouts whose hidden states are [R n, k, d] and whose
        first tokens `prefix_hidden` [R n, d] emits; new ones are rewarded first, for which `hidden`
        goes on through the text tokens that the reward reads."""
        context, config = self.context, self.context.config
        rollouts = self._made() if self.scored is None else self.scored.rollouts
        scores = score_hidden(
            context.model,
            hidden,
            prefix_hidden,
            rollouts.tokens,
            config.rollout_temperature,
            None if self._branched is None else self._branched.text.future,
        )
        if self.scored is None:
            branched, texts = self._branched, self.micro_batch.texts
            assert branched is not None
            self.scored = reward_rollouts(branched.text, texts, rollouts, scores, config)
            self.metrics.add(*rollout_metrics(texts, branched.entropy, self.scored))
        if self.objective is None:
            return None
        loss, sums = policy_loss(scores.log_probs, self.scored, config, self.objective.rollouts)
        self.metrics.add(sums)
        return config.policy_weight * loss

    def _made(self) -> Rollouts:
        """The rollouts whose tokens have been drawn."""
        assert self._branched is not None
        tokens, log_probs = torch.stack(self._tokens, 1), torch.stack(self._log_probs, 1)
        return Rollouts(self._branched.branches, tokens, log_probs)
