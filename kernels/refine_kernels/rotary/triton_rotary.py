"""Rotary positions as one pass over memory each way: what rotary.py computes, in Triton.

The backward turns the other way, and keeps nothing but the table that all layers share.
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
from refine_kernels.rotary import rotary as by_torch
from refine_kernels.triton_variant import Variant, integers, variant

_TILE = 1024  # pairs a program holds at a time
_WIDEST = 4096


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As rotary.rotate."""
    return _Rotate.apply(x, cos, sin)


def refusal(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Why the kernel is not for these arguments here, None if it is."""
    if cos.dtype != torch.float32:
        return f"the angles are {cos.dtype}"
    if x.shape[-1] > _WIDEST:
        return f"heads are {x.shape[-1]} wide, above {_WIDEST}"
    return agreement.unknown_dtype(x.dtype) or _disagreement(
        x.shape[-1], cos.shape[-1], x.dtype, x.device
    )


@functools.cache
def _disagreement(dim: int, half: int, dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    angles = 6 * torch.rand(2, 5, 1, half, generator=gen).to(device)
    return agreement.disagreement(
        lambda x: [rotate(x, angles.cos(), angles.sin())],
        lambda x: [by_torch.rotate(x, angles.cos(), angles.sin())],
        {"x": torch.randn(2, 5, 3, dim, generator=gen).to(device, dtype)},
        ["output"],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    """x turned by the angles, or back."""
    x = launch.dense_rows(x)
    cos, sin = cos.contiguous(), sin.contiguous()
    streams, tokens, heads, dim = x.shape
    rows = streams * tokens * heads
    out = launch.empty(x.shape, x.dtype, x.device)
    of_stream = cos.stride(0) if cos.shape[0] > 1 else 0
    constants = _constants(dim, cos.shape[-1])
    launch.run(
        turn,
        (triton.cdiv(rows, constants["ROWS"]),),
        *(x, cos, sin, out, rows, tokens, heads, *x.stride()[:3], of_stream, direction),
        **constants,
    )
    return out


def _constants(dim: int, half: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(half)
    return {
        "DIM": dim,
        "HALF": half,
        "BH": columns,
        "BREST": triton.next_power_of_2(max(1, dim - 2 * half)),
        "ROWS": max(1, _TILE // columns),
        "num_warps": 4,
    }


@triton.jit
def turn(
    x,
    cos,
    sin,
    out,
    rows,
    tokens,
    heads,
    stride_s,
    stride_t,
    stride_h,
    stride_table,
    direction,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BH: tl.constexpr,
    BREST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(first, second) -> (first cos - second sin, second cos + first sin), of some rows."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BH)
    known = row < rows
    inside = known[:, None] & (column < HALF)[None, :]
    stream, token, head = row // (tokens * heads), row // heads % tokens, row % heads
    at = stream.to(tl.int64) * stride_table + token.to(tl.int64) * HALF
    at = at[:, None] + column[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0)
    s = tl.load(sin + at, mask=inside, other=0.0) * direction
    start = stream.to(tl.int64) * stride_s + token.to(tl.int64) * stride_t + head * stride_h
    at = start[:, None] + column[None, :]
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    to = row.to(tl.int64)[:, None] * DIM + column[None, :]
    tl.store(out + to, (first * c - second * s).to(kind), mask=inside)
    tl.store(out + to + HALF, (second * c + first * s).to(kind), mask=inside)
    if DIM > 2 * HALF:
        column = 2 * HALF + tl.arange(0, BREST)
        inside = known[:, None] & (column < DIM)[None, :]
        rest = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0)
        tl.store(out + row.to(tl.int64)[:, None] * DIM + column[None, :], rest, mask=inside)


# Heads of the published models, and the half of their dimensions that are turned.
_COMPILED = ((64, 32), (96, 48), (128, 64), (256, 32))


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    types = {"cos": "*fp32", "sin": "*fp32", "direction": "fp32"}
    types |= integers("rows", "tokens", "heads")
    for dim, half in _COMPILED:
        yield variant(turn, f"d{dim}_n{2 * half}", _constants(dim, half), types)
