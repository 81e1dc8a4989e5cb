"""Next-token loss and accuracy by position in the text, in slices: of a text only the state is
kept.

Two accuracies: how often the likeliest token is the next one, and, as the paper reports it, how
often a sampled one is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from refine_kernels.dispatch import combine_keys, sample_tokens

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


@torch.no_grad()
def next_token_scores(
    model: LanguageModel, tokens: Sequence[int], borders: Sequence[int], seed: int
) -> list[Bucket]:
    """The figures of one text, by bucket: [borders[i], borders[i + 1]). A position is the number of
    tokens before the one predicted, from 1 on. Every rank calls this and gets the same."""
    text = torch.tensor([list(tokens)], device=device())
    losses, argmax, sampled = [], [], []
    for start, piece, logits in _logits(model, text):
        targets = text[0, start + 1 : start + 1 + logits.shape[0]]
        options = vocabulary_options(model)
        logits = logits[: len(targets)]
        keys = combine_keys(seed, torch.arange(start, start + len(targets), device=device()))
        hidden = piece[:, : len(targets)]
        log_probs, _ = model.log_probs_and_entropy(hidden, targets[None], with_entropy=False)
        losses.append(-log_probs[0].double())
        argmax.append(sample_tokens(logits, None, **options) == targets)
        sampled.append(sample_tokens(logits, keys, **options) == targets)
    columns = [torch.cat(x) for x in (losses, argmax, sampled)]
    found = []
    for start, stop in zip(borders, borders[1:], strict=False):
        span = slice(max(start, 1) - 1, stop - 1)
        loss, likeliest, drawn = (column[span] for column in columns)
        sums = loss.sum().item(), int(likeliest.sum()), int(drawn.sum())
        found.append(Bucket(start, stop, len(loss), *sums))
    return found


def _logits(
    model: LanguageModel, text: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """First token, hidden states [1, n, d] and logits [n, V / tp] of every slice."""
    states = None
    for start in range(0, text.shape[1] - 1, _SLICE):
        out = model(text[:, start : start + _SLICE], states, start=start, output_states=True)
        states = out.states
        yield start, out.hidden, model.logits(out.hidden)[0]
