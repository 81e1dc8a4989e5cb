"""Log-probs and hidden states of rollouts: one forward of all branches' k tokens from their
states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refine_mcore.models.fast_weight_model import LanguageModel


class BranchScores(NamedTuple):
    """log_probs [R, k] of the rollout tokens; hidden [R, k, d], final hidden states after consuming
    each of them; future [R, m], log-probs of the text tokens that were read behind them, without a
    gradient and, as the text is read, at a temperature of 1."""

    log_probs: Tensor
    hidden: Tensor
    future: Tensor | None = None


def score_hidden(
    model: LanguageModel,
    hidden: Tensor,
    prefix_hidden: Tensor,
    tokens: Tensor,
    temperature: float,
    future: Tensor | None = None,
) -> BranchScores:
    """The scores of `tokens` [R, k], with gradients, given the hidden states [R, k + m, d] after
    each and after those of `future` [R, m].

    `prefix_hidden` [R, d] is the text's own final hidden state before each branch: it emits the
    first token. Of the k branch hidden states the last emits nothing; the reward compares it all
    the same.
    """
    behind = None
    if future is not None:
        with torch.no_grad():
            emitting = hidden.detach()[:, tokens.shape[1] - 1 : -1]
            behind = rollout_log_probs(model, emitting, future, 1.0)
        hidden = hidden[:, : tokens.shape[1]]
    emitting = torch.cat([prefix_hidden[:, None], hidden[:, :-1]], dim=1)
    return BranchScores(rollout_log_probs(model, emitting, tokens, temperature), hidden, behind)


def rollout_log_probs(
    model: LanguageModel, emitting: Tensor, tokens: Tensor, temperature: float
) -> Tensor:
    """Log-probs [R, k] of tokens [R, k] under softmax(logits / temperature) of the hidden states
    [R, k, d] that emit them."""
    log_probs, _ = model.log_probs_and_entropy(
        emitting, tokens, with_entropy=False, temperature=temperature
    )
    return log_probs
