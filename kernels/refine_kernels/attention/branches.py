"""Attention of branches: over the text that they left, in place, and over their own tokens."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from refine_kernels.host import to_device
from refine_kernels.recompute import recomputed
from refine_kernels.streams import StreamGroups


class Span(NamedTuple):
    """Tokens [start, stop) of a piece, whose own first token is token `first` of the text."""

    start: int
    stop: int
    first: int

    def of(self, x: Tensor) -> Tensor:
        """The span of x [R, T, ...]."""
        whole = self.start == 0 and self.stop == x.shape[1]
        return x if whole else x[:, self.start : self.stop]

    def tokens(self, device: torch.device) -> Tensor:
        """Which tokens of the text these are."""
        return torch.arange(self.start, self.stop, device=device) + self.first


def branch_attention(
    q: Tensor,
    own: tuple[Tensor, ...],
    text: Sequence[tuple[Tensor, ...]],
    *,
    spans: tuple[Span, ...],
    rows: Sequence[int],
    limit: Sequence[int],
    window: int | None,
) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v of streams that have left their texts: one softmax over the
    text's keys, which all of a text's streams share, and each stream's own.

    q [R,T,heads,dim]; ``own`` keys and values [R,N,kv_heads,dim], of which the last T are the
    queries' own; ``text`` keys and values [B,S_i,kv_heads,dim] in pieces, of which streams see the
    ``spans``.  Stream r has left row rows[r] of the text after limit[r] tokens.  A query sees the
    ``window`` keys up to and including its own, its text's before its stream's, None: all of them.
    Computed in at least float32.  Returns [R,T,heads,dim] in the dtype of q.
    """
    core = partial(_core, spans=spans, window=window, rows=rows, limit=limit)
    # scores over the text are [streams T, S]: made again in the backward rather than kept
    return recomputed(core, q, *own, *(x for piece in text for x in piece))


def _core(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    *keys_and_values: Tensor,
    spans: tuple[Span, ...],
    window: int | None,
    rows: Sequence[int],
    limit: Sequence[int],
) -> Tensor:
    streams, length, heads, dim = q.shape
    kv_heads, dtype = own_k.shape[2], q.dtype
    compute = torch.promote_types(dtype, torch.float32)
    scale = dim**-0.5
    # the attention of a text rounds no score to bfloat16 either
    q, own_k, own_v = (x.to(compute) for x in (q, own_k, own_v))
    pieces = list(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))
    text_k, text_v = zip(
        *(
            (s.of(k).to(compute), s.of(v).to(compute))
            for s, (k, v) in zip(spans, pieces, strict=True)
        ),
        strict=True,
    )
    groups = StreamGroups(rows, text_k[0].shape[0])

    def by_head(x: Tensor) -> Tensor:
        """[rows, n, heads, last] -> [rows, kv_heads, heads / kv_heads * n, last]"""
        x = x.unflatten(2, (kv_heads, heads // kv_heads))
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def streams_first(x: Tensor) -> Tensor:
        """The inverse, then [streams, kv_heads, heads / kv_heads, T, last]."""
        x = x.unflatten(2, (heads // kv_heads, -1)).permute(0, 3, 1, 2, 4)
        return groups.scatter(x.contiguous()).permute(0, 2, 3, 1, 4)

    q_rows = by_head(groups.gather(q))
    q_own = q.reshape(streams, length, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    scores = [streams_first(q_rows @ k.permute(0, 2, 3, 1)) for k in text_k]
    scores.append(q_own @ own_k.permute(0, 2, 3, 1).unsqueeze(2))

    before = own_k.shape[1] - length
    hidden = _hidden_from_branches(spans, before, length, window, tuple(limit), q.device)
    joined = torch.cat(scores, dim=-1).mul_(scale)
    with torch.no_grad():  # what weighs nothing has no gradient
        joined.masked_fill_(hidden[:, None, None], float("-inf"))
    weights = joined.softmax(dim=-1).split([x.shape[-1] for x in scores], dim=-1)
    out = weights[-1] @ own_v.transpose(1, 2).unsqueeze(2)
    for of_piece, v in zip(weights, text_v, strict=False):
        by_stream = of_piece.permute(0, 3, 1, 2, 4).reshape(streams, length, heads, -1)
        out = out + streams_first(by_head(groups.gather(by_stream)) @ v.transpose(1, 2))
    return out.permute(0, 3, 1, 2, 4).reshape(streams, length, heads, dim).to(dtype)


# The layers of a model ask for the same one, one after the other.
@lru_cache(maxsize=4)
def _hidden_from_branches(
    spans: tuple[Span, ...],
    before: int,
    length: int,
    window: int | None,
    limit: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """[streams, length, keys]: what a branch's token does not see of the text's `spans` and, behind
    them, of its own tokens."""
    streams = len(limit)
    query = torch.arange(length, device=device)[:, None] + before
    own_token = torch.arange(before + length, device=device)
    own_mask = own_token <= query
    ends = to_device(limit, device)[:, None, None]
    text_token = torch.cat([span.tokens(device) for span in spans])
    text_mask = (text_token < ends).expand(streams, length, -1)
    if window is not None:
        own_mask = own_mask & (own_token > query - window)
        text_mask = text_mask & (text_token > ends + query - window)
    return ~torch.cat([text_mask, own_mask.expand(streams, -1, -1)], dim=-1)
