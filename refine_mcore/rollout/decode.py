"""Sampling k tokens for all branches together, from their states, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from refine_kernels.dispatch import log_probs_and_entropy, sample_tokens
from refine_kernels.host import without_waiting
from torch import Tensor

from refine_mcore.models.fast_weight_model import LanguageModel
from refine_mcore.models.state import FastWeightState
from refine_mcore.rollout.vocabulary import vocabulary_options


@torch.no_grad()
def decode(
    model: LanguageModel,
    states: Sequence[FastWeightState],
    logits: Tensor,
    k: int,
    keys: Tensor | None,
    temperature: float = 1.0,
    *,
    observe: Callable[[Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Roll out k tokens for R streams.

    `logits` [R, V / tp] emit the first token; `keys` [k, R], on the host, decide the draws, None
    decodes greedily. A token is drawn from softmax(logits / temperature). Returns tokens
    [R, k] and their log-probs [R, k] under that distribution as seen by these passes; `observe` is
    shown the logits [R, V / tp] that emit each, which are not kept.
    """
    tokens, log_probs = [], []
    keys = None if keys is None else without_waiting(keys, logits.device)
    for j in range(k):
        key = None if keys is None else keys[j]
        token, log_prob = draw_tokens(model, logits, key, temperature)
        tokens.append(token)
        log_probs.append(log_prob)
        if observe is not None:
            observe(logits)
        if j < k - 1:
            out = model(token[:, None], states, output_states=True)
            assert out.states is not None
            states, logits = out.states, model.logits(out.hidden)[:, 0]
    return torch.stack(tokens, 1), torch.stack(log_probs, 1)


@torch.no_grad()
def draw_tokens(
    model: LanguageModel, logits: Tensor, keys: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """One token [R] per row of logits [R, V / tp] from softmax(logits / temperature), decided by
    `keys` [R] (None: the likeliest), and its log-prob [R]."""
    options = vocabulary_options(model)
    tokens = sample_tokens(logits, keys, temperature=temperature, **options)
    log_probs, _ = log_probs_and_entropy(
        logits, tokens, with_entropy=False, temperature=temperature, **options
    )
    return tokens, log_probs
