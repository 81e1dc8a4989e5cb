"""Documents packed into texts, one behind the other in a row of tokens, each with its own state.

A mixer is where tokens meet, so it is the only place between embedding and loss that must know of
the borders: `Packing` hands it every document as a text of its own and lays the outputs out in rows
again. What the next slice needs of a row is the state of its last document alone.

Documents of like lengths go through a mixer together, padded behind to the longest, which a causal
layer does not notice. Those that another slice has begun, or will go on with, go alone: their
states are those after their own last token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from refine_kernels.host import to_device, without_waiting
from torch import Tensor

from refine_mcore.models.state import FastWeightState, LayerTape, inverse

# Texts of one call may be shorter than its longest by a quarter, or by these few tokens.
_PADDING = 64


@dataclass(frozen=True)
class Documents:
    """Where documents begin in `length` tokens of each of B texts: per text in ascending order.
    A text that does not begin with one goes on with the document before."""

    starts: tuple[tuple[int, ...], ...]
    length: int

    @classmethod
    def of(cls, numbers: Tensor) -> Documents:
        """From the number of each token's document [B, T], ascending, on the host."""
        assert numbers.device.type == "cpu"
        begins = numbers.diff(dim=1) != 0
        rows = (torch.nonzero(row)[:, 0] + 1 for row in begins)
        return cls(tuple((0, *row.tolist()) for row in rows), numbers.shape[1])

    def part(self, start: int, stop: int) -> Documents:
        """Of tokens [start, stop)."""
        return Documents(
            tuple(
                tuple(s - start for s in row[bisect_left(row, start) : bisect_left(row, stop)])
                for row in self.starts
            ),
            stop - start,
        )

    def start_of(self, row: int, position: int) -> int:
        """Where the document begins that holds the last of the first `position` tokens."""
        return self.starts[row][bisect_left(self.starts[row], position) - 1]

    def numbers(self, device: torch.device) -> Tensor:
        """The number of each token's document in its text, [B, T]."""
        flat = [row * self.length + start for row, s in enumerate(self.starts) for start in s]
        begins = torch.zeros(len(self.starts) * self.length, dtype=torch.int64, device=device)
        begins.index_fill_(0, to_device(flat, device), 1)
        return begins.view(len(self.starts), self.length).cumsum(1)


