"""SwiGLU as one pass over memory each way: what swiglu.py computes, in Triton.

Computed in float32 and rounded once.
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
from refine_kernels.swiglu import swiglu as by_torch
from refine_kernels.triton_variant import Variant, integers, variant

_CONSTANTS = {"BLOCK": 1024, "num_warps": 4}


def swiglu(x: Tensor) -> Tensor:
    """As swiglu.swiglu."""
    return _SwiGLU.apply(x)


def refusal(x: Tensor) -> str | None:
    """Why the kernels are not for this argument here, None if they are."""
    return agreement.unknown_dtype(x.dtype) or _disagreement(x.dtype, x.device)


@functools.cache
def _disagreement(dtype: torch.dtype, device: torch.device) -> str | None:
    x = torch.randn(3, 5, 2 * 1100, generator=torch.Generator().manual_seed(0))
    return agreement.disagreement(
        lambda x: [swiglu(x)],
        lambda x: [by_torch.swiglu(x)],
        {"x": x.to(device, dtype)},
        ["output"],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        width = x.shape[-1] // 2
        y = launch.empty((*x.shape[:-1], width), x.dtype, x.device)
        launch.run(swiglu_forward, _grid(y), x.contiguous(), y, width, **_CONSTANTS)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = launch.empty(x.shape, x.dtype, x.device)
        arguments = (x.contiguous(), grad.contiguous(), grad_x, grad.shape[-1])
        launch.run(swiglu_backward, _grid(grad), *arguments, **_CONSTANTS)
        return grad_x


def _grid(y: Tensor) -> tuple[int, int]:
    width = y.shape[-1]
    return y.numel() // width, triton.cdiv(width, _CONSTANTS["BLOCK"])


@triton.jit
def swiglu_forward(x, y, width, BLOCK: tl.constexpr):
    """y = silu(gate) up, a row's block of columns."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = x + row * 2 * width + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward(x, grad, grad_x, width, BLOCK: tl.constexpr):
    """The gradients of gate and up, a row's block of columns."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    of_y = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    of_gate = of_y * up * sigma * (1 + gate * (1 - sigma))
    tl.store(grad_x + at, of_gate.to(grad_x.dtype.element_ty), mask=inside)
    of_up = of_y * gate * sigma
    tl.store(grad_x + at + width, of_up.to(grad_x.dtype.element_ty), mask=inside)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time; for any width."""
    for kernel in (swiglu_forward, swiglu_backward):
        yield variant(kernel, "any", _CONSTANTS, integers("width"))
