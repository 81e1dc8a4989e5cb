"""Per-token tensors of a text forward, of which branches read a few tokens later, with gradients
that stay the size of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refine_mcore.platform import to_device


def gather_tokens(
    x: Tensor, batch_index: Sequence[int], start: Sequence[int], length: int
) -> Tensor:
    """x [B, T, c] -> [R, length, c]: tokens start[r], start[r] + 1, ... of text batch_index[r] for
    each stream r. Where a text has ended its last token is repeated.

    One `index_select` over all tokens: no copy of the texts.
    """
    return _select_tokens(x, *_token_places(x, batch_index, start, length))


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
        texts, tokens = _token_places(self.tokens, batch_index, start, length)
        if not (self.tokens.requires_grad and torch.is_grad_enabled()):
            return _select_tokens(self.tokens, texts, tokens)
        return _Read.apply(self.tokens, texts, tokens, self._readings)


class PlacesOfTokens:
    """Where a per-token tensor [B, T, ...] stands in the graph, without its contents: readings are
    zeros whose gradient is that of the tensor.

    The forward must go on with `carrier`, a tensor made together with it, in whose backward the
    gradient is made: for as long as one layer's backward takes, and not at all if nothing was read.
    """

    def __init__(self, x: Tensor, carrier: Tensor) -> None:
        self._readings: Readings = []
        self._x = x.detach().new_zeros(()).expand(x.flatten(2).shape)
        record = carrier.requires_grad
        self.carrier = _RecordBeside.apply(carrier, x, self._readings) if record else carrier

    def read(self, batch_index: Sequence[int], start: Sequence[int], length: int) -> Tensor:
        """Zeros [R, length, c] in the place of tokens start[r], start[r] + 1, ... of text
        batch_index[r], the dimensions past the second as one."""
        texts, tokens = _token_places(self._x, batch_index, start, length)
        zeros = self._x.new_zeros(()).expand(*tokens.shape, self._x.shape[-1])
        if not (self.carrier.requires_grad and torch.is_grad_enabled()):
            return zeros
        return _ReadPlace.apply(self.carrier, zeros, texts, tokens, self._readings)


# Text [R, 1], token [R, length] and gradient [R * length, c] of what was read.
Readings = list[tuple[Tensor, Tensor, Tensor]]


def _add_readings(grad: Tensor, readings: Readings) -> None:
    """Add the gradients of all readings to that of [B, T, c], and forget them."""
    for texts, tokens, rows in readings:
        grad.flatten(0, 1).index_add_(0, _row_index(grad, texts, tokens), rows)
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
        texts: Tensor,
        tokens: Tensor,
        readings: Readings,
    ) -> Tensor:
        ctx.places, ctx.readings = (texts, tokens), readings
        return _select_tokens(x, texts, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        ctx.readings.append((*ctx.places, grad.reshape(-1, grad.shape[-1])))
        return None, None, None, None


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
        ctx: Any, carrier: Tensor, zeros: Tensor, texts: Tensor, tokens: Tensor, readings: Readings
    ) -> Tensor:
        ctx.places, ctx.readings = (texts, tokens), readings
        return zeros.view_as(zeros)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.readings.append((*ctx.places, grad.reshape(-1, grad.shape[-1])))
        return None, None, None, None, None


def _token_places(
    x: Tensor, batch_index: Sequence[int], start: Sequence[int], length: int
) -> tuple[Tensor, Tensor]:
    """Text [R, 1] and token [R, length] of everything to read from x [B, T, c]."""
    texts = to_device(batch_index, x.device)[:, None]
    starts = to_device(start, x.device)[:, None]
    steps = torch.arange(length, device=x.device)
    return texts, (starts + steps).clamp(max=x.shape[1] - 1)


def _select_tokens(x: Tensor, texts: Tensor, tokens: Tensor) -> Tensor:
    rows = x.flatten(0, 1).index_select(0, _row_index(x, texts, tokens))
    return rows.reshape(*tokens.shape, x.shape[-1])


def _row_index(x: Tensor, texts: Tensor, tokens: Tensor) -> Tensor:
    """Where these tokens of x [B, T, c] are in [B * T, c]."""
    return (texts * x.shape[1] + tokens).flatten()
