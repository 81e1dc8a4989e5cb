"""Causal attention by definition: every query against every key."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refine_kernels.attention.branches import Span


def naive_text_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Same arguments and result as text_attention."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    key = torch.arange(k.shape[1], device=q.device)
    query = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def naive_branch_attention(
    q: Tensor,
    own: tuple[Tensor, ...],
    text: Sequence[tuple[Tensor, ...]],
    *,
    spans: tuple[Span, ...],
    rows: Sequence[int],
    limit: Sequence[int],
    window: int | None,
) -> Tensor:
    """Same arguments and result as branch_attention: each stream behind a copy of its text."""
    first = spans[0].first + spans[0].start
    outputs = []
    for r, (row, end) in enumerate(zip(rows, limit, strict=True)):
        keys_and_values = []
        for i in range(2):
            pieces = [s.of(piece[i])[row : row + 1] for s, piece in zip(spans, text, strict=True)]
            keys_and_values.append(
                torch.cat([torch.cat(pieces, 1)[:, : end - first], own[i][r : r + 1]], 1)
            )
        outputs.append(naive_text_attention(q[r : r + 1], *keys_and_values, window=window))
    return torch.cat(outputs)
