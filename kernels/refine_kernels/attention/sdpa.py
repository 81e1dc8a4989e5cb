"""Causal attention of a text by torch's `scaled_dot_product_attention`, full or over a window.

That has no windows: queries meet the keys they can see in blocks, under a mask.  Inside
`recompute.remaking` copies that it makes of keys, values and masks are made again in the backward.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels import launch
from refine_kernels.recompute import remade

# Queries per product of windowed attention: bounds the mask and the work outside the window.
_MAX_QUERY_BLOCK = 512
# Blocks that go through a product together: bounds the gradients of their windows, which overlap.
_BLOCKS_TOGETHER = 16


def text_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v of the last T tokens of each text over all S of them.

    q [R,T,heads,dim]; k, v [R,S,kv_heads,dim], whose last T tokens are the queries' own.  A query
    sees the ``window`` keys up to and including its own, None: all of them.  Returns
    [R,T,heads,dim].
    """
    shape, kv_heads = q.shape, k.shape[2]
    streams, length, heads, dim = shape
    total, grouped = k.shape[1], heads != kv_heads
    before = total - length
    if before == 0 and (window is None or window >= total):
        if q.is_cuda:
            q, k, v = (remade(launch.aligned, x) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)
    if grouped:
        # No kernel on a GPU takes grouped heads and a mask (torch's documentation): here each
        # key/value head is a stream of its own, which its queries meet through a stride of zero.
        k, v = remade(_heads_apart, k), remade(_heads_apart, v)
        q = q.reshape(streams, -1, kv_heads, heads // kv_heads, dim).transpose(1, 2).flatten(0, 1)
    if window is None or window >= total:
        out = _masked_attention(q, k, v, before, window)
    else:
        out = _block_attention(q, k, v, before, window)
    if grouped:
        out = out.unflatten(0, (streams, kv_heads)).transpose(1, 2).reshape(shape)
    return out


def _heads_apart(x: Tensor) -> Tensor:
    """[R,S,kv_heads,dim] -> [R kv_heads,S,1,dim]."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)


@dataclass(frozen=True)
class _Windows:
    """`count` windows of `length` tokens, the first from token `low` on, each `step` tokens behind
    the one before."""

    low: int
    count: int
    step: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """x [R, T, ...] -> [R, count, length, ...]: a view, in which windows may overlap."""
        stride = x.stride()
        return x.as_strided(
            (x.shape[0], self.count, self.length, *x.shape[2:]),
            (stride[0], self.step * stride[1], *stride[1:]),
            x.storage_offset() + self.low * stride[1],
        )

    def add_to(self, x: Tensor, grad: Tensor) -> None:
        """Add what is of each window to the tokens of x, in parts that do not overlap."""
        for start in range(0, self.length, self.step):
            length = min(self.step, self.length - start)
            part = replace(self, low=self.low + start, length=length)
            part.of(x).add_(grad[:, :, start : start + length])


def _block_attention(q: Tensor, k: Tensor, v: Tensor, before: int, window: int) -> Tensor:
    """As `_masked_attention`, block by block of the queries. Blocks that see a whole window see it
    under the same mask: some of them go through a product together."""
    block, length = min(max(window, 64), _MAX_QUERY_BLOCK), q.shape[1]
    windows, sizes, start = [], [], 0
    while start < length:
        sees_all = before + start >= window - 1
        count = min((length - start) // block, _BLOCKS_TOGETHER) if sees_all else 1
        if count > 1:
            windows.append(_Windows(before + start - window + 1, count, block, block + window - 1))
        else:
            low, stop = max(0, before + start - window + 1), before + min(start + block, length)
            windows.append(_Windows(low, 1, stop - low, stop - low))
        sizes.append(min(max(1, count) * block, length - start))
        start += sizes[-1]
    keys, values = (_InWindows.apply(x, windows) for x in (k, v))
    outputs = [
        _window_attention(*parts, window)
        for parts in zip(q.split(sizes, 1), keys, values, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def _window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [R, n T, heads, dim] against windows k, v [R, n, S, heads or 1, dim], which end with the
    tokens of their queries."""
    streams, count, keys = k.shape[:3]
    q = q.unflatten(1, (count, -1))
    before = keys - q.shape[2]
    if streams > 1 and count > 1:
        of_each = [_masked_attention(*x, before, window) for x in zip(q, k, v, strict=True)]
        return torch.stack(of_each).flatten(1, 2)
    only = 0 if streams == 1 else 1
    q, k, v = (x.squeeze(only) for x in (q, k, v))
    return _masked_attention(q, k, v, before, window).unsqueeze(only).flatten(1, 2)


class _InWindows(torch.autograd.Function):
    """Views of x for several `_Windows`. They overlap, and what is kept for the backward is x; it
    adds all gradients into one tensor: that of a slice alone has the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: list[_Windows]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.windows = x.shape, windows
        return tuple(some.of(x) for some in windows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for some, grad in zip(ctx.windows, grads, strict=True):
            some.add_to(total, grad)
        return total, None


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, before: int, window: int | None) -> Tensor:
    """q [R, T, heads, dim] against k, v [R, before + T, heads or 1, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    shape = (q.shape[2], before, window, q.dtype, q.device)
    mask = remade(_causal_mask, *shape) if window is None else _window_mask(*shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _causal_mask(
    queries: int, before: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[queries, before + queries]: 0 where a query sees a key, -inf where not.

    In the form in which the kernels keep it for the backward: of a mask of bools, or of rows that
    do not begin at multiples of 16 elements, each product would keep a copy.
    """
    keys = before + queries
    key = torch.arange(-(-keys // 16) * 16, device=device)
    query = torch.arange(before, keys, device=device)[:, None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, float("-inf"))[:, :keys]


# Nearly all blocks of a text, in all layers, see the same mask.
_window_mask = lru_cache(maxsize=16)(_causal_mask)
