"""Per-token tensors of a text forward, of which branches read a few tokens later, with gradients
that stay the size of what was read."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refine_mcore.platform import without_waiting


@functools.lru_cache(maxsize=16)
def zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number to be expanded, not to be written to."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)


def gather_tokens(
    x: Tensor, batch_index: Sequence[int], start: Sequence[int], length: int
) -> Tensor:
    """x [B, T, c] -> [R, length, c]: tokens start[r], start[r] + 1, ... of text batch_index[r] for
    each stream r. Where a text has ended its last token is repeated.

    One `index_select` over all tokens: no copy of the texts.
    """
    return _select_tokens(x, _places(x, batch_index, start, length))


class RecordedTokens:
    """A per-token tensor of a text forward, [B, T, c], of which streams read a few tokens later.

    The forward must go on with `tokens`, not with the tensor recorded, and only split it. The
    gradients of what was read are then added to the gradient of `tokens` in place, as rows; an
    ordinary gather would make a zero tensor of the text's size for each reading, in every layer.
    """

    def __init__(self, x: Tensor) -> None:
        self._readings: Readings = []
        self.tokens = _Record.apply(x, self._readings) if x.requires_grad else x

    def read(self, batch_index: Sequence[int], start: Sequence[int], length: int) -> Tensor:
        """As `gather_tokens`."""
        places = _places(self.tokens, batch_index, start, length)
        if not (self.tokens.requires_grad and torch.is_grad_enabled()):
            return _select_tokens(self.tokens, places)
        return _Read.apply(self.tokens, places, self._readings)


class PlacesOfTokens:
    """Where a per-token tensor [B, T, ...] stands in the graph, without its contents: readings are
    zeros whose gradient is that of the tensor.

    The forward must go on with `carrier`, a tensor made together with it, in whose backward the
    gradient is made: for as long as one layer's backward takes, and not at all if nothing was read.
    """

    def __init__(self, x: Tensor, carrier: Tensor) -> None:
        self._readings: Readings = []
        self._zero = zero(x.dtype, x.device)
        self._x = self._zero.expand(*x.shape[:2], math.prod(x.shape[2:]))
        record = carrier.requires_grad
        self.carrier = _RecordBeside.apply(carrier, x, self._readings) if record else carrier

    def read(self, batch_index: Sequence[int], start: Sequence[int], length: int) -> Tensor:
        """Zeros [R, length, c] in the place of tokens start[r], start[r] + 1, ... of text
        batch_index[r], the dimensions past the second as one."""
        zeros = self._zero.expand(len(start), length, self._x.shape[-1])
        if not (self.carrier.requires_grad and torch.is_grad_enabled()):
            return zeros
        places = _places(self._x, batch_index, start, length)
        return _ReadPlace.apply(self.carrier, zeros, places, self._readings)


# Places [R, length] and gradient [R * length, c] of what was read.
Readings = list[tuple[Tensor, Tensor]]


def _add_readings(grad: Tensor, readings: Readings) -> None:
    """Add the gradients of all readings to that of [B, T, c], and forget them."""
    for places, rows in readings:
        grad.flatten(0, 1).index_add_(0, places.flatten(), rows)
    readings.clear()


class _Record(torch.autograd.Function):
    """Identity; backward adds the gradients that `_Read` left, which autograd runs before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, readings: Readings) -> Tensor:
        ctx.readings = readings
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The gradient of a split is a fresh tensor that nothing else holds.
        grad = grad.contiguous()
        _add_readings(grad, ctx.readings)
        return grad, None


class _Read(torch.autograd.Function):
    """`_select_tokens`; backward leaves its gradient to `_Record`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        places: Tensor,
        readings: Readings,
    ) -> Tensor:
        ctx.places, ctx.readings = places, readings
        return _select_tokens(x, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.readings.append((ctx.places, grad.reshape(-1, grad.shape[-1])))
        return None, None, None


class _RecordBeside(torch.autograd.Function):
    """Identity of the carrier; backward makes the gradient of `x` out of what was read of it."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, x: Tensor, readings: Readings) -> Tensor:
        ctx.readings, ctx.shape, ctx.dtype = readings, x.shape, x.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.readings:
            return grad, None, None
        of_x = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device)
        _add_readings(of_x.flatten(2), ctx.readings)
        return grad, of_x, None


class _ReadPlace(torch.autograd.Function):
    """The zeros it is given; backward leaves their gradient to `_RecordBeside`."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, zeros: Tensor, places: Tensor, readings: Readings
    ) -> Tensor:
        ctx.places, ctx.readings = places, readings
        return zeros.view_as(zeros)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.readings.append((ctx.places, grad.reshape(-1, grad.shape[-1])))
        return None, None, None, None


def _places(x: Tensor, batch_index: Sequence[int], start: Sequence[int], length: int) -> Tensor:
    """Where in [B * T, c] everything is that is to be read from x [B, T, c]: [R, length]."""
    return _places_on_device(tuple(batch_index), tuple(start), length, x.shape[1], x.device)


@functools.lru_cache(maxsize=256)
def _places_on_device(
    batch_index: tuple[int, ...],
    start: tuple[int, ...],
    length: int,
    tokens: int,
    device: torch.device,
) -> Tensor:
    """All layers of a model read at the same places: made once on the host, they share one copy."""
    steps = torch.arange(length)
    places = (torch.tensor(start, dtype=torch.long)[:, None] + steps).clamp(max=tokens - 1)
    texts = torch.tensor(batch_index, dtype=torch.long)[:, None]
    return without_waiting(texts * tokens + places, device)


def _select_tokens(x: Tensor, places: Tensor) -> Tensor:
    rows = x.flatten(0, 1).index_select(0, places.flatten())
    return rows.view(*places.shape, x.shape[-1])
