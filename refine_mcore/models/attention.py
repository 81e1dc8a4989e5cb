"""Causal softmax attention, full or over a window, of a text and of branches that left it.

`attend` is the one path: a training forward, a prefill in pieces, a decode step and the scoring of
branches differ only in what history they bring. The history is in pieces as they were made; a text
meets them joined, which its backward joins again, so that keys and values are kept once in however
many slices it is run. They are read in place by every branch, piece by piece under a mask; a window
per branch would store the text several times over. `SelfAttention` is the mixer of a hybrid's
attention layers; LaCT uses `attend` for its own window attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
)
from refine_kernels.attention.branches import Span
from refine_kernels.dispatch import (
    branch_attention,
    decode_attention,
    rms_norm,
    rotate,
    text_attention,
)
from refine_kernels.host import to_device
from refine_kernels.recompute import recomputed, remade, remaking
from torch import Tensor

from refine_mcore.models.fixed_state import FixedAttention, FixedHistory
from refine_mcore.models.mixer import Mixer, MixerOutput, MixerSubmodules
from refine_mcore.models.parallel_layers import (
    PackedColumnParallelLinear,
    Projection,
    at_least_float32,
    full_width_norm,
    norm_gain,
    replicated_parameter,
    row_sharded_parameter,
    shared_by_heads,
)
from refine_mcore.models.state import (
    FastWeightState,
    LayerTape,
    Piece,
    TokenHistory,
    join_pieces,
    piece_spans,
    reached,
)
from refine_mcore.models.transformer_config import FastWeightConfig


def rotary_table(
    positions: Sequence[int], length: int, dim: int, base: float, like: Tensor
) -> tuple[Tensor, Tensor]:
    """cos and sin [R or 1, length, 1, dim/2] of angle (positions[r] + t) * base^(-2i/dim), at least
    float32; not to be written to."""
    cos, sin = _cos_and_sin(positions, length, dim, base, like).unbind()
    return cos, sin


def _cos_and_sin(
    positions: Sequence[int], length: int, dim: int, base: float, like: Tensor
) -> Tensor:
    dtype = at_least_float32(like.dtype)
    return _rotary_table(tuple(positions), length, dim, base, dtype, like.device)


# The layers of a model ask for the same one, one after the other.
@lru_cache(maxsize=4)
def _rotary_table(
    positions: tuple[int, ...],
    length: int,
    dim: int,
    base: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    steps = torch.arange(length, device=device)[None]
    if len(set(positions)) == 1:
        steps = steps + positions[0]
    else:
        steps = to_device(positions, device)[:, None] + steps
    exponents = torch.arange(0, dim, 2, device=device, dtype=dtype) / dim
    angles = steps.to(dtype)[:, :, None, None] * base**-exponents
    return torch.stack((angles.cos(), angles.sin()))


def attend(q: Tensor, history: TokenHistory | FixedHistory, window: int | None) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v over each query's own past.

    q [R, T, heads, dim]; `history` holds (keys, values) [R, tokens, kv_heads, dim] in pieces, those
    of the same T tokens last. Query t sees the `window` keys up to and including its own (all if
    None).
    Returns [R, T, heads, dim].
    """
    if isinstance(history, FixedHistory):
        return decode_attention(q, history.own, history.count, history.text, window=window)
    if history.text is not None:
        return _branch_attention(q, history, window)
    with remaking():
        return _text_attention(q, history, window)


def _text_attention(q: Tensor, history: TokenHistory, window: int | None) -> Tensor:
    """Causal attention of the last T of a text's tokens on all of them."""
    keys, values = (remade(_join, *pieces) for pieces in zip(*history.own, strict=True))
    return text_attention(q, keys, values, window=window)


