"""Per-token tensors of a text forward, of which branches read a few tokens later, with gradients
that stay the size of what was read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from refine_kernels.host import without_waiting
from refine_kernels.recompute import readable_later
from torch import Tensor


def gather_tokens(
    x: Tensor, batch_index: Sequence[int], start: Sequence[int], length: int
) -> Tensor:
    """x [B, T, ...] -> [R, length, ...]: tokens start[r], start[r] + 1, ... of text batch_index[r]
    for each stream r. Where a text has ended its last token is repeated.

    One `index_select` over all tokens: no copy of the texts.
    """
    return _select_tokens(x, _places(x.shape[1], x.device, batch_index, start, length))


class Places(NamedTuple):
    """Tokens of texts [B, T, ...]: counted through all texts [R, length], and as text and token
    [2, R * length]."""

    token: Tensor
    of_texts: Tensor


# Where, and the gradient [R * length, ...] of what was read.
Readings = list[tuple[Places, Tensor]]


class RecordedTokens:
    """A per-token tensor x [B, T, ...] of a text forward, of which streams read a few tokens later;
    what selective recomputation makes again is made again for that.

    The gradients of what was read are added to that of x in place, as rows; an ordinary gather
    would make a zero tensor of the text's size for each reading, in every layer.
    """

    def __init__(self, x: Tensor, anchor: Tensor | None, readings: Readings) -> None:
        self._shape, self._device = x.shape, x.device
        self._contents = readable_later(x)
        # Where readings stand in the graph, without memory of its own.
        self._anchor, self._readings = anchor, readings

    @classmethod
    def record(cls, x: Tensor, made_with: Tensor | None = None) -> tuple[RecordedTokens, Tensor]:
        """Also returns what the forward must go on with: x itself, which may only be split or read
        by an operation that makes a gradient of its own; or, where nothing else reads x, a tensor
        `made_with` it, in whose backward the gradient of x is made of what was read: a sparse one,
        of rows [B, T] that may repeat, and none if nothing was read."""
        readings: Readings = []
        onward = x if made_with is None else made_with
        if not x.requires_grad:
            return cls(x, None, readings), onward
        if made_with is None:
            onward, anchor = _Record.apply(x, readings)
        else:
            onward, anchor = _RecordBeside.apply(made_with, x, readings)
        return cls(x, anchor, readings), onward

    def read(self, batch_index: Sequence[int], start: Sequence[int], length: int) -> Tensor:
        """As `gather_tokens`."""
        places = _places(self._shape[1], self._device, batch_index, start, length)
        contents = self._contents()
        if self._anchor is None or not torch.is_grad_enabled():
            return _select_tokens(contents, places)
        return _Read.apply(self._anchor, contents, places, self._readings)

    @property
    def texts(self) -> int:
        """How many there are."""
        return self._shape[0]


def _add_readings(grad: Tensor, readings: Readings) -> None:
    """Add the gradients of all readings to that of [B, T, ...], and forget them."""
    for places, rows in readings:
        grad.flatten(0, 1).index_add_(0, places.token.flatten(), rows)
    readings.clear()


def _of_readings_alone(shape: torch.Size, readings: Readings) -> Tensor | None:
    """The gradient of a tensor of which nothing but readings is used, None without any."""
    if not readings:
        return None
    places, rows = zip(*readings, strict=True)
    readings.clear()
    if len(rows) == 1:
        indices, values = places[0].of_texts, rows[0]
    else:
        indices, values = torch.cat([p.of_texts for p in places], 1), torch.cat(rows)
    return torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)


class _Record(torch.autograd.Function):
    """Identity; backward adds the gradients that `_Read` left, which autograd runs before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, readings: Readings) -> tuple[Tensor, Tensor]:
        ctx.readings, ctx.shape = readings, x.shape
        ctx.set_materialize_grads(False)  # the anchor's would be zeros for nobody
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:
        if grad is None:  # nothing else went on with it
            found = _of_readings_alone(ctx.shape, ctx.readings)
            return None if found is None else found.to_dense(), None
        # The gradient of a split is a fresh tensor that nothing else holds.
        grad = grad.contiguous()
        _add_readings(grad, ctx.readings)
        return grad, None


class _Read(torch.autograd.Function):
    """`_select_tokens`; backward leaves its gradient to `_Record` or `_RecordBeside`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, places: Places, readings: Readings) -> Tensor:
        ctx.places, ctx.readings = places, readings
        return _select_tokens(x, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.readings.append((ctx.places, grad.flatten(0, 1)))
        return None, None, None, None


class _RecordBeside(torch.autograd.Function):
    """Identity of the tensor made with x; backward makes the gradient of x out of what was read."""

    @staticmethod
    def forward(
        ctx: Any, made_with: Tensor, x: Tensor, readings: Readings
    ) -> tuple[Tensor, Tensor]:
        ctx.readings, ctx.shape = readings, x.shape
        ctx.set_materialize_grads(False)
        return made_with.view_as(made_with), x.new_empty(0)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        return grad, _of_readings_alone(ctx.shape, ctx.readings), None


def _places(
    tokens: int,
    device: torch.device,
    batch_index: Sequence[int],
    start: Sequence[int],
    length: int,
) -> Places:
    """Where everything is that is to be read from texts of T `tokens`."""
    return _places_on_device(tokens, device, tuple(batch_index), tuple(start), length)


@functools.lru_cache(maxsize=256)
def _places_on_device(
    tokens: int,
    device: torch.device,
    batch_index: tuple[int, ...],
    start: tuple[int, ...],
    length: int,
) -> Places:
    """All layers of a model read at the same places: made once on the host, they share one copy."""
    with torch.inference_mode(False):  # whoever takes it from here may need it for a backward
        steps = torch.arange(length)
        places = (torch.tensor(start, dtype=torch.long)[:, None] + steps).clamp(max=tokens - 1)
        texts = torch.tensor(batch_index, dtype=torch.long)[:, None]
        pairs = torch.stack((texts.expand_as(places), places)).flatten(1)
        found = texts * tokens + places, pairs
        return Places(*(without_waiting(x, device) for x in found))


def _select_tokens(x: Tensor, places: Places) -> Tensor:
    rows = x.flatten(0, 1).index_select(0, places.token.flatten())
    return rows.view(*places.token.shape, *x.shape[2:])
