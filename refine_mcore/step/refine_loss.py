"""The parts a ReFINE step is made of: text pass, rollouts, rewards, losses. `pipeline/head.py` puts
them in order.

Losses are sums over the global number of valid targets, handed in as denominators, so that
micro-batches and ranks add up to the same loss at every layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from refine_kernels.host import to_device, without_waiting
from torch import Tensor
from torch.profiler import record_function

from refine_mcore.config import RefineConfig
from refine_mcore.models.fast_weight_model import LanguageModel, ModelOutput
from refine_mcore.models.packing import Documents
from refine_mcore.models.state import StateTape
from refine_mcore.objective.advantages import group_ids, group_relative_advantages
from refine_mcore.objective.losses import clipped_policy_loss
from refine_mcore.objective.positions import (
    known_up_to,
    rollout_lengths,
    select_positions,
)
from refine_mcore.objective.rewards import sequence_reward
from refine_mcore.rollout.branches import Branches, Randomness
from refine_mcore.rollout.scoring import BranchScores
from refine_mcore.step.metrics import TextRecord


@dataclass(frozen=True)
class TextBatch:
    """tokens [B, S], mask [B, S] of valid tokens (padding only behind them), sample_index [B]:
    place in the data order, on the host.

    targets [B, S]: the valid tokens that the next-token loss is over, None for all of them. Those
    of answers are the last of each text: prompt, answer, padding.

    Texts may be packed of `documents`: then all this holds of each document, what follows its valid
    tokens up to the next one being padding.
    """

    tokens: Tensor
    mask: Tensor
    sample_index: Tensor
    targets: Tensor | None = None
    documents: Documents | None = None

    @classmethod
    def of(cls, sample: dict[str, Tensor], device: torch.device) -> TextBatch:
        """On the device, of tensors on the host by their names, `documents` [B, S] the number of
        each token's document."""
        tensors = dict(sample)
        numbers = tensors.pop("documents", None)
        documents = None if numbers is None else Documents.of(numbers)
        index = tensors.pop("sample_index")
        on_device = {name: without_waiting(x, device) for name, x in tensors.items()}
        return cls(**on_device, sample_index=index, documents=documents)

    @cached_property
    def document_numbers(self) -> Tensor | None:
        """The number of each token's document in its text [B, S]; None if all are of one."""
        return None if self.documents is None else self.documents.numbers(self.tokens.device)

    def has_target(self) -> Tensor:
        """Whether the token after each is a next-token target, [B, S]; false at the last."""
        following = self.mask if self.targets is None else self.mask & self.targets
        wanted = following[:, 1:] & self.mask[:, :-1]
        if self.document_numbers is not None:
            wanted &= self.document_numbers[:, 1:] == self.document_numbers[:, :-1]
        return F.pad(wanted, (0, 1))

    def num_targets(self) -> Tensor:
        """Valid next-token targets, a 0-dim tensor."""
        return self.has_target().sum()

    def prompts(self) -> TextBatch:
        """The texts without their answers, as texts to train on."""
        assert self.targets is not None
        return replace(self, mask=self.mask & ~self.targets, targets=None)


@dataclass(frozen=True)
class TextPass:
    """One forward over tokens [start, stop) of the texts: hidden [B, T, d], log_probs and entropy
    [B, T], the tape.

    log_probs[b, t] is of the token after t and means nothing at the end of the text; entropy[b, t]
    is of the distribution that token is drawn from.
    """

    start: int
    stop: int
    hidden: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    tape: StateTape | None


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of a batch: R = B c branches, n each, sequence-major; drawn_log_probs are those the
    decode passes saw."""

    branches: Branches
    tokens: Tensor  # [R n, k]
    drawn_log_probs: Tensor  # [R n, k]


@dataclass(frozen=True)
class Continuation:
    """What rewards compare R n rollouts with: the text's own hidden states of the k tokens behind
    each branch, and for the reward `future` the m tokens behind those and their log-probs."""

    hidden: Tensor  # [R n, k, d]
    future: Tensor | None = None  # [R n, m]
    log_probs: Tensor | None = None  # [R n, m]


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with what the policy loss needs of the time they were made: old_log_probs [R n, k],
    advantages [R n], and the tokens that count, [R n, k]."""

    rollouts: Rollouts
    old_log_probs: Tensor
    rewards: Tensor
    advantages: Tensor
    counts: Tensor

    def rows(self, rows: slice) -> ScoredRollouts:
        """What the policy loss needs of some of them."""
        return ScoredRollouts(
            self.rollouts,
            self.old_log_probs[rows],
            self.rewards[rows],
            self.advantages[rows],
            self.counts[rows],
        )


