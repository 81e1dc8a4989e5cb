"""The published schedule, kept as the reference that tests and benchmarks compare against: every
rollout runs its own prefix again, to generate, to score for old log-probs and rewards, and to
train.

Departures from the published code, so that the comparison is with the best form of copying:
generation uses a state cache (the published LaCT re-runs the prefix for every token), and prefixes
are not padded (their chunk grid is the text's). Given the same randomness its loss and gradient are
those of the `fused` mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from refine_mcore.rollout.branches import Branches
from refine_mcore.rollout.decode import decode
from refine_mcore.rollout.scoring import BranchScores, score_hidden
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import (
    Rollouts,
    ScoredRollouts,
    TextBatch,
    choose_branches,
    continuation,
    ntp_loss,
    policy_loss,
    reward_rollouts,
    rollout_metrics,
    text_pass,
)


def prefix_copy(
    model: DistributedDataParallel,
    context: StepContext,
    batches: Sequence[TextBatch],
    metrics: StepAccumulator,
) -> None:
    """Forward and backward of one optimizer step on the ReFINE loss: a backward per text and one
    per branch. Gradients are summed over them and over ranks."""
    *others, last = _losses(context, batches, metrics)
    with model.no_sync():
        for loss in others:
            loss().backward()
    last().backward()
    finalize_model_grads([model])


def _losses(
    context: StepContext, batches: Sequence[TextBatch], metrics: StepAccumulator
) -> list[Callable[[], Tensor]]:
    targets = context.global_targets(batches)
    denominator = context.policy_denominator(batches)
    items: list[Callable[[], Tensor]] = []
    for batch in batches:
        with torch.no_grad():
            scored = _collect(context, batch, metrics)
        items.append(partial(_train_on_text, context, batch, targets, metrics))
        items += [
            partial(_train_on_branch, context, batch, scored, row, denominator, metrics)
            for row in range(len(scored.rollouts.branches))
        ]
    return items


def _collect(context: StepContext, batch: TextBatch, metrics: StepAccumulator) -> ScoredRollouts:
    """Positions, rollouts, old log-probs, rewards and advantages of a batch, each branch from its
    own prefix."""
    text = text_pass(context.model, batch, with_entropy=True, record=False)
    branches, _ = choose_branches(
        context.model, text.entropy, batch, context.config, context.randomness
    )
    rows = range(len(branches))
    drawn = [_generate(context, batch, branches, row) for row in rows]
    tokens, log_probs = (torch.cat(part) for part in zip(*drawn, strict=True))
    rollouts = Rollouts(branches, tokens, log_probs)
    behind = continuation(branches, text.hidden, text.log_probs, batch, context.config)
    scores = [_score(context, batch, rollouts, row, behind.future) for row in rows]
    of_rollouts, hidden, of_future = zip(*scores, strict=True)
    future = None if behind.future is None else torch.cat(of_future)
    joined = BranchScores(torch.cat(of_rollouts), torch.cat(hidden), future)
    scored = reward_rollouts(behind, batch, rollouts, joined, context.config)
    metrics.add(*rollout_metrics(batch, text.entropy, scored))
    return scored


def _train_on_text(
    context: StepContext, batch: TextBatch, targets: Tensor, metrics: StepAccumulator
) -> Tensor:
    text = text_pass(context.model, batch, with_entropy=False, record=False)
    loss = ntp_loss(text, batch, targets)
    metrics.add({"loss_ntp": loss.detach()})
    return context.config.ntp_weight * loss


def _train_on_branch(
    context: StepContext,
    batch: TextBatch,
    scored: ScoredRollouts,
    row: int,
    denominator: float,
    metrics: StepAccumulator,
) -> Tensor:
    n = context.config.rollouts_per_position
    rows = slice(row * n, row * n + n)
    scores = _score(context, batch, scored.rollouts, row)
    loss, sums = policy_loss(scores.log_probs, scored.rows(rows), context.config, denominator)
    metrics.add(sums)
    return context.config.policy_weight * loss


def _generate(
    context: StepContext, batch: TextBatch, branches: Branches, row: int
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs [n, k] of the n rollouts of one branch, from a prefill of its prefix."""
    model, config, n = context.model, context.config, context.config.rollouts_per_position
    branch = Branches((branches.batch_index[row],), (branches.position[row],))
    out = model(_prefix(batch, branches, row)[None], output_states=True)
    assert out.states is not None
    tokens, log_probs = decode(
        model,
        [state.fork(n) for state in out.states],
        model.logits(out.hidden[:, -1:])[:, 0].expand(n, -1),
        config.rollout_tokens,
        context.randomness.token_keys(batch.sample_index, branch, n, config.rollout_tokens),
        config.rollout_temperature,
    )
    return tokens, log_probs


def _score(
    context: StepContext,
    batch: TextBatch,
    rollouts: Rollouts,
    row: int,
    future: Tensor | None = None,
) -> BranchScores:
    """Scores [n, k] of one branch's rollouts from a full pass over prefix and rollout, and over
    the text tokens `future` [R n, m] behind them."""
    n = context.config.rollouts_per_position
    prefix = _prefix(batch, rollouts.branches, row)
    tokens = rollouts.tokens[row * n : row * n + n]
    behind = None if future is None else future[row * n : row * n + n]
    read = [x for x in (prefix.expand(n, -1), tokens, behind) if x is not None]
    hidden = context.model(torch.cat(read, dim=1)).hidden
    return score_hidden(
        context.model,
        hidden[:, len(prefix) :],
        hidden[:, len(prefix) - 1],
        tokens,
        context.config.rollout_temperature,
        behind,
    )


def _prefix(batch: TextBatch, branches: Branches, row: int) -> Tensor:
    """The tokens before a branch, from the first of its document on."""
    text, position = branches.batch_index[row], branches.position[row]
    start = 0 if batch.documents is None else batch.documents.start_of(text, position)
    return batch.tokens[text, start:position]
