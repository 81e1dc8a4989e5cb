"""LaCT's fast queries and keys as one pass over memory each way: what features.py computes, in
Triton.

With z = x scale + offset, y = silu(z) or z, n = |y| and q = n + eps, the gradient g of y / q is
g / q - <g, y> / (q^2 n) y of y.  Computed in float32 and rounded once.  The gradients of scale and
offset are sums over all tokens: each program sums its own, and torch adds those sums up.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement, launch
from refine_kernels.lact import features as by_torch
from refine_kernels.lact.features import FEATURE_EPS
from refine_kernels.triton_variant import Variant, integers, variant

_TILE = 2048  # numbers a program holds at a time
_WIDEST = 8192
_PROGRAMS = 512  # of a head in the backward, at most


def fast_features(x: Tensor, scale: Tensor, offset: Tensor, *, head_dim: int, silu: bool) -> Tensor:
    """As features.fast_features."""
    return _Features.apply(x, scale, offset, head_dim, silu)


def refusal(x: Tensor, scale: Tensor, offset: Tensor, *, head_dim: int, silu: bool) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    if head_dim > _WIDEST:
        return f"fast heads are {head_dim} wide, above {_WIDEST}"
    return agreement.unknown_dtype(x.dtype) or _disagreement(head_dim, silu, x.dtype, x.device)


@functools.cache
def _disagreement(dim: int, silu: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 5, 2 * dim, generator=gen),
        "scale": 1 + torch.rand(2 * dim, generator=gen),
        "offset": torch.rand(2 * dim, generator=gen),
    }

    def of(form: Any) -> agreement.Form:
        return lambda *given: [form(*given, head_dim=dim, silu=silu)]

    return agreement.disagreement(
        of(fast_features),
        of(by_torch.fast_features),
        {name: x.to(device, dtype) for name, x in inputs.items()},
        ["output"],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, head_dim: int, silu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.head_dim, ctx.silu = head_dim, silu
        run = _Run(x, scale, offset, head_dim, silu)
        out = launch.empty((*x.shape[:2], run.heads, head_dim), x.dtype, x.device)
        grid = (triton.cdiv(run.tokens, run.block), run.heads)
        launch.run(features_forward, grid, *run.tensors, out, *run.sizes, **run.constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset = ctx.saved_tensors
        run = _Run(x, scale, offset, ctx.head_dim, ctx.silu)
        steps = triton.cdiv(run.tokens, run.block * _PROGRAMS)
        programs = triton.cdiv(run.tokens, run.block * steps)
        grad_x = launch.empty(x.shape, x.dtype, x.device)
        sums = launch.empty((programs, 2, x.shape[-1]), torch.float32, x.device)
        launch.run(
            features_backward,
            (programs, run.heads),
            *(*run.tensors, grad.contiguous(), grad_x, sums, *run.sizes, steps),
            **run.constants,
        )
        of_scale, of_offset = sums.sum(0).to(scale.dtype)
        return grad_x, of_scale, of_offset, None, None


class _Run:
    """The arguments as the kernels take them: tokens one behind the other, wherever they lie."""

    def __init__(self, x: Tensor, scale: Tensor, offset: Tensor, head_dim: int, silu: bool) -> None:
        x = launch.dense_rows(x.reshape(-1, x.shape[-1]))
        self.tensors = x, scale, offset
        self.tokens, self.heads = x.shape[0], x.shape[-1] // head_dim
        self.sizes = self.tokens, self.heads, x.stride(0), scale.stride(0), offset.stride(0)
        self.constants = _constants(head_dim, silu)

    @property
    def block(self) -> int:
        return self.constants["ROWS"]


def _constants(head_dim: int, silu: bool) -> dict[str, Any]:
    columns = triton.next_power_of_2(head_dim)
    return {
        "D": head_dim,
        "BD": columns,
        "ROWS": max(1, _TILE // columns),
        "SILU": silu,
        "EPS": FEATURE_EPS,
        "num_warps": 8 if columns > _TILE else 4,
    }


@triton.jit
def features_forward(
    x,
    scale,
    offset,
    out,
    tokens,
    heads,
    stride_t,
    stride_scale,
    stride_offset,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
):
    """y / (|y| + eps) of some tokens of a head."""
    token, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    inside = (token < tokens)[:, None] & (column < D)[None, :]
    channel = tl.program_id(1) * D + column
    a = tl.load(scale + channel * stride_scale, mask=column < D, other=0.0).to(tl.float32)
    b = tl.load(offset + channel * stride_offset, mask=column < D, other=0.0).to(tl.float32)
    at = token.to(tl.int64)[:, None] * stride_t + channel[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * a[None, :] + b[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    y /= (tl.sqrt(tl.sum(y * y, 1)) + EPS)[:, None]
    at = token.to(tl.int64)[:, None] * (heads * D) + channel[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def features_backward(
    x,
    scale,
    offset,
    grad,
    grad_x,
    sums,
    tokens,
    heads,
    stride_t,
    stride_scale,
    stride_offset,
    steps,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    EPS: tl.constexpr,
):
    """The gradients of x, and this program's share of those of scale and offset."""
    column = tl.arange(0, BD)
    channel = tl.program_id(1) * D + column
    a = tl.load(scale + channel * stride_scale, mask=column < D, other=0.0).to(tl.float32)
    b = tl.load(offset + channel * stride_offset, mask=column < D, other=0.0).to(tl.float32)
    of_scale, of_offset = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    for step in range(steps):
        token = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & (column < D)[None, :]
        at = token.to(tl.int64)[:, None] * stride_t + channel[None, :]
        given = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z = given * a[None, :] + b[None, :]
        slope = tl.full((ROWS, BD), 1.0, tl.float32)
        y = z
        if SILU:
            sigma = tl.sigmoid(z)
            y = z * sigma
            slope = sigma * (1 + z * (1 - sigma))
        at = token.to(tl.int64)[:, None] * (heads * D) + channel[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(y * y, 1))
        inverse = 1 / (length + EPS)
        direction = tl.where(length > 0, 1 / tl.where(length > 0, length, 1.0), 0.0)
        along = tl.sum(g * y, 1) * inverse * inverse * direction
        of_z = (g * inverse[:, None] - y * along[:, None]) * slope
        of_scale += tl.sum(of_z * given, 0)
        of_offset += tl.sum(of_z, 0)
        tl.store(grad_x + at, (of_z * a[None, :]).to(grad_x.dtype.element_ty), mask=inside)
    at = sums + tl.program_id(0).to(tl.int64) * 2 * heads * D + channel
    tl.store(at, of_scale, mask=column < D)
    tl.store(at + heads * D, of_offset, mask=column < D)


# Widths of a fast head in the published models.
_COMPILED = (384, 768)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    types = {"sums": "*fp32"} | integers("tokens", "heads", "steps")
    for width in _COMPILED:
        for kernel in (features_forward, features_backward):
            yield variant(kernel, f"d{width}", _constants(width, True), types)