@record_function("refine/text forward")
def text_pass(
    model: LanguageModel,
    batch: TextBatch,
    *,
    with_entropy: bool,
    record: bool,
) -> TextPass:
    """Forward over the texts; next-token log-probs, and if asked for entropies and the tape."""
    out = model(batch.tokens, documents=batch.documents, record=record)
    return predict(model, out, batch, with_entropy=with_entropy)


def predict(
    model: LanguageModel,
    out: ModelOutput,
    batch: TextBatch,
    *,
    with_entropy: bool,
    start: int = 0,
) -> TextPass:
    """What the forward `out` over the texts from token `start` on says of each next token."""
    stop = start + out.hidden.shape[1]
    targets = batch.tokens.roll(-1, dims=1)[:, start:stop]
    log_probs, entropy = model.log_probs_and_entropy(out.hidden, targets, with_entropy=with_entropy)
    return TextPass(start, stop, out.hidden, log_probs, entropy, out.tape)


def ntp_loss(text: TextPass, batch: TextBatch, denominator: Tensor) -> Tensor:
    """-sum log p(next token) over valid targets / denominator (Eq. 2, averaged over the whole
    batch)."""
    valid = batch.has_target()[:, text.start : text.stop]
    return _told_by_gradient(-(text.log_probs * valid).sum() / denominator)


