"""The gates of forms.py as one pass over memory each way, in Triton: in float32; results are
rounded once, to what the products take, and gradients to what they gave.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import launch
from refine_kernels.triton_variant import Variant, integers, variant

_TILE = 1024  # numbers a program holds at a time


def hidden(zh: Tensor, dtype: torch.dtype) -> Tensor:
    """As forms.hidden."""
    return _Hidden.apply(zh, dtype)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, zh: Tensor, dtype: torch.dtype) -> Tensor:
        zh = zh.contiguous()
        ctx.save_for_backward(zh)
        width = zh.shape[-1] // 2
        out = launch.empty((*zh.shape[:-1], width), dtype, zh.device)
        grid = (triton.cdiv(out.numel(), _TILE),)
        launch.run(hidden_forward, grid, zh, out, out.numel(), width, BLOCK=_TILE, num_warps=4)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (zh,) = ctx.saved_tensors
        found = launch.empty(zh.shape, zh.dtype, zh.device)
        grid = (triton.cdiv(grad.numel(), _TILE),)
        arguments = (zh, grad.contiguous(), found, grad.numel(), grad.shape[-1])
        launch.run(hidden_backward, grid, *arguments, BLOCK=_TILE, num_warps=4)
        return found, None


def factors(zh: Tensor, d_hidden: Tensor, lr: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As forms.factors."""
    zh, d, lr = zh.contiguous(), d_hidden.contiguous(), launch.dense_rows(lr)
    of_w02, of_w1 = (launch.empty(x.shape, dtype, x.device) for x in (zh, d))
    constants = _constants(d.shape[-1])
    launch.run(factors_forward, _grid(d), zh, d, lr, of_w02, of_w1, *_sizes(d, lr), **constants)
    return of_w02, of_w1


