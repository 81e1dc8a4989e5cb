"""LaCT's state and tape: window keys and values, fast weights in force, the open chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from refine_kernels.dispatch import ChunkWeights, FastWeights, RowNorms
from refine_kernels.streams import take_streams
from torch import Tensor

from refine_mcore.models.attention import AttentionState, AttentionTape
from refine_mcore.models.fixed_state import FixedAttention, FixedHistory, FixedState
from refine_mcore.models.state import (
    FastWeightState,
    LayerTape,
    Piece,
    TokenHistory,
    map_tensors,
)


class FastInputs(NamedTuple):
    """What the fast weights are written with, per token and fast head: fk, fv [R, T, n, d], rates
    lr [R, T, n, 3], and with momentum mu [R, T, n]."""

    fk: Tensor
    fv: Tensor
    lr: Tensor
    mu: Tensor | None

    def tensors(self) -> Piece:
        """As the tuple a `TokenHistory` keeps."""
        return (self.fk, self.fv, self.lr) + (() if self.mu is None else (self.mu,))

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> FastInputs:
        """The inverse of `tensors`."""
        fk, fv, lr, *mu = tensors
        return cls(fk, fv, lr, mu[0] if mu else None)

    def map(self, function: Callable[[Tensor], Tensor]) -> FastInputs:
        """`function` of every tensor."""
        return self.of(function(x) for x in self.tensors())


@dataclass(frozen=True)
class WeightRows:
    """The weights of some streams: in parts as they were made, and joined as the fast network reads
    them. What updates need beside that is joined once there is one: few rollouts reach it."""

    parts: tuple[FastWeights, ...]
    read: FastWeights

    @classmethod
    def of(cls, parts: Sequence[FastWeights], read: FastWeights | None = None) -> WeightRows:
        """All rows of all parts, which may have been joined where they are read."""
        if read is None:
            read = _joined_reading([FastWeights(*part.read()) for part in parts])
        return cls(tuple(parts), read)

    @classmethod
    def join(cls, of_slices: Sequence[WeightRows]) -> WeightRows:
        """All rows of all of them."""
        if len(of_slices) == 1:
            return of_slices[0]
        parts = tuple(part for rows in of_slices for part in rows.parts)
        return cls(parts, _joined_reading([rows.read for rows in of_slices]))

    @property
    def count(self) -> int:
        return self.read.w1.shape[0]

    def rows(self, rows: Sequence[int]) -> FastWeights:
        """All there is of the chosen rows."""
        if len(self.parts) == 1:
            return weight_rows(self.parts[0], rows)
        places = [(part, i) for part in self.parts for i in range(part.w1.shape[0])]
        return _join_weights([weight_rows(places[r][0], [places[r][1]]) for r in rows])


@dataclass(frozen=True)
class LaCTState(FastWeightState):
    """Window keys and values, the weights in force, the open chunk.

    Stream r uses row `weight_rows[r]` of `weights`, so that branches of one chunk share them. All
    streams have the same `norms`, those of the initial weights, which are built once a text. The
    open chunk is the last `position - start of chunk` tokens of `pending`; at the end of a full
    chunk it is that chunk, not yet written.
    """

    attention: AttentionState
    weights: WeightRows
    weight_rows: tuple[int, ...]
    norms: RowNorms
    pending: TokenHistory

    @property
    def position(self) -> tuple[int, ...]:
        """Tokens consumed by each stream."""
        return self.attention.position

    @property
    def num_streams(self) -> int:
        return len(self.position)

    def weights_of_forks(self, n: int) -> FastWeights:
        """What the fast network reads of streams that are forks, n by n: a row for all of them."""
        rows = self.weight_rows[::n]
        assert self.weight_rows == tuple(row for row in rows for _ in range(n))
        return weight_rows(self.weights.read, rows)

    def select(self, indices: Sequence[int]) -> LaCTState:
        return LaCTState(
            self.attention.select(indices),
            self.weights,
            tuple(self.weight_rows[i] for i in indices),
            self.norms,
            self.pending.select(indices),
        )

    @classmethod
    def join(cls, parts: Sequence[LaCTState], *, one_text: bool = True) -> LaCTState:
        before = accumulate((part.weights.count for part in parts), initial=0)
        return cls(
            AttentionState.join([part.attention for part in parts], one_text=one_text),
            WeightRows.join([part.weights for part in parts]),
            tuple(
                offset + row
                for part, offset in zip(parts, before, strict=False)
                for row in part.weight_rows
            ),
            parts[0].norms,
            TokenHistory.join([part.pending for part in parts], one_text=one_text),
        )


@dataclass(frozen=True)
class FixedLaCT(FixedState):
    """Of branches that reach no chunk's end: attention in fixed places, and the weights that they
    read, each row those of as many streams, one after the other."""

    attention: FixedAttention
    weights: FastWeights

    @property
    def num_streams(self) -> int:
        return self.attention.num_streams

    def after(self, history: FixedHistory) -> FixedLaCT:
        """The state after the last token in `history`."""
        return replace(self, attention=self.attention.after(history))


def open_chunk_length(position: int, chunk_size: int) -> int:
    """Tokens of the chunk in force that a stream at `position` has consumed: 1 to chunk_size, 0
    only at the start."""
    return position - weights_index(position, chunk_size) * chunk_size


def weights_index(position: int, chunk_size: int) -> int:
    """How many updates a stream at `position` has made: the one of a full chunk waits for the next
    token."""
    return max(0, -(-position // chunk_size) - 1)


@dataclass(frozen=True)
class LaCTTape(LayerTape):
    """A text's keys, values and chunk inputs, and the weights in force during each of its chunks.

    `first` is the position of the first token in `inputs`, `first_chunk` the index of the first
    entry of `chunks`.
    """

    chunk_size: int
    attention: AttentionTape
    inputs: tuple[Piece, ...]
    first: int
    chunks: ChunkWeights
    norms: RowNorms
    first_chunk: int

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> LaCTState:
        attention = self.attention.at(batch_index, offset)
        position = attention.position
        in_force = [
            (weights_index(p, self.chunk_size) - self.first_chunk, b)
            for p, b in zip(position, batch_index, strict=True)
        ]
        distinct = sorted(set(in_force))
        parts = [weight_rows(self.chunks[i], [b]) for i, b in distinct]
        weights = WeightRows.of(parts, self.chunks.reading(distinct))
        limit = [p - self.first for p in position]
        return LaCTState(
            attention,
            weights,
            tuple(distinct.index(pair) for pair in in_force),
            self.norms,
            TokenHistory.branch(self.inputs, batch_index, limit, self.chunk_size),
        )


def weight_rows(weights: FastWeights, rows: Sequence[int]) -> FastWeights:
    """The weights of the chosen rows; a single row is a view, or all there are, more are
    gathered."""

    def pick(w: Tensor) -> Tensor:
        if len(rows) == 1 and w.shape[0] > 1:
            return w[rows[0] : rows[0] + 1]
        return take_streams(w, rows)

    return map_tensors(pick, weights)


def _joined_reading(parts: Sequence[FastWeights]) -> FastWeights:
    """All rows of what the fast network reads. A stream's first weights may be in more precision
    than products take the others in."""
    if len(parts) == 1:
        return parts[0]
    least = min((part.w1.dtype for part in parts), key=lambda dtype: dtype.itemsize)
    of_w02, of_w1 = zip(*(part.read_in(least).read() for part in parts), strict=True)
    return FastWeights(torch.cat(of_w02), torch.cat(of_w1))


def _join_weights(parts: Sequence[FastWeights]) -> FastWeights:
    """All rows of all parts. Before a stream's first update its momentum buffers are zeros."""
    if len(parts) == 1:
        return parts[0]

    def initial_momentum(part: FastWeights) -> Tensor:
        rows, heads, width, hidden = part.w1.shape
        return part.w1.new_zeros(rows, heads, 3, hidden, width)

    momentum = None
    if any(part.momentum is not None for part in parts):
        momentum = torch.cat(
            [initial_momentum(p) if p.momentum is None else p.momentum for p in parts]
        )
    operands = None
    if any(part.operands is not None for part in parts):
        operands = _joined_reading([FastWeights(*part.read()) for part in parts])[:2]
    of_w02, of_w1 = zip(*(part[:2] for part in parts), strict=True)
    return FastWeights(torch.cat(of_w02), torch.cat(of_w1), momentum, operands)