def _told_by_gradient(loss: Tensor) -> Tensor:
    """`loss`; one that is not finite has no finite gradient either, whatever it is weighted with.

    So the norm of the gradient, which every rank knows before it steps, judges the losses as well,
    which only some ranks know.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@record_function("refine/choose positions")
def choose_branches(
    model: LanguageModel,
    entropy: Tensor | None,
    batch: TextBatch,
    config: RefineConfig,
    randomness: Randomness,
) -> tuple[Branches, int]:
    """One position per chunk and text by the text's entropy (Eq. 5, 6), and how long its rollouts
    are; brings both to the host.

    Of the first T columns' entropies [B, T] also follow positions, those up to the second value
    returned; it is S if T is.
    """
    assert entropy is not None
    length = batch.tokens.shape[1]
    read = entropy.shape[1]
    # what stands behind a text, padding or an answer, has no say
    entropy = entropy.where(batch.mask[:, :read], 0.0)
    entropy = F.pad(entropy, (0, length - read))
    margins = (config.margin_left, config.margin_right)
    uniforms = randomness.position_uniforms(batch.sample_index, config.num_chunks)
    choice: dict[str, Any] = {
        "mask": batch.mask,
        "num_chunks": config.num_chunks,
        "window": config.smoothing_window or config.rollout_tokens,
        "mode": config.selection,
        "margin": margins,
        "entropy_of": config.entropy_of,
        "documents": batch.document_numbers,
    }
    positions = select_positions(
        entropy,
        temperature=config.selection_temperature,
        uniforms=without_waiting(uniforms, entropy.device),
        ignore_masked=config.pooling_ignores_padding,
        **choice,
    )
    known = known_up_to(read, **choice)
    k, c = config.rollout_tokens, config.num_chunks
    parts = [positions, known[:, None]]
    if config.rollout_entropy is not None:
        parts.append(rollout_lengths(entropy, positions, config.rollout_entropy, k))
    table = torch.cat(parts, dim=1)
    if model.tp_group.size() > 1:
        # ranks must branch alike even if a bit of an entropy differed between them
        dist.broadcast(table, group=model.tp_group, group_src=0)
    rows = table.tolist()  # the one planned wait for the device: of a micro-batch, or of a slice
    # data that is read for rollouts has no text without room for them
    assert all(margins[0] <= p <= length - margins[1] for row in rows for p in row[:c])
    lengths = None if config.rollout_entropy is None else [row[c + 1 :] for row in rows]
    return Branches.at([row[:c] for row in rows], lengths), min(row[c] for row in rows)


def continuation(
    branches: Branches,
    hidden: Tensor,
    log_probs: Tensor | None,
    batch: TextBatch,
    config: RefineConfig,
) -> Continuation:
    """How the texts go on behind each branch: from their hidden states [B, S, d] and, which the
    reward `future` needs, next-token log-probs [B, S]."""
    streams = branches.fork(config.rollouts_per_position)
    k, m = config.rollout_tokens, config.tokens_behind
    following = streams.rows_after(hidden, k)
    if m == 0:
        return Continuation(following)
    assert log_probs is not None
    future = streams.rows_after(batch.tokens[..., None], m, skip=k)
    # log-probs stand at the token that emits, the one before
    emitted = streams.rows_after(log_probs.detach()[..., None], m, skip=k - 1)
    return Continuation(following, future[..., 0], emitted[..., 0])


@record_function("refine/reward")
def reward_rollouts(
    text: Continuation,
    batch: TextBatch,
    rollouts: Rollouts,
    scores: BranchScores,
    config: RefineConfig,
) -> ScoredRollouts:
    """Rewards against the text's own continuation (Eq. 9, 11, 12), and group-relative advantages;
    no gradient."""
    n, k = config.rollouts_per_position, config.rollout_tokens
    branches = rollouts.branches.fork(n)
    with torch.no_grad():
        lengths = to_device(branches.length or [k] * len(branches), rollouts.tokens.device)
        rewards = sequence_reward(
            config.reward,
            scores.hidden,
            text.hidden,
            rollouts.tokens,
            branches.rows_after(batch.tokens[..., None], k)[..., 0],
            cosine_weight=config.reward_weights[0],
            binary_weight=config.reward_weights[1],
            lengths=lengths,
            future_log_probs=scores.future,
            text_log_probs=text.log_probs,
        )
        groups = group_ids(
            config.grouping, batch.tokens.shape[0], config.num_chunks, n, device=rewards.device
        )
        advantages = group_relative_advantages(
            rewards, groups, config.normalize_std, config.advantage_eps
        )
        counts = torch.arange(k, device=lengths.device) < lengths[:, None]
    return ScoredRollouts(rollouts, scores.log_probs.detach(), rewards, advantages, counts)


def policy_loss(
    log_probs: Tensor, scored: ScoredRollouts, config: RefineConfig, denominator: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss of the rollouts / denominator, and the sums it reports."""
    loss, metrics = clipped_policy_loss(
        log_probs,
        scored.old_log_probs,
        scored.advantages,
        scored.counts,
        config.clip_low,
        config.clip_high,
        config.dual_clip,
        config.aggregation,
        denominator=denominator,
    )
    loss = _told_by_gradient(loss)
    tokens = scored.counts.sum()
    sums = {"clipped": metrics["clip_fraction"] * tokens, "policy_tokens": tokens}
    return loss, {"loss_policy": loss.detach()} | sums


def rollout_metrics(
    batch: TextBatch, entropy: Tensor | None, scored: ScoredRollouts
) -> tuple[dict[str, Tensor], TextRecord]:
    """What the log shows of a batch's rollouts and text entropies [B, S], once per text: what adds
    up and what does not."""
    rollouts, texts = scored.rollouts, batch.tokens.shape[0]
    assert entropy is not None
    drift = (scored.old_log_probs - rollouts.drawn_log_probs).abs().sum()
    sums = {
        "entropy": (entropy.detach() * batch.mask).sum(),
        "entropy_count": batch.mask.sum(),
        "drift": drift,
        "rollout_tokens": torch.full((), float(rollouts.tokens.numel()), device=drift.device),
    }
    positions = to_device(rollouts.branches.position, rollouts.tokens.device)
    record = TextRecord(
        without_waiting(batch.sample_index, positions.device),
        positions.reshape(texts, -1),
        rollouts.tokens.reshape(texts, -1),
        scored.rewards.reshape(texts, -1),
    )
    return sums, record
