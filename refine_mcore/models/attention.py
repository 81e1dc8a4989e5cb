"""Causal softmax attention, full or over a window, of a text and of branches that left it.

`attend` is the one path: a training forward, a prefill in pieces, a decode step and the scoring of
branches differ only in what history they bring. The text's keys are read in place by every branch,
under a mask; a window per branch would store the text several times over. `SelfAttention` is the
mixer of a hybrid's attention layers; LaCT uses `attend` and `rotate` for its own
window attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from refine_kernels.recompute import recomputed
from torch import Tensor

from refine_mcore.models.mixer import Mixer, MixerOutput, MixerSubmodules
from refine_mcore.models.parallel_layers import (
    PackedColumnParallelLinear,
    Projection,
    at_least_float32,
)
from refine_mcore.models.state import FastWeightState, LayerTape, StreamGroups, TokenHistory
from refine_mcore.models.transformer_config import FastWeightConfig
from refine_mcore.platform import to_device

# Queries per product of windowed attention: bounds the mask and the work outside the window.
_MAX_QUERY_BLOCK = 512


def rotary_table(
    positions: Sequence[int], length: int, dim: int, base: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin [R or 1, length, 1, dim/2] of angle (positions[r] + t) * base^(-2i/dim), at least
    float32."""
    dtype = at_least_float32(like.dtype)
    steps = torch.arange(length, device=like.device)[None]
    if len(set(positions)) == 1:
        steps = steps + positions[0]
    else:
        steps = to_device(positions, like.device)[:, None] + steps
    exponents = torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim
    angles = steps.to(dtype)[:, :, None, None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [R, T, heads, dim] in halves: dimension i is paired with i + dim/2."""
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def attend(q: Tensor, history: TokenHistory, window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v over each query's own past.

    q [R, T, heads, dim]; `history` holds (keys, values) [R, tokens, kv_heads, dim], those of the
    same T tokens last. Query t sees the `window` keys up to and including its own (all if None).
    Returns [R, T, heads, dim].
    """
    if history.text is not None:
        return _branch_attention(q, history, window)
    k, v = history.own
    return _text_attention(q, k, v, history.own_length - q.shape[1], window)


def _text_attention(q: Tensor, k: Tensor, v: Tensor, before: int, window: int | None) -> Tensor:
    """Causal attention of T queries on `before` + T keys, in query blocks that meet only the keys
    they can see."""
    shape, (streams, total, kv_heads, dim) = q.shape, k.shape
    grouped = shape[2] != kv_heads
    if before == 0 and (window is None or window >= total):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)
    if grouped:
        # No kernel on a GPU takes grouped heads and a mask (torch's documentation): here each
        # key/value head is a stream of its own, which its queries meet through a stride of zero.
        group = shape[2] // kv_heads
        q = q.reshape(streams, -1, kv_heads, group, dim).transpose(1, 2).flatten(0, 1)
        k, v = (x.transpose(1, 2).reshape(-1, total, 1, dim) for x in (k, v))
    if window is None or window >= total:
        out = _masked_attention(q, k, v, before, window)
    else:
        out = _block_attention(q, k, v, before, window)
    if grouped:
        out = out.unflatten(0, (streams, kv_heads)).transpose(1, 2).reshape(shape)
    return out


def _block_attention(q: Tensor, k: Tensor, v: Tensor, before: int, window: int) -> Tensor:
    """As `_masked_attention`, block by block of the queries."""
    block = min(max(window, 64), _MAX_QUERY_BLOCK)
    stops = [before + stop for stop in range(block, q.shape[1], block)] + [k.shape[1]]
    starts = [before, *stops[:-1]]
    spans = [(max(0, start - window + 1), stop) for start, stop in zip(starts, stops, strict=True)]
    blocks = zip(q.split(block, 1), _spans(k, spans), _spans(v, spans), strict=True)
    outputs = [
        _masked_attention(*parts, start - low, window)
        for parts, start, (low, _) in zip(blocks, starts, spans, strict=True)
    ]
    return torch.cat(outputs, dim=1)


