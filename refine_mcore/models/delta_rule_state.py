"""State and tape of the delta-rule layers.

State of a stream: the last conv_size - 1 inputs of the convolution and S [heads, K, V], at least
float32. The tape keeps the tensors the forward made anyway and the state every `tape_interval`
tokens. A state in between is made again, in two parts: up to the last chunk border before it only
its value, whose gradient goes to the border that the forward went through and so into the backward
over the text; then the few tokens since, with their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refine_mcore.models.state import (
    FastWeightState,
    LayerTape,
    RecordedTokens,
    gather_tokens,
    inverse,
    take_streams,
)
from refine_mcore.platform import to_device

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

    def select(self, indices: Sequence[int]) -> DeltaRuleState:
        return replace(self, rows=tuple(self.rows[i] for i in indices))

    @classmethod
    def join(cls, parts: Sequence[DeltaRuleState]) -> DeltaRuleState:
        conv, recurrent = zip(*(part.of_streams() for part in parts), strict=True)
        return cls.of(torch.cat(conv), torch.cat(recurrent))


class DeltaRuleTape(LayerTape):
    """Packed projections of the text, and its states at the borders of the kernel's chunks:
    contents every `tape_interval` tokens, places in the graph everywhere."""

    def __init__(self, mixer: DeltaRuleMixer, packed: Tensor, state: DeltaRuleState | None) -> None:
        self.mixer = mixer
        self.packed = RecordedTokens(packed)
        self.past = None if state is None else state.of_streams()[0]

    def record_states(self, chunk: int, borders: list[Tensor], final: Tensor) -> None:
        """Keep the states before each `chunk` tokens, of most only their places in the graph, and
        the one after the text."""
        states = [*borders, final]
        self.chunk, self.every = chunk, self.mixer.config.tape_interval // chunk
        self.kept = {i: _own(x) for i, x in enumerate(states) if i % self.every == 0}
        self.kept[len(borders)] = final.detach()
        self.places = [_Place.apply(state) for state in states]

    def at(self, batch_index: Sequence[int], offset: Sequence[int]) -> DeltaRuleState:
        border = [t // self.chunk for t in offset]
        kept = [i if i in self.kept else i // self.every * self.every for i in border]
        starts, stops = [i * self.chunk for i in kept], [i * self.chunk for i in border]
        with torch.no_grad():
            states = [self.kept[i][b] for i, b in zip(kept, batch_index, strict=True)]
            values = self._replay(torch.stack(states), batch_index, starts, stops)
        places = [self.places[i][b] for i, b in zip(border, batch_index, strict=True)]
        recurrent = self._replay(values + torch.stack(places), batch_index, stops, offset)
        return DeltaRuleState.of(self._conv_tail(batch_index, offset), recurrent)

    def _replay(
        self,
        states: Tensor,
        batch_index: Sequence[int],
        starts: Sequence[int],
        stops: Sequence[int],
    ) -> Tensor:
        """`states` after tokens starts[r] to stops[r]; shorter rows are filled with writes of
        strength zero."""
        rest = [stop - start for start, stop in zip(starts, stops, strict=True)]
        length = max(rest)
        if length == 0:
            return states
        raw, gates = self.mixer.split_packed(self.packed.read(batch_index, starts, length))
        convolved, _ = self.mixer.convolve(raw, self._conv_tail(batch_index, starts))
        _, inputs = self.mixer.recurrence_inputs(convolved, gates)
        steps = torch.arange(length, device=states.device)
        valid = (steps < to_device(rest, states.device)[:, None])[..., None]
        beta = inputs.beta * valid
        g = None if inputs.g is None else inputs.g * valid
        return self.mixer.recurrence(None, inputs._replace(beta=beta, g=g), states)[1]

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
        return take_streams(torch.cat(tails), inverse(far + near))


def _own(state: Tensor) -> Tensor:
    """The state outside the graph; a copy where it would keep its neighbours' memory alive."""
    state = state.detach()
    alone = state.untyped_storage().nbytes() == state.numel() * state.element_size()
    return state if alone else state.clone()


class _Place(torch.autograd.Function):
    """Zeros of the shape of a state, without memory of their own; the gradient is the state's."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        return state.new_zeros(()).expand(state.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