def factors_gradients(
    zh: Tensor, d_hidden: Tensor, lr: Tensor, grad02: Tensor, grad1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As forms.factors_gradients."""
    zh, d, lr = zh.contiguous(), d_hidden.contiguous(), launch.dense_rows(lr)
    of_zh, of_d = (launch.empty(x.shape, x.dtype, x.device) for x in (zh, d))
    of_lr = launch.empty((*d.shape[:3], 3), torch.float32, d.device)
    launch.run(
        factors_backward,
        _grid(d),
        *(zh, d, lr, grad02.contiguous(), grad1.contiguous(), of_zh, of_d, of_lr),
        *_sizes(d, lr),
        **_constants(d.shape[-1]),
    )
    return of_zh, of_d, of_lr.transpose(1, 2).to(lr.dtype)


def _constants(width: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    return {"D": width, "BD": columns, "ROWS": rows, "num_warps": 8 if columns > _TILE else 4}


def _grid(d: Tensor) -> tuple[int]:
    return (triton.cdiv(d.numel() // d.shape[-1], _constants(d.shape[-1])["ROWS"]),)


def _sizes(d: Tensor, lr: Tensor) -> tuple[int, ...]:
    """Rows of d [B,n,T,dh], heads, tokens, and the strides of lr [B,T,n,3]."""
    return d.numel() // d.shape[-1], d.shape[1], d.shape[2], *lr.stride()[:3]


@triton.jit
def hidden_forward(zh, out, size, width, BLOCK: tl.constexpr):
    """silu(z) h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_z = at + at // width * width
    x = tl.load(zh + of_z, mask=at < size, other=0.0).to(tl.float32)
    y = tl.load(zh + of_z + width, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def hidden_backward(zh, grad, grad_zh, size, width, BLOCK: tl.constexpr):
    """The gradients of z and h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    of_z = at + at // width * width
    x = tl.load(zh + of_z, mask=at < size, other=0.0).to(tl.float32)
    y = tl.load(zh + of_z + width, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(x)
    slope = sigma * (1 + x * (1 - sigma))
    kind = grad_zh.dtype.element_ty
    tl.store(grad_zh + of_z, (g * y * slope).to(kind), mask=at < size)
    tl.store(grad_zh + of_z + width, (g * x * sigma).to(kind), mask=at < size)


@triton.jit
def _rates(lr, row, rows, heads, tokens, stride_b, stride_t, stride_n):
    """eta0, eta1 and eta2 of rows of [B,n,T], each [ROWS, 1]."""
    known = row < rows
    b, head, t = row // (heads * tokens), row // tokens % heads, row % tokens
    at = lr + (b.to(tl.int64) * stride_b + t * stride_t + head * stride_n)
    eta0 = tl.load(at, mask=known, other=0.0).to(tl.float32)
    eta1 = tl.load(at + 1, mask=known, other=0.0).to(tl.float32)
    eta2 = tl.load(at + 2, mask=known, other=0.0).to(tl.float32)
    return eta0[:, None], eta1[:, None], eta2[:, None]


@triton.jit
def factors_forward(
    zh,
    d,
    lr,
    factors02,
    factor1,
    rows,
    heads,
    tokens,
    stride_b,
    stride_t,
    stride_n,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The factors of the three gradients, of some rows."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    of_z = at + row.to(tl.int64)[:, None] * D
    eta0, eta1, eta2 = _rates(lr, row, rows, heads, tokens, stride_b, stride_t, stride_n)
    x = tl.load(zh + of_z, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(zh + of_z + D, mask=inside, other=0.0).to(tl.float32)
    of_hidden = tl.load(d + at, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(x)
    silu = x * sigma
    slope = sigma + silu * (1 - sigma)
    kind = factor1.dtype.element_ty
    tl.store(factors02 + of_z, (eta0 * of_hidden * y * slope).to(kind), mask=inside)
    tl.store(factor1 + at, (eta1 * silu * y).to(kind), mask=inside)
    tl.store(factors02 + of_z + D, (eta2 * of_hidden * silu).to(kind), mask=inside)


@triton.jit
def factors_backward(
    zh,
    d,
    lr,
    grad02,
    grad1,
    grad_zh,
    grad_d,
    grad_lr,
    rows,
    heads,
    tokens,
    stride_b,
    stride_t,
    stride_n,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradients of all inputs, of some rows."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    of_z = at + row.to(tl.int64)[:, None] * D
    eta0, eta1, eta2 = _rates(lr, row, rows, heads, tokens, stride_b, stride_t, stride_n)
    x = tl.load(zh + of_z, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(zh + of_z + D, mask=inside, other=0.0).to(tl.float32)
    of_hidden = tl.load(d + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(grad02 + of_z, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(grad1 + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(grad02 + of_z + D, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(x)
    silu = x * sigma
    slope = sigma + silu * (1 - sigma)
    bend = sigma * (1 - sigma) * (2 + x * (1 - 2 * sigma))
    found = a * eta0 * of_hidden * y * bend + (b * eta1 * y + c * eta2 * of_hidden) * slope
    kind = grad_d.dtype.element_ty
    tl.store(grad_zh + of_z, found.to(kind), mask=inside)
    found = a * eta0 * of_hidden * slope + b * eta1 * silu
    tl.store(grad_zh + of_z + D, found.to(kind), mask=inside)
    found = a * eta0 * y * slope + c * eta2 * silu
    tl.store(grad_d + at, found.to(kind), mask=inside)
    rate = grad_lr + row.to(tl.int64) * 3
    tl.store(rate, tl.sum(a * of_hidden * y * slope, 1), mask=row < rows)
    tl.store(rate + 1, tl.sum(b * silu * y, 1), mask=row < rows)
    tl.store(rate + 2, tl.sum(c * of_hidden * silu, 1), mask=row < rows)


def variants(widths: tuple[int, ...]) -> Iterator[Variant]:
    """As they are compiled ahead of time, for products in bfloat16 and fast heads of these
    widths."""
    types = {
        "lr": "*fp32",
        "grad_lr": "*fp32",
        **integers("size", "width", "rows", "heads", "tokens"),
    }
    for kernel in (hidden_forward, hidden_backward):
        yield variant(kernel, "any", {"BLOCK": _TILE, "num_warps": 4}, types)
    for width in widths:
        for kernel in (factors_forward, factors_backward):
            yield variant(kernel, f"d{width}", _constants(width), types)
