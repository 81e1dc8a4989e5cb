"""The state a fast-weight layer carries, and the tape that reads it at any position of a training
forward.

*Position* is the number of tokens consumed; the first token after position p is predicted by
logits[p - 1].

A `FastWeightState` holds, for R streams, everything one layer needs to go on: it is the prefix. A
`LayerTape` is what a forward over texts [B, T] leaves behind so that the state at any position can
be read afterwards inside the autograd graph; reading gathers O(R * state) and never copies a
prefix. `StateTape` is the layers' tapes together.

Stream bookkeeping (which text a stream belongs to, how many tokens it consumed) lives on the host
as Python integers: every shape and every decision that depends on it is known without asking the
device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from refine_kernels.streams import take_streams
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to every tensor in it, through tuples, lists and dataclasses,
    in an order that only its structure decides."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)},
        )
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in `value`, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(keep, value)
    return found


def inverse(order: Sequence[int]) -> list[int]:
    """Where each of 0 .. n-1 stands in a permutation of them."""
    places = [0] * len(order)
    for place, item in enumerate(order):
        places[item] = place
    return places


@dataclass(frozen=True)
class FastWeightState(ABC):
    """What one layer carries from one token to the next, for R streams."""

    @property
    @abstractmethod
    def num_streams(self) -> int:
        """R."""

    @abstractmethod
    def select(self, indices: Sequence[int]) -> Self:
        """The states of the streams `indices` (repeats allowed). What streams have in common stays
        shared."""

    def fork(self, n: int) -> Self:
        """Every stream n times in a row: R streams become R * n, [r0, r0, …, r1, r1, …]."""
        return self.select([stream for stream in range(self.num_streams) for _ in range(n)])

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self], *, one_text: bool = True) -> Self:
        """All streams of `parts`, in that order: streams that have just left slices of the same
        texts, or with `one_text` false any texts."""


class LayerTape(ABC):
    """One layer's record of a forward over texts [B, T]."""

    @abstractmethod
    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> FastWeightState:
        """The states of R streams: stream r has consumed `offset[r]` tokens of this forward of text
        `batch_index[r]`."""


@dataclass(frozen=True)
class StateTape:
    """The tapes of a stack of layers, from one forward; `at` reads all of them."""

    layers: tuple[LayerTape, ...]
    start: int  # tokens consumed before the forward
    stop: int  # tokens consumed after it

    def at(self, batch_index: Sequence[int], position: Sequence[int]) -> list[FastWeightState]:
        """Per layer, the states of R streams at (batch_index[r], position[r]), start <= position <=
        stop."""
        batch_index, position = list(map(int, batch_index)), list(map(int, position))
        assert len(batch_index) == len(position) > 0
        assert self.start <= min(position) and max(position) <= self.stop, (
            f"positions {min(position)} to {max(position)} are not on a tape of "
            f"{self.start} to {self.stop}"
        )
        offset = [p - self.start for p in position]
        return [layer.at(batch_index, offset) for layer in self.layers]


# Consecutive tokens of some streams or texts: tensors [streams, T, ...], such as keys and values.
Piece = tuple[Tensor, ...]


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """The tokens of all pieces in one; a single piece as it is."""
    return tuple(xs[0] if len(xs) == 1 else torch.cat(xs, 1) for xs in zip(*pieces, strict=True))


def token_count(pieces: Sequence[Piece]) -> int:
    """Tokens of all pieces together."""
    return sum(piece[0].shape[1] for piece in pieces)


def piece_spans(pieces: Sequence[Piece], start: int, stop: int) -> list[tuple[Piece, int, int]]:
    """The pieces that hold some of the tokens [start, stop), each with the part of it that does,
    counted from its own first token; of no tokens an empty part of the first piece."""
    found, first = [], 0
    for piece in pieces:
        length = piece[0].shape[1]
        low, high = max(start - first, 0), min(stop - first, length)
        if low < high:
            found.append((piece, low, high))
        first += length
    return found or [(piece, 0, 0) for piece in pieces[:1]]


def slice_pieces(
    pieces: Sequence[Piece], start: int, stop: int, rows: slice = slice(None)
) -> tuple[Piece, ...]:
    """Tokens [start, stop) of the given rows, as views."""
    return tuple(
        tuple(x[rows, low:high] for x in piece)
        for piece, low, high in piece_spans(pieces, start, stop)
    )


def reached(limit: Sequence[int], reach: int | None) -> tuple[int, int]:
    """The tokens [low, high) of a text that some stream reaches which left it after `limit` tokens:
    of each the last `reach` (None: all). Never none, the last one where streams reach none."""
    high = max(1, *limit)
    return 0 if reach is None else max(0, min(min(limit) - reach, high - 1)), high