class _Segment(NamedTuple):
    """Tokens [start, stop) of a row: a document, or what of it lies in this forward."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class _Group(NamedTuple):
    """What goes through a mixer in one call. `begun` says that its one segment goes on with the
    state of its row, `unfinished` that the row's next slice may go on with its own."""

    segments: list[_Segment]
    begun: bool = False
    unfinished: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest."""
        return max(segment.length for segment in self.segments)

    @property
    def tokens(self) -> int:
        """Of all, with the padding."""
        return len(self.segments) * self.length


@dataclass(frozen=True)
class PackedState(FastWeightState):
    """The state of each row's last document."""

    rows: tuple[FastWeightState, ...]

    @property
    def num_streams(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> PackedState:
        return PackedState(tuple(self.rows[i] for i in indices))

    @classmethod
    def join(cls, parts: Sequence[PackedState], *, one_text: bool = True) -> PackedState:
        return cls(tuple(row for part in parts for row in part.rows))


class Packing:
    """How the documents of a forward go through its mixers.

    `output_states` says that states are asked for.
    """

    def __init__(self, documents: Documents, output_states: bool, device: torch.device) -> None:
        self._shape = len(documents.starts), documents.length
        self._groups = _groups(documents, output_states)
        self._there, self._back = _places(self._groups, documents.length, device)

    def mix(
        self,
        mix: Callable[[Tensor, FastWeightState | None, bool, bool], Any],
        tokens: Tensor,
        state: FastWeightState | None,
        record: bool,
    ) -> tuple[Tensor, FastWeightState | None, LayerTape | None]:
        """What a mixer's `mix` makes of tokens [B, T, c] document by document: outputs [B, T, v],
        the states of the rows if they are asked for, and a tape of all documents."""
        assert state is None or isinstance(state, PackedState)
        flat = tokens.flatten(0, 1)
        if self._there is not None:
            flat = flat.index_select(0, self._there)
        outputs, tapes = [], []
        states: dict[int, FastWeightState] = {}
        for group, x in zip(
            self._groups, flat.split([g.tokens for g in self._groups]), strict=True
        ):
            row = group.segments[0].row
            before = state.rows[row] if group.begun and state is not None else None
            x = x.view(len(group.segments), group.length, -1)
            output, after, tape = mix(x, before, group.unfinished, record)
            outputs.append(output.flatten(0, 1))
            tapes.append(tape)
            if after is not None:
                states[row] = after
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if self._back is not None:
            joined = joined.index_select(0, self._back)
        return (
            joined.unflatten(0, self._shape),
            PackedState(tuple(states[row] for row in sorted(states))) if states else None,
            _PackedTape(self._groups, tapes) if record else None,
        )


class _PackedTape(LayerTape):
    """The tapes of the calls that a mixer's forward consisted of."""

    def __init__(self, groups: Sequence[_Group], tapes: Sequence[LayerTape]) -> None:
        self._tapes = tapes
        # per row, in order: where each document ends and begins, its call and place there
        self._places: dict[int, list[tuple[int, int, int, int]]] = {}
        for call, group in enumerate(groups):
            for place, segment in enumerate(group.segments):
                of_row = self._places.setdefault(segment.row, [])
                of_row.append((segment.stop, segment.start, call, place))
        for of_row in self._places.values():
            of_row.sort()

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> FastWeightState:
        found: dict[int, list[tuple[int, int, int]]] = {}
        for stream, (row, tokens) in enumerate(zip(batch_index, offset, strict=True)):
            of_row = self._places[row]
            # the document that holds the last of these tokens
            _, start, call, place = of_row[bisect_left(of_row, (tokens,))]
            found.setdefault(call, []).append((stream, place, tokens - start))
        states = []
        for call, streams in found.items():
            _, places, offsets = zip(*streams, strict=True)
            states.append(self._tapes[call].at(places, offsets))
        order = [stream for streams in found.values() for stream, *_ in streams]
        return type(states[0]).join(states, one_text=False).select(inverse(order))


def _groups(documents: Documents, output_states: bool) -> list[_Group]:
    alone: list[_Group] = []
    together: list[_Segment] = []
    for row, starts in enumerate(documents.starts):
        begun = not starts or starts[0] > 0
        borders = [*([0] if begun else []), *starts, documents.length]
        for start, stop in pairwise(borders):
            segment = _Segment(row, start, stop)
            goes_on = begun and start == 0
            unfinished = output_states and stop == documents.length
            if goes_on or unfinished:
                alone.append(_Group([segment], goes_on, unfinished))
            else:
                together.append(segment)
    together.sort(key=lambda segment: segment.length, reverse=True)
    groups: list[_Group] = []
    for segment in together:
        longest = groups[-1].length if groups else 0
        if segment.length + max(_PADDING, longest // 4) < longest or not groups:
            groups.append(_Group([]))
        groups[-1].segments.append(segment)
    return alone + groups


def _places(
    groups: Sequence[_Group], length: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Which token of the flattened texts goes to each place in the flattened calls, and the place
    each token comes back from; None if all stay where they are."""
    there = np.empty(sum(group.tokens for group in groups), dtype=np.int64)
    back = np.empty(sum(s.length for group in groups for s in group.segments), dtype=np.int64)
    place = 0
    for group in groups:
        for row, start, stop in group.segments:
            first, last = row * length + start, row * length + stop - 1
            # behind a text its last token again
            there[place : place + group.length] = np.minimum(
                np.arange(first, first + group.length), last
            )
            back[first : last + 1] = np.arange(place, place + last + 1 - first)
            place += group.length
    if np.array_equal(there, np.arange(len(there))):
        return None, None
    moved = [without_waiting(torch.from_numpy(indices), device) for indices in (there, back)]
    return moved[0], moved[1]
