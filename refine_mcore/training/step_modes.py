"""The modes of a training step behind one interface: what to run, in which order, for one batch.

A mode turns this rank's micro-batches into optimizer steps; each is a list of `Work`, one entry per
Megatron micro-batch, whose losses add up to

    ntp_weight * NTP + policy_weight * policy        (paper, section 3; both over global counts)

* `ntp`: the next-token loss alone.
* `fused`: one forward over the text, rollouts branched in place from its states, one backward for
  both losses.
* `two_phase`: the paper's schedule. Rollouts, old log-probs and rewards for the whole batch first,
  without gradients; then one optimizer step per mini-batch on the stored rollouts.
* `prefix_copy` (prefix_copy.py): the published way, kept as the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from refine_mcore.config import RefineConfig
from refine_mcore.rollout.scoring import BranchScores, score
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import WorkMetrics
from refine_mcore.step.refine_loss import (
    ScoredRollouts,
    TextBatch,
    TextPass,
    branch_states,
    choose_branches,
    ntp_loss,
    policy_loss,
    reward_rollouts,
    roll_out,
    rollout_metrics,
    text_pass,
)

Work = Callable[[], tuple[Tensor, WorkMetrics]]


StepMode = Callable[[StepContext, Sequence[TextBatch]], Iterator[list[Work]]]


def ntp(context: StepContext, batches: Sequence[TextBatch]) -> Iterator[list[Work]]:
    """One optimizer step on the next-token loss."""
    targets = context.global_targets(batches)

    def work(batch: TextBatch) -> tuple[Tensor, WorkMetrics]:
        text = text_pass(context.model, batch, with_entropy=False, record=False)
        loss = ntp_loss(text, batch, targets)
        return loss, WorkMetrics({"loss_ntp": loss.detach()})

    yield [partial(work, batch) for batch in batches]


def fused(context: StepContext, batches: Sequence[TextBatch]) -> Iterator[list[Work]]:
    """One optimizer step on the ReFINE loss, rollouts and training in the same pass."""
    targets = context.global_targets(batches)
    denominator = context.policy_denominator(batches)

    def work(batch: TextBatch) -> tuple[Tensor, WorkMetrics]:
        text = text_pass(context.model, batch, with_entropy=True, record=True)
        scored, scores = _branch(context, batch, text)
        policy, sums = policy_loss(scores.log_probs, scored, context.config, denominator)
        described = rollout_metrics(batch, text.entropy, scored)
        return total_loss(context.config, ntp_loss(text, batch, targets), policy, sums, described)

    yield [partial(work, batch) for batch in batches]


def two_phase(context: StepContext, batches: Sequence[TextBatch]) -> Iterator[list[Work]]:
    """Rollouts for the whole batch, then one optimizer step per mini-batch of stored rollouts."""
    stored: list[tuple[TextBatch, ScoredRollouts, WorkMetrics]] = []
    with torch.no_grad():
        for batch in batches:
            text = text_pass(context.model, batch, with_entropy=True, record=True)
            scored, _ = _branch(context, batch, text)
            stored.append((batch, scored, rollout_metrics(batch, text.entropy, scored)))
            del text

    per_step = _micro_batches_per_step(context, batches)
    for start in range(0, len(stored), per_step):
        part = stored[start : start + per_step]
        texts = [batch for batch, _, _ in part]
        targets = context.global_targets(texts)
        denominator = context.policy_denominator(texts)
        yield [partial(_train_on_stored, context, *item, targets, denominator) for item in part]


def _train_on_stored(
    context: StepContext,
    batch: TextBatch,
    scored: ScoredRollouts,
    described: WorkMetrics,
    targets: Tensor,
    denominator: float,
) -> tuple[Tensor, WorkMetrics]:
    """Phase two: text pass with gradients, score the stored rollouts from its tape."""
    model, config = context.model, context.config
    text = text_pass(model, batch, with_entropy=False, record=True)
    branches, n = scored.rollouts.branches, config.rollouts_per_position
    states = branch_states(text, branches, n)
    prefix_hidden = branches.fork(n).rows_before(text.hidden)
    scores = score(model, states, prefix_hidden, scored.rollouts.tokens, config.rollout_temperature)
    policy, sums = policy_loss(scores.log_probs, scored, config, denominator)
    return total_loss(config, ntp_loss(text, batch, targets), policy, sums, described)


def _branch(
    context: StepContext, batch: TextBatch, text: TextPass
) -> tuple[ScoredRollouts, BranchScores]:
    """Choose positions, roll out, score and reward, in place. The states are read once: detached
    for decoding, with the gradients of `text` for scoring."""
    model, config = context.model, context.config
    branches = choose_branches(model, text.entropy, batch, config, context.randomness)
    streams = branches.fork(config.rollouts_per_position)
    states = branch_states(text, branches, config.rollouts_per_position)
    first_logits = streams.rows_before(text.logits.detach())
    rollouts = roll_out(model, states, first_logits, batch, branches, config, context.randomness)
    prefix_hidden = streams.rows_before(text.hidden)
    scores = score(model, states, prefix_hidden, rollouts.tokens, config.rollout_temperature)
    following = streams.rows_after(text.hidden.detach(), config.rollout_tokens)
    return reward_rollouts(following, batch, rollouts, scores, config), scores


def _micro_batches_per_step(context: StepContext, batches: Sequence[TextBatch]) -> int:
    if context.config.mini_batch_size is None:
        return len(batches)
    sequences = batches[0].tokens.shape[0] * context.dp_group.size()
    assert context.config.mini_batch_size % sequences == 0, "data_parallel_layout refuses the rest"
    return context.config.mini_batch_size // sequences


def total_loss(
    config: RefineConfig,
    ntp_term: Tensor,
    policy: Tensor,
    sums: dict[str, Tensor],
    described: WorkMetrics,
) -> tuple[Tensor, WorkMetrics]:
    """ntp_weight * NTP + policy_weight * policy, with everything the step reports."""
    loss = config.ntp_weight * ntp_term + config.policy_weight * policy
    sums = {"loss_ntp": ntp_term.detach()} | sums | described.sums
    return loss, WorkMetrics(sums, described.texts)