def _join(*pieces: Tensor) -> Tensor:
    """[R, T, kv_heads, dim] of all pieces' tokens; a single piece as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _branch_attention(q: Tensor, history: TokenHistory, window: int | None) -> Tensor:
    """Attention of branches: one softmax over the text's keys (shared) and each branch's own."""
    assert history.text is not None
    before = history.own_length - q.shape[1]
    # each own token takes the place of one of the text in the window
    low, high = reached(history.limit, None if window is None else window - 1 - before)
    parts, spans = [], []
    for piece, start, stop in piece_spans(history.text, low, high):
        first, length = low - start, piece[0].shape[1]
        low += stop - start
        if stop - start > length // 2:
            # the gradient of a slice is a zero tensor of the piece's size: more than it saves
            start, stop = 0, length
        parts.append(piece)
        spans.append(Span(start, stop, first))
    return branch_attention(
        q,
        join_pieces(history.own),
        parts,
        spans=tuple(spans),
        rows=history.rows,
        limit=history.limit,
        window=window,
    )


@dataclass(frozen=True)
class AttentionState(FastWeightState):
    """Keys (rotated) and values of the visible past, and the tokens consumed, of R streams."""

    history: TokenHistory
    position: tuple[int, ...]

    @classmethod
    def start(cls, streams: int) -> AttentionState:
        """Of streams before their first token."""
        return cls(TokenHistory(), (0,) * streams)

    @property
    def num_streams(self) -> int:
        return len(self.position)

    def rotary(self, length: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the next tokens: `rotary_table`."""
        return rotary_table(self.position, length, dim, base, like)

    def after(self, history: TokenHistory, length: int, window: int | None) -> AttentionState:
        """The state after `length` tokens, the last in `history`: cut to what a window can still
        see where the stream has no text behind it."""
        if window is not None and history.text is None:
            history = history.keep_last(window - 1)
        return AttentionState(history, tuple(p + length for p in self.position))

    def record(self, history: TokenHistory, length: int, window: int | None) -> AttentionTape:
        """The tape of a forward over `length` tokens of texts, the last in `history`: all streams
        at one position, none a branch."""
        assert len(set(self.position)) == 1 and history.text is None
        start = self.position[0]
        first = start + length - history.own_length
        return AttentionTape(history.own, first, start, window)

    def fixed(self, tokens: int, dim: int, base: float | None) -> FixedAttention | None:
        """In fixed places for `tokens` more tokens, of which `dim` numbers a head are rotated; None
        for streams that have none."""
        history = FixedHistory.of(self.history, tokens)
        if history is None:
            return None
        if not dim:
            return FixedAttention(history, None)
        assert base is not None
        angles = _cos_and_sin(self.position, tokens, dim, base, history.own[0])
        return FixedAttention(history, angles.expand(-1, self.num_streams, -1, -1, -1))

    def select(self, indices: Sequence[int]) -> AttentionState:
        return AttentionState(
            self.history.select(indices), tuple(self.position[i] for i in indices)
        )

    @classmethod
    def join(cls, parts: Sequence[AttentionState], *, one_text: bool = True) -> AttentionState:
        position = tuple(p for part in parts for p in part.position)
        history = TokenHistory.join([part.history for part in parts], one_text=one_text)
        return cls(history, position)


@dataclass(frozen=True)
class AttentionTape(LayerTape):
    """A text's keys and values, in pieces; `first` is the position of the first of them, `start`
    that of the forward."""

    text: tuple[Piece, ...]
    first: int
    start: int
    window: int | None

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> AttentionState:
        position = [self.start + tokens for tokens in offset]
        limit = [p - self.first for p in position]
        reach = None if self.window is None else self.window - 1
        history = TokenHistory.branch(self.text, batch_index, limit, reach)
        return AttentionState(history, tuple(position))


