"""Gradients and momentum of an update as one pass over memory each way, in Triton: `accumulated` of
forms.py and its gradients.

A fast head's gradients are [3,dh,d]: two thirds of w02's product, the rest of w1's.  Sums are
float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import launch
from refine_kernels.triton_variant import Variant, integers, variant

_BLOCK = 2048  # numbers a program holds at a time


def accumulated(
    of_w02: Tensor,
    of_w1: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As forms.accumulated."""
    streams, heads, rows, width = of_w1.shape
    out = launch.empty((streams, heads, 3, rows, width), dtype, of_w1.device)
    grid, sizes, constants = _pieces(out, decay)
    launch.run(
        accumulated_forward,
        grid,
        *(of_w02.contiguous(), of_w1.contiguous(), decay, _dense(momentum), out, *sizes),
        **constants,
        MOMENTUM=momentum is not None,
    )
    return out


def accumulated_gradients(
    grad: Tensor,
    further: Tensor | None,
    decay: Tensor | None,
    momentum: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As forms.accumulated_gradients."""
    streams, heads, _, rows, width = grad.shape
    of_w02 = launch.empty((streams, heads, 2 * rows, width), dtype, grad.device)
    of_w1 = launch.empty((streams, heads, rows, width), dtype, grad.device)
    grid, sizes, constants = _pieces(grad, decay)
    of_momentum = of_decay = None
    if momentum is not None:
        of_momentum = launch.empty(momentum.shape, momentum.dtype, grad.device)
        of_decay = launch.empty((streams, heads, grid[0]), momentum.dtype, grad.device)
    given = (_dense(grad), _dense(further), decay, _dense(momentum))
    launch.run(
        accumulated_backward,
        grid,
        *(*given, of_decay, of_momentum, of_w02, of_w1, *sizes),
        **constants,
        FURTHER=further is not None,
        MOMENTUM=momentum is not None,
    )
    return of_w02, of_w1, of_momentum, of_decay


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pieces(
    x: Tensor, decay: Tensor | None
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """The programs that go through the pieces of every head of x [B,n,3,dh,d]; heads, and where
    each one's decay is; constants."""
    streams, heads = x.shape[:2]
    strides = (0, 0) if decay is None else decay.stride()[:2]
    constants = _constants(x.shape[2:].numel())
    grid = (triton.cdiv(constants["SIZE"], _BLOCK), streams * heads)
    return grid, (heads, *strides), constants


def _constants(size: int) -> dict[str, Any]:
    return {"SIZE": size, "BLOCK": _BLOCK, "num_warps": 4}


@triton.jit
def accumulated_forward(
    of_w02,
    of_w1,
    decay,
    momentum,
    out,
    heads,
    stride_b,
    stride_n,
    MOMENTUM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of G + decay M'."""
    row, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    third: tl.constexpr = SIZE // 3
    of_both = at < 2 * third
    found = tl.load(of_w02 + row * 2 * third + at, mask=of_both, other=0.0).to(tl.float32)
    last = (at >= 2 * third) & (at < SIZE)
    found += tl.load(of_w1 + row * third + at - 2 * third, mask=last, other=0.0).to(tl.float32)
    if MOMENTUM:
        by = tl.load(decay + row // heads * stride_b + row % heads * stride_n)
        found += by * tl.load(momentum + row * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(out + row * SIZE + at, found.to(out.dtype.element_ty), mask=at < SIZE)


@triton.jit
def accumulated_backward(
    grad,
    further,
    decay,
    momentum,
    of_decay,
    of_momentum,
    of_w02,
    of_w1,
    heads,
    stride_b,
    stride_n,
    FURTHER: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of all, of a piece; that of the decay summed over it."""
    row, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    third: tl.constexpr = SIZE // 3
    g = tl.load(grad + row * SIZE + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if FURTHER:
        g += tl.load(further + row * SIZE + at, mask=at < SIZE, other=0.0)
    if MOMENTUM:
        by = tl.load(decay + row // heads * stride_b + row % heads * stride_n)
        before = tl.load(momentum + row * SIZE + at, mask=at < SIZE, other=0.0)
        tl.store(of_decay + row * tl.num_programs(0) + tl.program_id(0), tl.sum(g * before, 0))
        tl.store(of_momentum + row * SIZE + at, by * g, mask=at < SIZE)
    kind = of_w1.dtype.element_ty
    tl.store(of_w02 + row * 2 * third + at, g.to(kind), mask=at < 2 * third)
    last = (at >= 2 * third) & (at < SIZE)
    tl.store(of_w1 + row * third + at - 2 * third, g.to(kind), mask=last)


def variants(widths: tuple[int, ...]) -> Iterator[Variant]:
    """As they are compiled ahead of time, for fast heads of these widths."""
    wide = ("out", "further", "decay", "momentum", "of_decay", "of_momentum")
    types = dict.fromkeys(wide, "*fp32") | integers("heads")
    for width in widths:
        constants = _constants(3 * width * width) | {"MOMENTUM": True, "FURTHER": True}
        for kernel in (accumulated_forward, accumulated_backward):
            yield variant(kernel, f"d{width}", constants, types)
