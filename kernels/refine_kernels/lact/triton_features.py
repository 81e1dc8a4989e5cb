"""What LaCT makes of its queries or keys as one pass over memory each way: what features.py
computes, in Triton.

With z = x scale + offset, y = silu(z) or z, n = |y| and q = n + eps, the gradient g of y / q is
g / q - <g, y> / (q^2 n) y of y.  A program has some tokens of a fast head, and reads each channel
beside the one that it is turned with.  Computed in float32 and rounded once.  The gradients of
scale and offset are sums over all tokens: each program sums its own, and torch adds those sums up.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement, launch
from refine_kernels.lact import features as by_torch
from refine_kernels.lact.features import FEATURE_EPS
from refine_kernels.triton_variant import Variant, integers, variant

_TILE = 1024  # numbers a program holds at a time
_WIDEST = 8192
_PROGRAMS = 512  # of a head, at most: scales and offsets are read once by each


class _Kind(NamedTuple):
    """What the features are beside the tensors."""

    column: int
    head_dim: int
    silu: bool
    fast_rope: bool


def attention_and_fast_features(
    x: Tensor, scale: Tensor, offset: Tensor, cos: Tensor, sin: Tensor, **kind: Any
) -> tuple[Tensor, Tensor]:
    """As features.attention_and_fast_features."""
    return _Features.apply(x, scale, offset, cos, sin, _Kind(**kind))


def refusal(
    x: Tensor, scale: Tensor, offset: Tensor, cos: Tensor, sin: Tensor, **kind: Any
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    dim, turned = kind["head_dim"], 2 * cos.shape[-1]
    if cos.dtype != torch.float32:
        return f"the angles are {cos.dtype}"
    if dim > _WIDEST:
        return f"fast heads are {dim} wide, above {_WIDEST}"
    if dim % turned:
        return f"fast heads are {dim} wide, no multiple of the attention's {turned}"
    columns = scale.shape[1]
    return agreement.unknown_dtype(x.dtype) or _disagreement(
        _Kind(**kind), turned // 2, columns, (x.dtype, scale.dtype), x.device
    )


@functools.cache
def _disagreement(
    kind: _Kind,
    half: int,
    columns: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> str | None:
    gen = torch.Generator().manual_seed(0)
    width = 2 * kind.head_dim
    inputs = {
        "x": torch.randn(2, 5, width, generator=gen).to(device, dtypes[0]),
        "scale": (1 + torch.rand(width, columns, generator=gen)).to(device, dtypes[1]),
        "offset": torch.rand(width, columns, generator=gen).to(device, dtypes[1]),
    }
    angles = 6 * torch.rand(2, 5, 1, half, generator=gen).to(device)

    def of(form: Any) -> agreement.Form:
        return lambda *given: form(*given, angles.cos(), angles.sin(), **kind._asdict())

    return agreement.disagreement(
        of(attention_and_fast_features),
        of(by_torch.attention_and_fast_features),
        inputs,
        ["heads of the attention", "fast features"],
        tolerance=agreement.TOLERANCE[dtypes[0]],
    )


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor,
        cos: Tensor,
        sin: Tensor,
        kind: _Kind,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, scale, offset, cos, sin)
        ctx.kind = kind
        run = _Run(x, scale, offset, cos, sin, kind)
        sizes = (x.shape[-1] // run.turned, run.turned), (run.heads, kind.head_dim)
        out, fast = (launch.empty((*x.shape[:2], *size), x.dtype, x.device) for size in sizes)
        launch.run(
            features_forward,
            run.grid,
            *(*run.tensors, out, fast, *run.sizes, run.steps),
            **run.constants,
        )
        return out, fast

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_fast: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, cos, sin = ctx.saved_tensors
        run = _Run(x, scale, offset, cos, sin, ctx.kind)
        of_x = launch.empty(x.shape, x.dtype, x.device)
        sums = launch.empty((run.grid[0], 2, *scale.shape), torch.float32, x.device)
        launch.run(
            features_backward,
            run.grid,
            *(*run.tensors, grad.contiguous(), grad_fast.contiguous(), of_x, sums),
            *(*run.sizes, run.steps),
            **run.constants,
        )
        of_scale, of_offset = sums.sum(0).to(scale.dtype)
        return of_x, of_scale, of_offset, None, None, None


class _Run:
    """The arguments as the kernels take them: tokens one behind the other, wherever they lie."""

    def __init__(
        self, x: Tensor, scale: Tensor, offset: Tensor, cos: Tensor, sin: Tensor, kind: _Kind
    ) -> None:
        streams, length, width = x.shape
        x = launch.dense_rows(x.reshape(-1, width))
        cos, sin, scale, offset = (y.contiguous() for y in (cos, sin, scale, offset))
        self.tensors = x, scale, offset, cos, sin
        self.tokens, self.heads = streams * length, width // kind.head_dim
        self.turned = 2 * cos.shape[-1]
        of_stream = cos.stride(0) if cos.shape[0] > 1 else 0
        self.sizes = self.tokens, length, self.heads, x.stride(0), of_stream
        self.constants = _constants(kind, self.turned // 2, scale.shape[1])
        rows = self.constants["ROWS"]
        self.steps = triton.cdiv(self.tokens, rows * _PROGRAMS)
        self.grid = (triton.cdiv(self.tokens, rows * self.steps), self.heads)


def _constants(kind: _Kind, half: int, all_columns: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(kind.head_dim)
    return {
        "D": kind.head_dim,
        "HALF": half,
        "COLUMN": kind.column,
        "COLUMNS": all_columns,
        "SILU": kind.silu,
        "ROPE": kind.fast_rope,
        "EPS": FEATURE_EPS,
        "BD": columns,
        "ROWS": max(1, _TILE // columns),
        "num_warps": 8 if columns > _TILE else 4,
    }


@triton.jit
def _activated(x, a, b, SILU: tl.constexpr):
    """silu(a x + b), or without SiLU."""
    y = x * a[None, :] + b[None, :]
    if SILU:
        y *= tl.sigmoid(y)
    return y


@triton.jit
def _of_channels(x, channel, known, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """x [width, COLUMNS] in one column."""
    return tl.load(x + channel * COLUMNS + COLUMN, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _paired(column, HALF: tl.constexpr):
    """The channel that each is turned with."""
    return column + tl.where(column % (2 * HALF) < HALF, HALF, -HALF)


@triton.jit
def _angles(cos, sin, token, column, inside, length, stride_table, HALF: tl.constexpr):
    """cos, and sin with the sign that the other channel of the pair has in a turn."""
    stream, t = token // length, token % length
    at = stream.to(tl.int64) * stride_table + t.to(tl.int64) * HALF
    at = at[:, None] + (column % HALF)[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    return c, tl.where((column % (2 * HALF) < HALF)[None, :], -s, s)


@triton.jit
def features_forward(
    x,
    scale,
    offset,
    cos,
    sin,
    out,
    fast,
    tokens,
    length,
    heads,
    stride_t,
    stride_table,
    steps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
    ROPE: tl.constexpr,
    EPS: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x turned, and y / (|y| + eps), of some tokens of a head."""
    column = tl.arange(0, BD)
    known = column < D
    first = tl.program_id(1) * D
    other = _paired(column, HALF)
    a = _of_channels(scale, first + column, known, COLUMN, COLUMNS)
    b = _of_channels(offset, first + column, known, COLUMN, COLUMNS)
    if ROPE:
        other_a = _of_channels(scale, first + other, known, COLUMN, COLUMNS)
        other_b = _of_channels(offset, first + other, known, COLUMN, COLUMNS)
    for step in range(steps):
        token = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & known[None, :]
        at = token.to(tl.int64)[:, None] * stride_t + first
        own = tl.load(x + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        paired = tl.load(x + at + other[None, :], mask=inside, other=0.0).to(tl.float32)
        c, s = _angles(cos, sin, token, column, inside, length, stride_table, HALF)
        at = token.to(tl.int64)[:, None] * (heads * D) + first + column[None, :]
        tl.store(out + at, (own * c + paired * s).to(out.dtype.element_ty), mask=inside)
        y = _activated(own, a, b, SILU)
        inverse = 1 / (tl.sqrt(tl.sum(y * y, 1)) + EPS)
        if ROPE:
            y = y * c + _activated(paired, other_a, other_b, SILU) * s
        tl.store(fast + at, (y * inverse[:, None]).to(fast.dtype.element_ty), mask=inside)


@triton.jit
def features_backward(
    x,
    scale,
    offset,
    cos,
    sin,
    grad,
    grad_fast,
    of_x,
    sums,
    tokens,
    length,
    heads,
    stride_t,
    stride_table,
    steps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    COLUMN: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
    ROPE: tl.constexpr,
    EPS: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of x, and this program's share of those of scale and offset."""
    column = tl.arange(0, BD)
    known = column < D
    first = tl.program_id(1) * D
    other = _paired(column, HALF)
    a = _of_channels(scale, first + column, known, COLUMN, COLUMNS)
    b = _of_channels(offset, first + column, known, COLUMN, COLUMNS)
    of_scale, of_offset = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    for step in range(steps):
        token = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & known[None, :]
        at = token.to(tl.int64)[:, None] * stride_t + first + column[None, :]
        given = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z = given * a[None, :] + b[None, :]
        slope = tl.full((ROWS, BD), 1.0, tl.float32)
        y = z
        if SILU:
            sigma = tl.sigmoid(z)
            y = z * sigma
            slope = sigma * (1 + z * (1 - sigma))
        c, s = _angles(cos, sin, token, column, inside, length, stride_table, HALF)
        at = token.to(tl.int64)[:, None] * (heads * D) + first
        own, paired = at + column[None, :], at + other[None, :]
        g = tl.load(grad_fast + own, mask=inside, other=0.0).to(tl.float32)
        if ROPE:
            g = g * c - tl.load(grad_fast + paired, mask=inside, other=0.0).to(tl.float32) * s
        norm = tl.sqrt(tl.sum(y * y, 1))
        inverse = 1 / (norm + EPS)
        direction = tl.where(norm > 0, 1 / tl.where(norm > 0, norm, 1.0), 0.0)
        along = tl.sum(g * y, 1) * inverse * inverse * direction
        of_z = (g * inverse[:, None] - y * along[:, None]) * slope
        of_scale += tl.sum(of_z * given, 0)
        of_offset += tl.sum(of_z, 0)
        g = tl.load(grad + own, mask=inside, other=0.0).to(tl.float32) * c
        g -= tl.load(grad + paired, mask=inside, other=0.0).to(tl.float32) * s
        tl.store(of_x + own, (g + of_z * a[None, :]).to(of_x.dtype.element_ty), mask=inside)
    width = heads * D
    at = sums + tl.program_id(0).to(tl.int64) * 2 * width * COLUMNS
    at += (first + column) * COLUMNS
    for i in tl.static_range(COLUMNS):
        used = 1.0 if i == COLUMN else 0.0
        tl.store(at + i, of_scale * used, mask=known)
        tl.store(at + i + width * COLUMNS, of_offset * used, mask=known)


# Widths of a fast head and of the attention's in the published models.
_COMPILED = ((384, 64), (768, 64))


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time, queries and keys side by side."""
    types = {"sums": "*fp32", "cos": "*fp32", "sin": "*fp32"}
    types |= {"scale": "*fp32", "offset": "*fp32"}
    types |= integers("tokens", "length", "heads", "steps")
    for width, dim in _COMPILED:
        constants = _constants(_Kind(0, width, silu=True, fast_rope=True), dim // 2, 2)
        for kernel in (features_forward, features_backward):
            yield variant(kernel, f"d{width}", constants, types)
