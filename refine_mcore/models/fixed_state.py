"""States in fixed places, which decode passes go on from that are captured once and replayed for
other rollouts (rollout/decode_passes.py).

A captured pass repeats what it did to the same memory, and what the host knew is as it was. So all
that tells rollouts apart is here the contents of tensors, how many tokens a stream has made and
where its text lies too, and no shape changes from one pass to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from refine_kernels.attention.decode import TextPlaces
from refine_kernels.host import to_device
from torch import Tensor

from refine_mcore.models.state import FastWeightState, Piece, TokenHistory


class FixedState(FastWeightState):
    """Streams that only go on, all of them."""

    def select(self, indices: Sequence[int]) -> Self:
        raise TypeError("states in fixed places stay together")

    @classmethod
    def join(cls, parts: Sequence[Any], *, one_text: bool = True) -> Self:
        raise TypeError("states in fixed places stay where they are")


@dataclass(frozen=True)
class FixedHistory:
    """A `TokenHistory` of branches: room for the keys and values [R, tokens, kv_heads, dim] that
    they are to have of their own, of which the first `count` [1] are there, and the places of the
    text's."""

    own: Piece
    count: Tensor
    text: TextPlaces

    @classmethod
    def of(cls, history: TokenHistory, tokens: int) -> FixedHistory | None:
        """With room for so many tokens; None for streams whose text is in several pieces or that
        have tokens of their own."""
        if history.text is None or len(history.text) != 1 or history.own_length > 0:
            return None
        (text,) = history.text
        if any(x.stride(-1) != 1 for x in text):
            return None
        streams = len(history.rows)
        own = tuple(x.new_empty(streams, tokens, *x.shape[2:]) for x in text)
        keys, values = text
        return cls(
            own,
            to_device((0,), keys.device),
            TextPlaces.of(keys, values, history.rows, history.limit),
        )

    def append(self, new: Piece) -> FixedHistory:
        """With one token `new` [R, 1, ...] more, which is written into the room for it."""
        for room, x in zip(self.own, new, strict=True):
            room.index_copy_(1, self.count, x)
        return replace(self, count=self.count + 1)


@dataclass(frozen=True)
class FixedAttention(FixedState):
    """An `AttentionState` of branches: their keys and values, and the rotary cos and sin [2, R,
    tokens, 1, dim / 2] of all tokens that they have room for, if they are rotated."""

    history: FixedHistory
    angles: Tensor | None

    @property
    def num_streams(self) -> int:
        return self.history.own[0].shape[0]

    def rotary(self, length: int, dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, 1, 1, dim / 2] of the next token."""
        assert length == 1 and self.angles is not None
        cos, sin = self.angles.index_select(2, self.history.count).unbind()
        return cos, sin

    def after(
        self, history: FixedHistory, length: int = 1, window: int | None = None
    ) -> FixedAttention:
        """The state after the last token in `history`, which keeps what leaves a window too."""
        return replace(self, history=history)