def _spans(x: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """x[:, low:high] for each span. They overlap; as views, what is kept for the backward is x."""
    return _Spans.apply(x, spans)


class _Spans(torch.autograd.Function):
    """Backward adds all gradients into one tensor: that of a slice alone has the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.spans = x.shape, spans
        return tuple(x[:, low:high] for low, high in spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for (low, high), grad in zip(ctx.spans, grads, strict=True):
            total[:, low:high] += grad
        return total, None


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, before: int, window: int | None) -> Tensor:
    """q [R, T, heads, dim] against k, v [R, before + T, heads or 1, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    make_mask = _causal_mask if window is None else _window_mask
    mask = make_mask(q.shape[2], before, window, q.dtype, q.device)
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


def _branch_attention(q: Tensor, history: TokenHistory, window: int | None) -> Tensor:
    """Attention of branches: one softmax over the text's keys (shared) and each branch's own."""
    assert history.text is not None
    own_k, own_v = history.own
    text_k, text_v = history.text
    # scores over the text are [branches * k, S]: made again in the backward rather than kept
    return recomputed(_branch_attention_core, q, own_k, own_v, text_k, text_v, history, window)


def _branch_attention_core(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    history: TokenHistory,
    window: int | None,
) -> Tensor:
    streams, length, heads, dim = q.shape
    kv_heads, before = text_k.shape[2], own_k.shape[1] - length
    compute = at_least_float32(q.dtype)
    scale = dim**-0.5
    low, high = _visible_range(history.limit, before, window)
    if high - low > text_k.shape[1] // 2:
        # the gradient of a slice is a zero tensor of the text's size: more than the slice saves
        low, high = 0, text_k.shape[1]
    else:
        text_k, text_v = text_k[:, low:high], text_v[:, low:high]
    text_k, text_v = text_k.transpose(1, 2), text_v.transpose(1, 2)
    groups = StreamGroups(history.rows, text_k.shape[0])

    def by_head(x: Tensor) -> Tensor:
        """[rows, n, heads, dim] -> [rows, kv_heads, heads / kv_heads * n, dim]"""
        rows, n = x.shape[:2]
        x = x.reshape(rows, n, kv_heads, heads // kv_heads, dim)
        return x.permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, dim)

    def streams_first(x: Tensor) -> Tensor:
        """The inverse, then [streams, kv_heads, heads / kv_heads, T, last]."""
        rows, last = x.shape[0], x.shape[-1]
        x = x.reshape(rows, kv_heads, heads // kv_heads, -1, last).permute(0, 3, 1, 2, 4)
        return groups.scatter(x.contiguous()).permute(0, 2, 3, 1, 4)

    text_scores = by_head(groups.gather(q)) @ text_k.transpose(-1, -2)
    text_scores = streams_first(text_scores).to(compute) * scale
    q_own = q.reshape(streams, length, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    own_scores = (q_own @ own_k.permute(0, 2, 3, 1).unsqueeze(2)).to(compute) * scale

    query = torch.arange(length, device=q.device)[:, None] + before
    own = torch.arange(before + length, device=q.device)
    own_mask = own <= query
    limit = to_device(history.limit, q.device)[:, None, None]
    text = torch.arange(low, high, device=q.device)
    text_mask = (text < limit).expand(streams, length, -1)
    if window is not None:
        own_mask = own_mask & (own > query - window)
        text_mask = text_mask & (text > limit + query - window)
    text_scores = text_scores.masked_fill(~text_mask[:, None, None], float("-inf"))
    own_scores = own_scores.masked_fill(~own_mask, float("-inf"))

    weights = torch.cat([text_scores, own_scores], dim=-1).softmax(dim=-1).to(q.dtype)
    text_weights, own_weights = weights.split([high - low, before + length], dim=-1)
    by_stream = text_weights.permute(0, 3, 1, 2, 4).reshape(streams, length, heads, -1)
    rows = groups.gather(by_stream)
    rows = rows.reshape(groups.num_rows, -1, kv_heads, heads // kv_heads, high - low)
    rows = rows.permute(0, 2, 3, 1, 4).reshape(groups.num_rows, kv_heads, -1, high - low)
    out = streams_first(rows @ text_v) + own_weights @ own_v.transpose(1, 2).unsqueeze(2)
    return out.permute(0, 3, 1, 2, 4).reshape(streams, length, heads, dim)


def _visible_range(limit: Sequence[int], before: int, window: int | None) -> tuple[int, int]:
    """The text tokens that some branch can see which has made `before` tokens of its own, [low,
    high); never none, a hidden one where branches see none."""
    high = max(1, *limit)
    if window is None:
        return 0, high
    low = min(limit) + before - window + 1
    return min(max(0, low), high - 1), high


@dataclass(frozen=True)
class AttentionState(FastWeightState):
    """Keys (rotated) and values of the visible past, and the tokens consumed, of R streams."""

    history: TokenHistory
    position: tuple[int, ...]

    @property
    def num_streams(self) -> int:
        return len(self.position)

    def select(self, indices: Sequence[int]) -> AttentionState:
        return AttentionState(
            self.history.select(indices), tuple(self.position[i] for i in indices)
        )

    @classmethod
    def join(cls, parts: Sequence[AttentionState]) -> AttentionState:
        position = tuple(p for part in parts for p in part.position)
        return cls(TokenHistory.join([part.history for part in parts]), position)


@dataclass(frozen=True)
class AttentionTape(LayerTape):
    """A text's keys and values; `first` is the position of the first of them, `start` that of the
    forward."""

    keys: Tensor
    values: Tensor
    first: int
    start: int
    window: int | None

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> AttentionState:
        position = [self.start + tokens for tokens in offset]
        limit = [p - self.first for p in position]
        reach = None if self.window is None else self.window - 1
        history = TokenHistory.branch((self.keys, self.values), batch_index, limit, reach)
        return AttentionState(history, tuple(position))


class SelfAttention(Mixer):
    """Grouped-query softmax attention with rotary positions, heads sharded over tensor-parallel
    ranks."""

    def __init__(
        self,
        config: FastWeightConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        pg_collection: Any,
    ) -> None:
        super().__init__(config, pg_collection.tp)
        options = config.arch.attention
        assert options is not None
        self.options = options
        self.head_dim = config.hidden_size // options.num_heads
        kv_size = options.kv_heads * self.head_dim
        self.in_proj = PackedColumnParallelLinear(
            submodules.in_proj,
            config,
            [
                Projection("q_proj", config.hidden_size, options.qkv_bias),
                Projection("k_proj", kv_size, options.qkv_bias),
                Projection("v_proj", kv_size, options.qkv_bias),
            ],
            self.tp_group,
        )
        self.o_proj = self.build_output_projection(submodules, config.hidden_size)

    def mix(
        self, tokens: Tensor, state: FastWeightState | None, output_state: bool, record: bool
    ) -> MixerOutput:
        assert state is None or isinstance(state, AttentionState)
        streams, length = tokens.shape[:2]
        parts = self.in_proj.split(tokens)
        q, k, v = (
            parts[name].reshape(streams, length, -1, self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        position = state.position if state is not None else (0,) * streams
        table = rotary_table(position, length, self.head_dim, self.options.rope_theta, q)
        q, k = rotate(q, table), rotate(k, table)
        past = state.history if state is not None else None
        window = self.options.window_size
        history = TokenHistory.extend(past, (k, v))
        return MixerOutput(
            attend(q, history, window).flatten(2),
            next_attention_state(history, position, length, window) if output_state else None,
            record_text(history, position, length, window) if record else None,
        )


def next_attention_state(
    history: TokenHistory, position: Sequence[int], length: int, window: int | None
) -> AttentionState:
    """The state after `length` tokens, the last in `history`: cut to what a window can still see
    where the stream has no text behind it."""
    if window is not None and history.text is None:
        history = history.keep_last(window - 1)
    return AttentionState(history, tuple(p + length for p in position))


def record_text(
    history: TokenHistory, position: Sequence[int], length: int, window: int | None
) -> AttentionTape:
    """The tape of a forward over `length` tokens of texts, the last in `history`: all streams at
    one position, none a branch."""
    assert len(set(position)) == 1 and history.text is None
    keys, values = history.own
    first = position[0] + length - history.own_length
    return AttentionTape(keys, values, first, position[0], window)
