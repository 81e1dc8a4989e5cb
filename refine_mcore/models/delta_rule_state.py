"""State and tape of the delta-rule layers.

State of a stream: the last conv_size - 1 inputs of the convolution and S [heads, K, V], at least
float32. The tape keeps the tensors the forward made anyway and the state every `tape_interval`
tokens. A state in between has its value from running the tokens since again, without gradients. Its
gradient goes where the forward went through: to the state at the last chunk border, and to the
writes and keys of the few tokens since, S_t = decay S_border + sum_s decay k_s u_s^T
(refine_kernels/delta_rule/read.py), and so into the one backward over the text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from refine_kernels.dispatch import ChunkOutput, state_from_writes
from torch import Tensor

from refine_mcore.models.recorded_tokens import (
    PlacesOfTokens,
    RecordedTokens,
    gather_tokens,
    zero,
)
from refine_mcore.models.state import FastWeightState, LayerTape, inverse, take_streams
from refine_mcore.platform import without_waiting

L2_EPS = 1e-6  # of the norm of queries and keys

if TYPE_CHECKING:
    from refine_mcore.models.delta_rule_mixer import DeltaRuleMixer


@dataclass(frozen=True)
class DeltaRuleState(FastWeightState):
    """conv [rows, conv_size - 1, channels]: the last inputs of the convolution; recurrent [rows,
    heads, K, V]: S. Stream r has row `rows[r]` of both, so that forks share until they go on."""

    conv: Tensor
    recurrent: Tensor
    rows: tuple[int, ...]

    @classmethod
    def of(cls, conv: Tensor, recurrent: Tensor) -> DeltaRuleState:
        """Every stream has a row of its own."""
        return cls(conv, recurrent, tuple(range(recurrent.shape[0])))

    @property
    def num_streams(self) -> int:
        return len(self.rows)

    def of_streams(self) -> tuple[Tensor, Tensor]:
        """conv and recurrent with a row for each stream."""
        return take_streams(self.conv, self.rows), take_streams(self.recurrent, self.rows)

    def unshared(self) -> DeltaRuleState:
        return self.of(*self.of_streams())

    def select(self, indices: Sequence[int]) -> DeltaRuleState:
        return replace(self, rows=tuple(self.rows[i] for i in indices))

    @classmethod
    def join(cls, parts: Sequence[DeltaRuleState], *, one_text: bool = True) -> DeltaRuleState:
        if len(parts) == 1:
            return parts[0]
        conv, recurrent = zip(*(part.of_streams() for part in parts), strict=True)
        return cls.of(torch.cat(conv), torch.cat(recurrent))


class DeltaRuleTape(LayerTape):
    """Packed projections of the text, and its states at the borders of the kernel's chunks and its
    writes: of the states contents every `tape_interval` tokens, of all else places in the graph."""

    def __init__(self, mixer: DeltaRuleMixer, packed: Tensor, state: DeltaRuleState | None) -> None:
        self.mixer = mixer
        self.packed = RecordedTokens(packed)
        self.past = None if state is None else state.of_streams()[0]

    def record(self, chunk: int, text: ChunkOutput) -> Tensor:
        """Keep the states before each `chunk` tokens and the one after the text, of most only their
        places in the graph, and the place of the writes, if there is a graph; returns the output to
        go on with."""
        states = [*text.states, text.final_state]
        self.chunk, self.every = chunk, self.mixer.config.tape_interval // chunk
        kept = range(0, len(text.states), self.every)
        self.kept = dict(zip(kept, _own([states[i] for i in kept]), strict=True))
        self.kept[len(text.states)] = text.final_state.detach()
        self.places = _Places.apply(*states)
        assert text.o is not None
        self.writes = None if text.writes is None else PlacesOfTokens(text.writes, text.o)
        return text.o if self.writes is None else self.writes.carrier

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> DeltaRuleState:
        border = [t // self.chunk for t in offset]
        kept = [i if i in self.kept else i // self.every * self.every for i in border]
        starts = [i * self.chunk for i in kept]
        states = torch.stack([self.kept[i][b] for i, b in zip(kept, batch_index, strict=True)])
        with torch.no_grad():
            replay = self._replay(states, batch_index, starts, offset)
        conv = self._conv_tail(batch_index, offset)
        if self.writes is None:
            return DeltaRuleState.of(conv, replay.final_state)
        # before each stream's own chunk
        at_border = [i - j for i, j in zip(border, kept, strict=True)]
        borders = [*replay.states, replay.final_state]
        values = torch.stack([borders[i][r] for r, i in enumerate(at_border)])
        places = [_row(self.places[i], b) for i, b in zip(border, batch_index, strict=True)]
        recurrent = values + torch.cat(places)
        first = [i * self.chunk for i in border]
        length = max(t - i for t, i in zip(offset, first, strict=True))
        if length > 0:
            assert replay.writes is not None
            own = [i * self.chunk for i in at_border]
            streams = range(len(offset))
            writes = gather_tokens(replay.writes.flatten(2), streams, own, length)
            writes = writes + self.writes.read(batch_index, first, length)
            recurrent = self._advance(recurrent, batch_index, first, offset, writes)
        return DeltaRuleState.of(conv, recurrent)

    def _replay(
        self,
        states: Tensor,
        batch_index: Sequence[int],
        starts: Sequence[int],
        stops: Sequence[int],
    ) -> ChunkOutput:
        """What tokens starts[r] to stops[r] do to `states`; shorter rows are filled with writes of
        strength zero."""
        length = max(stop - start for start, stop in zip(starts, stops, strict=True))
        if length == 0:
            return ChunkOutput(None, states, [], None)
        raw, gates = self.mixer.split_packed(self.packed.read(batch_index, starts, length))
        convolved, _ = self.mixer.convolve(raw, self._conv_tail(batch_index, starts))
        _, inputs = self.mixer.recurrence_inputs(convolved, gates)
        valid = _in_span(starts, stops, length, states.device)
        beta = inputs.beta * valid
        g = None if inputs.g is None else inputs.g * valid
        inputs = inputs._replace(beta=beta, g=g)
        return self.mixer.recurrence(None, inputs, states, output_writes=True)

    def _advance(
        self,
        states: Tensor,
        batch_index: Sequence[int],
        starts: Sequence[int],
        stops: Sequence[int],
        writes: Tensor,
    ) -> Tensor:
        """`states` after the writes [R, T, heads * V] of tokens starts[r] to stops[r], with their
        gradients: keys and decays are made again, the writes have theirs from the text."""
        length = writes.shape[1]
        packed = self.packed.read(batch_index, starts, length)
        keys, g = self.mixer.keys_and_decay(packed, self._conv_tail(batch_index, starts))
        valid = _in_span(starts, stops, length, states.device)
        writes = (writes * valid).unflatten(-1, (-1, self.mixer.heads.value))
        return state_from_writes(
            states, keys, writes, None if g is None else g * valid, qk_norm_eps=L2_EPS
        )

    def _conv_tail(self, batch_index: Sequence[int], offset: Sequence[int]) -> Tensor:
        """The last conv_size - 1 inputs of the convolution before each offset."""
        width = self.mixer.conv_width - 1
        near = [r for r, t in enumerate(offset) if t < width]  # these reach back before the forward
        far = [r for r, t in enumerate(offset) if t >= width]
        tails = []
        if far:
            rows, start = [batch_index[r] for r in far], [offset[r] - width for r in far]
            tails.append(self.mixer.split_packed(self.packed.read(rows, start, width))[0])
        if near:
            texts = range(self.packed.tokens.shape[0])
            head, _ = self.mixer.split_packed(self.packed.read(texts, [0] * len(texts), width))
            past = self.past
            if past is None:
                past = head.new_zeros(head.shape[0], width, head.shape[2])
            rows, start = [batch_index[r] for r in near], [offset[r] for r in near]
            tails.append(gather_tokens(torch.cat([past, head], dim=1), rows, start, width))
        joined = tails[0] if len(tails) == 1 else torch.cat(tails)
        return take_streams(joined, inverse(far + near))


def _row(x: Tensor, row: int) -> Tensor:
    """The row as [1, ...]; the only one is x itself, whose gradient is then not made anew."""
    return x if x.shape[0] == 1 else x[row : row + 1]


def _in_span(
    starts: Sequence[int], stops: Sequence[int], length: int, device: torch.device
) -> Tensor:
    """[R, length, 1]: whether token starts[r] + j comes before stops[r]."""
    rest = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return _begin_with(rest, length, device)


@functools.lru_cache(maxsize=64)
def _begin_with(counts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    """[R, length, 1]: whether j is below counts[r].  All layers share one."""
    below = torch.arange(length) < torch.tensor(counts, dtype=torch.long)[:, None]
    return without_waiting(below[..., None], device)


def _own(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """The states outside the graph; copied together where they would keep others' memory alive."""
    states = [state.detach() for state in states]
    alone = all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in states)
    return states if alone else torch.stack(states).unbind()


class _Places(torch.autograd.Function):
    """Zeros of the shapes of states, without memory of their own; the gradients are the states'."""

    @staticmethod
    def forward(ctx: Any, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        nothing = zero(states[0].dtype, states[0].device)
        return tuple(nothing.expand(state.shape) for state in states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads
