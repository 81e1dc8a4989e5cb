"""State and tape of the delta-rule layers.

State of a stream: the last conv_size - 1 inputs of the convolution and S [heads, K, V], at least
float32. The tape keeps the tensors the forward made anyway, the writes u_s of all tokens and the
state every `tape_interval` tokens. A state in between follows from the writes and keys since,

    S_t = decay S_border + sum_s decay k_s u_s^T

(refine_kernels/delta_rule/read.py). Its gradient goes where the forward went through: to the state
at the last chunk border and to the keys and writes of the few tokens since, and so into the one
backward over the text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from refine_kernels.dispatch import ChunkOutput, state_from_writes
from refine_kernels.host import to_device
from refine_kernels.streams import take_streams
from torch import Tensor

from refine_mcore.models.recorded_tokens import RecordedTokens, gather_tokens
from refine_mcore.models.state import FastWeightState, LayerTape, inverse

L2_EPS = 1e-6  # of the norm of queries and keys

if TYPE_CHECKING:
    from refine_mcore.models.delta_rule_mixer import DeltaRuleMixer, RecurrenceInputs


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
        """The same with memory of its own for every stream."""
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
    """Per token of the text the inputs of the convolution, the keys, the log decay and the writes;
    of its states at the borders of the kernel's chunks contents every `tape_interval` tokens,
    places in the graph of all."""

    def __init__(self, mixer: DeltaRuleMixer, state: DeltaRuleState | None) -> None:
        self.mixer = mixer
        self.past = None if state is None else state.of_streams()[0]

    def record_raw(self, raw: Tensor) -> Tensor:
        """Keep the inputs of the convolution; returns those to go on with."""
        self.raw, raw = RecordedTokens.record(raw)
        return raw

    def record_inputs(self, inputs: RecurrenceInputs) -> RecurrenceInputs:
        """Keep keys and decay; returns the inputs to go on with."""
        self.keys, k = RecordedTokens.record(inputs.k)
        self.decay, g = None, inputs.g
        if g is not None:
            self.decay, g = RecordedTokens.record(g)
        return inputs._replace(k=k, g=g)

    def record_outputs(self, chunk: int, text: ChunkOutput) -> Tensor:
        """Keep the writes, the states before each `chunk` tokens and the one after the text, of
        most only their places in the graph; returns the output to go on with."""
        assert text.o is not None and text.writes is not None and text.final_state is not None
        self.writes, o = RecordedTokens.record(text.writes, made_with=text.o)
        states = [*text.states, text.final_state]
        self.chunk, self.every = chunk, self.mixer.config.tape_interval // chunk
        kept = range(0, len(text.states), self.every)
        self.kept = dict(zip(kept, _own([states[i] for i in kept]), strict=True))
        self.kept[len(text.states)] = text.final_state.detach()
        self.places = _Places.apply(*states)
        return o

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> DeltaRuleState:
        border = [t // self.chunk for t in offset]
        kept = [i if i in self.kept else i // self.every * self.every for i in border]
        states = torch.stack([self.kept[i][b] for i, b in zip(kept, batch_index, strict=True)])
        at_border = [i * self.chunk for i in border]
        with torch.no_grad():
            since = [i * self.chunk for i in kept]
            states = self._after_writes(states, batch_index, since, at_border)
        if torch.is_grad_enabled():
            places = [_row(self.places[i], b) for i, b in zip(border, batch_index, strict=True)]
            states = _InPlaces.apply(states, *places)
        states = self._after_writes(states, batch_index, at_border, offset)
        return DeltaRuleState.of(self._conv_tail(batch_index, offset), states)

    def _after_writes(
        self,
        states: Tensor,
        batch_index: Sequence[int],
        starts: Sequence[int],
        stops: Sequence[int],
    ) -> Tensor:
        """`states` after the writes of tokens starts[r] to stops[r]."""
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        length = max(counts)
        if length == 0:
            return states
        keys, writes = (x.read(batch_index, starts, length) for x in (self.keys, self.writes))
        g = None if self.decay is None else self.decay.read(batch_index, starts, length)
        return state_from_writes(
            states, keys, writes, g, counts=to_device(counts, states.device), qk_norm_eps=L2_EPS
        )

    def _conv_tail(self, batch_index: Sequence[int], offset: Sequence[int]) -> Tensor:
        """The last conv_size - 1 inputs of the convolution before each offset."""
        width = self.mixer.conv_width - 1
        near = [r for r, t in enumerate(offset) if t < width]  # these reach back before the forward
        far = [r for r, t in enumerate(offset) if t >= width]
        tails = []
        if far:
            rows, start = [batch_index[r] for r in far], [offset[r] - width for r in far]
            tails.append(self.raw.read(rows, start, width))
        if near:
            texts = range(self.raw.texts)
            head = self.raw.read(texts, [0] * len(texts), width)
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


def _own(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """The states outside the graph; copied together where they would keep others' memory alive."""
    states = [state.detach() for state in states]
    alone = all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in states)
    return states if alone else torch.stack(states).unbind()


@functools.lru_cache(maxsize=16)
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number to be expanded, not to be written to."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


class _Places(torch.autograd.Function):
    """Zeros of the shapes of states, without memory of their own; the gradients are the states'."""

    @staticmethod
    def forward(ctx: Any, *states: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        nothing = _zero(states[0].dtype, states[0].device)
        return tuple(nothing.expand(state.shape) for state in states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


class _InPlaces(torch.autograd.Function):
    """The states [R, ...]; the gradient of each goes to its place [1, ...]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, *places: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(1)