class SelfAttention(Mixer):
    """Grouped-query softmax attention, heads sharded over tensor-parallel ranks.

    With more ranks than key/value heads, keys and values are gathered and each rank takes the head
    that its queries meet, as in Megatron: weights stay shards, and the gather's backward sums what
    the ranks of a head have found.
    """

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
        self.head_dim = options.head_dim(config.hidden_size)
        self.rotary_dim = options.rotary_dim(config.hidden_size)
        q_size, kv_size = options.num_heads * self.head_dim, options.kv_heads * self.head_dim
        gated = options.attention_output_gate
        self.in_proj = PackedColumnParallelLinear(
            submodules.in_proj,
            config,
            [
                Projection("q_proj", 2 * q_size if gated else q_size, options.qkv_bias),
                Projection("k_proj", kv_size, options.qkv_bias),
                Projection("v_proj", kv_size, options.qkv_bias),
            ],
            self.tp_group,
        )
        if options.qk_layernorm != "none":
            self._build_qk_norms({"q_norm": q_size, "k_norm": kv_size})
        self.o_proj = self.build_output_projection(submodules, q_size)

    def _build_qk_norms(self, widths: dict[str, int]) -> None:
        self.raw_parameters = {name: f"{name}.weight" for name in widths}
        full_width = self.options.qk_layernorm == "full_width"
        if full_width:
            self.row_sharded = frozenset(widths)
        dtype = at_least_float32(self.config.params_dtype)
        for name, width in widths.items():
            self.register_parameter(
                name,
                row_sharded_parameter((width // self.tp_size,), self.config, dtype)
                if full_width
                else replicated_parameter((self.head_dim,), self.config),
            )

    def mix(
        self, tokens: Tensor, state: FastWeightState | None, output_state: bool, record: bool
    ) -> MixerOutput:
        streams, length = tokens.shape[:2]
        assert state is None or isinstance(state, AttentionState | FixedAttention)
        before: Any = AttentionState.start(streams) if state is None else state
        q, k, v, gate = self._heads(self.in_proj.split(tokens))
        if self.rotary_dim:
            assert self.options.rope_theta is not None
            table = before.rotary(length, self.rotary_dim, self.options.rope_theta, q)
            q, k = remade(rotate, q, *table), rotate(k, *table)
        window = self.options.window_size
        history = before.history.append((k, v))
        out = attend(q, history, window)
        if gate is not None:
            out = remade(_gated, out, gate)
        return MixerOutput(
            out.flatten(2),
            before.after(history, length, window) if output_state else None,
            before.record(history, length, window) if record else None,
        )

    def fixed_state(
        self, state: FastWeightState, tokens: int, rollouts: int
    ) -> FastWeightState | None:
        assert isinstance(state, AttentionState)
        return state.fixed(tokens, self.rotary_dim, self.options.rope_theta)

    def _heads(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and the gate [R, T, local heads, dim]."""
        norm, gate, dim = self.options.qk_layernorm, None, self.head_dim
        q, k, v = parts["q_proj"], parts["k_proj"], parts["v_proj"]
        if self.options.attention_output_gate:  # [query, gate] head by head
            q, gate = q.unflatten(-1, (-1, 2, dim)).unbind(-2)
        if norm == "full_width":
            q = self._full_width_norm(q.flatten(2) if q.dim() == 4 else q, self.q_norm)
            k = self._full_width_norm(k, self.k_norm)
        if self.options.kv_heads < self.tp_size:
            k, v = self._shared_head(k), self._shared_head(v)
        q, k, v = (x if x.dim() == 4 else x.unflatten(-1, (-1, dim)) for x in (q, k, v))
        if norm == "per_head":
            q, k = self._norm_per_head(q, self.q_norm), self._norm_per_head(k, self.k_norm)
        return q, k, v, gate

    def _shared_head(self, x: Tensor) -> Tensor:
        """[R, T, kv_heads * dim / tp], a part of a head, to the head of this rank's queries."""
        whole = all_gather_last_dim_from_tensor_parallel_region(x, group=self.tp_group)
        head = self.tp_group.rank() * self.options.kv_heads // self.tp_size
        return whole[..., head * self.head_dim : (head + 1) * self.head_dim]

    def _full_width_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        gain = norm_gain(weight, self.config.layernorm_zero_centered_gamma)
        return full_width_norm(x, gain, self.config.layernorm_epsilon, self.tp_group)

    def _norm_per_head(self, x: Tensor, weight: Tensor) -> Tensor:
        shared = shared_by_heads(weight, self.tp_group)
        gain = norm_gain(shared, self.config.layernorm_zero_centered_gamma)
        return remade(rms_norm, x, gain, self.config.layernorm_epsilon)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), in at least float32, of which the backward keeps nothing."""

    def product(x: Tensor, gate: Tensor) -> Tensor:
        wide = at_least_float32(x.dtype)
        return (x.to(wide) * gate.to(wide).sigmoid()).to(x.dtype)

    return recomputed(product, x, gate)
