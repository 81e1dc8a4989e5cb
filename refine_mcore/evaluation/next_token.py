"""Next-token loss and accuracy by position in the text, in slices: of a text only the state is
kept.

Two accuracies: how often the likeliest token is the next one, and, as the paper reports it, how
often a sampled one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from refine_kernels.dispatch import combine_keys, sample_tokens
from torch import Tensor

from refine_mcore.models.fast_weight_model import LanguageModel
from refine_mcore.platform import device
from refine_mcore.rollout.vocabulary import vocabulary_options

_SLICE = 512  # tokens whose logits are made at a time


@dataclass(frozen=True)
class Bucket:
    """The next tokens at positions [start, stop) of a text: how many, the sum of their losses in
    nats, and how many of them the likeliest and a sampled token hit."""

    start: int
    stop: int
    tokens: int
    loss: float
    argmax_hits: int
    sampled_hits: int


def doubling_borders(length: int) -> list[int]:
    """Of buckets of positions up to `length`: 0, 256 and then twice as far each time."""
    borders = [0]
    while borders[-1] < length:
        borders.append(max(256, 2 * borders[-1]))
    return [*borders[:-1], length]


def next_token_scores(
    model: LanguageModel, tokens: Sequence[int], borders: Sequence[int], seed: int
) -> list[Bucket]:
    """The figures of one text, by bucket: [borders[i], borders[i + 1]). A position is the number of
    tokens before the one predicted, from 1 on. Every rank calls this and gets the same."""
    columns = token_scores(model, tokens, seed)
    found = []
    for start, stop in zip(borders, borders[1:], strict=False):
        span = slice(max(start, 1) - 1, stop - 1)
        loss, likeliest, drawn = (column[span] for column in columns)
        sums = loss.sum().item(), int(likeliest.sum()), int(drawn.sum())
        found.append(Bucket(start, stop, len(loss), *sums))
    return found


@torch.no_grad()
def token_scores(
    model: LanguageModel, tokens: Sequence[int], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token but the first: its loss in nats (float64), whether it is the likeliest one,
    and whether it is the one drawn with `seed`; each [T - 1]."""
    text = torch.tensor([list(tokens)], device=device())
    options = vocabulary_options(model)
    states = None
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, text.shape[1] - 1, _SLICE):
        out = model(text[:, start : start + _SLICE], states, start=start, output_states=True)
        states = out.states
        targets = text[0, start + 1 : start + 1 + _SLICE]
        hidden = out.hidden[:, : len(targets)]
        log_probs, _ = model.log_probs_and_entropy(hidden, targets[None], with_entropy=False)
        logits = model.logits(hidden)[0]
        keys = combine_keys(seed, torch.arange(start, start + len(targets), device=device()))
        likeliest, drawn = (sample_tokens(logits, x, **options) == targets for x in (None, keys))
        parts.append((-log_probs[0].double(), likeliest, drawn))
    losses, likeliest, drawn = (torch.cat(x) for x in zip(*parts, strict=True))
    return losses, likeliest, drawn