@dataclass(frozen=True)
class TokenHistory:
    """Per-token tensors (keys and values, a chunk not yet written) of the recent past of R streams.

    Stream r's past is the first `limit[r]` tokens of `text[rows[r]]`, then its own tokens. The text
    part is shared by all branches and only ever read under a mask; a stream that did not branch
    keeps its past in `own` alone. Both are pieces, one for each forward that made tokens: going on
    copies none of those before, so a text keeps its tokens once however many slices it is run in.
    Of the text a stream reads at most the last `reach` tokens before its limit (None: all of them).
    """

    own: tuple[Piece, ...] = ()
    text: tuple[Piece, ...] | None = None
    rows: tuple[int, ...] = ()
    limit: tuple[int, ...] = ()
    reach: int | None = None

    @property
    def own_length(self) -> int:
        return token_count(self.own)

    @classmethod
    def branch(
        cls,
        text: tuple[Piece, ...],
        rows: Sequence[int],
        limit: Sequence[int],
        reach: int | None = None,
    ) -> TokenHistory:
        """Streams that have just left their texts after `limit` tokens of them: no tokens of their
        own yet. Pieces that all streams leave behind are dropped, and of one of which they reach at
        most half, the rest."""
        if reach is None:
            return cls((), text, tuple(rows), tuple(limit), reach)
        low, high = reached(limit, reach)
        kept: list[Piece] = []
        dropped = low
        for piece, start, stop in piece_spans(text, low, high):
            if stop - start <= piece[0].shape[1] // 2:
                piece = tuple(x[:, start:stop] for x in piece)
            elif not kept:
                dropped -= start
            kept.append(piece)
        return cls((), tuple(kept), tuple(rows), tuple(end - dropped for end in limit), reach)

    @classmethod
    def join(cls, parts: Sequence[TokenHistory], *, one_text: bool = True) -> TokenHistory:
        """Streams that have just left slices of the same texts, each slice with the past it kept;
        with `one_text` false each part is of texts of its own.

        Without a limit on their reach the slices kept everything: each one's text is the beginning
        of the next one's, and the longest serves all. Otherwise every slice and text becomes a row
        of its own, cut to what its streams can reach. So does every text of a part that shares none
        with the others, and every stream that never left a text.
        """
        if len(parts) == 1:
            return parts[0]
        if not any(part.own or part.text for part in parts):
            return parts[0]  # nothing in any of them
        if any(part.text is None for part in parts):
            return cls._join_rows(cls._as_texts(parts), None)
        if parts[0].reach is None and one_text:
            return cls.branch(
                max((part.text for part in parts if part.text), key=token_count),
                [row for part in parts for row in part.rows],
                [limit for part in parts for limit in part.limit],
            )
        return cls._join_rows(parts, parts[0].reach)

    @classmethod
    def _as_texts(cls, parts: Sequence[TokenHistory]) -> list[TokenHistory]:
        """Streams without a text as branches at the end of their own tokens."""
        like = next(part.own[0] for part in parts if part.own)
        found = []
        for part in parts:
            assert part.text is None
            own = part.own or (tuple(x[:1, :0] for x in like),)
            streams = own[0][0].shape[0]
            found.append(cls.branch(own, range(streams), [token_count(own)] * streams))
        return found

    @classmethod
    def _join_rows(cls, parts: Sequence[TokenHistory], reach: int | None) -> TokenHistory:
        joined: list[Piece] = []
        rows, limits = [], []
        for part in parts:
            assert part.text is not None and part.own_length == 0
            index: dict[int, tuple[int, int]] = {}  # row of the part: its new row, tokens cut off
            for row in sorted(set(part.rows)):
                limit = [end for r, end in zip(part.rows, part.limit, strict=True) if r == row]
                low, _ = reached(limit, reach)
                index[row] = len(joined), low
                of_row = slice(row, row + 1)
                joined.append(join_pieces(slice_pieces(part.text, low, max(limit), of_row)))
            rows += [index[row][0] for row in part.rows]
            limits += [end - index[r][1] for r, end in zip(part.rows, part.limit, strict=True)]
        length = max(piece[0].shape[1] for piece in joined)
        text = tuple(
            torch.cat([_pad_tokens(x, length) for x in xs]) for xs in zip(*joined, strict=True)
        )
        return cls.branch((text,), rows, limits, reach)

    @classmethod
    def extend(cls, past: TokenHistory | None, new: Piece) -> TokenHistory:
        """`past`, if there is one, with `new` [R, T, ...] behind it."""
        return cls((new,)) if past is None else past.append(new)

    def append(self, new: Piece) -> TokenHistory:
        """The history with `new` [R, T, ...] behind it."""
        return replace(self, own=(*self.own, new))

    def keep_last(self, tokens: int) -> TokenHistory:
        """Drop all but the last own tokens (streams without a text)."""
        assert self.text is None
        length = self.own_length
        return replace(self, own=slice_pieces(self.own, max(0, length - tokens), length))

    def select(self, indices: Sequence[int]) -> TokenHistory:
        """The histories of the given streams. Repeats share: own tokens become a text of their own
        if there is none."""
        length = self.own_length
        if self.text is None and length > 0 and len(set(indices)) < len(indices):
            return TokenHistory.branch(self.own, indices, [length] * len(indices))
        return replace(
            self,
            own=tuple(tuple(take_streams(x, indices) for x in piece) for piece in self.own),
            rows=tuple(self.rows[i] for i in indices if self.text),
            limit=tuple(self.limit[i] for i in indices if self.text),
        )

    def last(self, stream: int, tokens: int) -> Piece:
        """The last `tokens` tokens of one stream, each [1, tokens, ...]; copies them."""
        length = self.own_length
        of_own = min(tokens, length)
        pieces = slice_pieces(self.own, length - of_own, length, slice(stream, stream + 1))
        if tokens > of_own or not pieces:
            assert self.text is not None, "a stream holds fewer tokens than were asked for"
            row, stop = self.rows[stream], self.limit[stream]
            start = stop - (tokens - of_own)
            pieces = slice_pieces(self.text, start, stop, slice(row, row + 1)) + pieces
        return join_pieces(pieces)


def _pad_tokens(x: Tensor, length: int) -> Tensor:
    """x [1, T, ...] with zeros behind it, [1, length, ...]."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, length - x.shape[1]))
