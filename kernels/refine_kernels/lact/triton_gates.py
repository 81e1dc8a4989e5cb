"""LaCT with what stands between its products as one pass over memory each way, in Triton: see
gates.py.  The products are the libraries', as elsewhere.

With s = silu(z), s' and s'' its derivatives, and a, b, c the gradients of the three factors, the
backward of an update's gates is

    dz = a eta0 d h s'' + (b eta1 h + c eta2 d) s'
    dh = a eta0 d s' + b eta1 s        deta0 = sum a d h s'      deta1 = sum b s h
    dd = a eta0 h s' + c eta2 s        deta2 = sum c d s

in float32; results are rounded once, to what the products take.
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
from refine_kernels.lact import chunk, gates
from refine_kernels.lact.fast_weights import FastWeights
from refine_kernels.lact.gates import GateForms
from refine_kernels.lact.products import Precision, product_in
from refine_kernels.triton_variant import Variant, integers, variant

_WIDEST = 8192
_TILE = 1024  # numbers a program holds at a time


def refusal(*arguments: Any, precision: Precision | None = None, **options: Any) -> str | None:
    """Why the kernels are not for these arguments of chunk.py's operations here, None if they
    are."""
    given = (*arguments, *options.values())
    weights = next(x for x in given if isinstance(x, FastWeights))
    tokens = next(x for x in given if isinstance(x, Tensor))
    if weights.w0.dtype != torch.float32 or tokens.dtype not in agreement.TOLERANCE:
        return f"tokens are {tokens.dtype} and fast weights {weights.w0.dtype}"
    width = weights.w0.shape[-2]
    if width > _WIDEST:
        return f"the fast network is {width} wide, above {_WIDEST}"
    operands = product_in(precision, tokens.dtype, torch.float32).operands
    return _disagreement(width, operands, tokens.device)


@functools.cache
def _disagreement(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {x: torch.randn(2, 2, 5, width, generator=gen).to(device) for x in ("z", "h", "d")}
    inputs["rates"] = torch.rand(2, 5, 2, 3, generator=gen).to(device)

    def of(forms: GateForms) -> agreement.Form:
        def run(z: Tensor, h: Tensor, d: Tensor, lr: Tensor) -> list[Tensor]:
            return [forms.hidden(z, h, dtype), *forms.factors(z, h, d, lr, dtype)]

        return run

    return agreement.disagreement(
        of(FORMS),
        of(gates.BY_TORCH),
        inputs,
        ["hidden state", "factor of w0", "factor of w1", "factor of w2"],
        tolerance=agreement.TOLERANCE[dtype],
    )


def hidden(z: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """As gates.hidden."""
    return _Hidden.apply(z, h, dtype)


def factors(
    z: Tensor, h: Tensor, d_hidden: Tensor, lr: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As gates.factors."""
    return _Factors.apply(z, h, d_hidden, lr, dtype)


FORMS = GateForms(hidden, factors)
apply_fast_weights = functools.partial(chunk.apply_fast_weights, forms=FORMS)
update_fast_weights = functools.partial(chunk.update_fast_weights, forms=FORMS)
chunk_lact = functools.partial(chunk.chunk_lact, forms=FORMS)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
        z, h = z.contiguous(), h.contiguous()
        ctx.save_for_backward(z, h)
        out = launch.empty(z.shape, dtype, z.device)
        grid = (triton.cdiv(z.numel(), _TILE),)
        launch.run(hidden_forward, grid, z, h, out, z.numel(), BLOCK=_TILE, num_warps=4)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, h = ctx.saved_tensors
        found = [launch.empty(z.shape, torch.float32, z.device) for _ in range(2)]
        grid = (triton.cdiv(z.numel(), _TILE),)
        arguments = (z, h, grad.contiguous(), *found, z.numel())
        launch.run(hidden_backward, grid, *arguments, BLOCK=_TILE, num_warps=4)
        return *found, None


class _Factors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, h: Tensor, d: Tensor, lr: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        z, h, d, lr = z.contiguous(), h.contiguous(), d.contiguous(), launch.dense_rows(lr)
        ctx.save_for_backward(z, h, d, lr)
        out = [launch.empty(z.shape, dtype, z.device) for _ in range(3)]
        constants = _constants(z.shape[-1])
        launch.run(factors_forward, _grid(z), z, h, d, lr, *out, *_sizes(z, lr), **constants)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, h, d, lr = ctx.saved_tensors
        found = [launch.empty(z.shape, torch.float32, z.device) for _ in range(3)]
        grad_lr = launch.empty((*z.shape[:3], 3), torch.float32, z.device)
        launch.run(
            factors_backward,
            _grid(z),
            *(z, h, d, lr, *(x.contiguous() for x in grads), *found, grad_lr),
            *_sizes(z, lr),
            **_constants(z.shape[-1]),
        )
        return *found, grad_lr.transpose(1, 2).to(lr.dtype), None


def _constants(width: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    return {"D": width, "BD": columns, "ROWS": rows, "num_warps": 8 if columns > _TILE else 4}


def _grid(z: Tensor) -> tuple[int]:
    return (triton.cdiv(z.numel() // z.shape[-1], _constants(z.shape[-1])["ROWS"]),)


def _sizes(z: Tensor, lr: Tensor) -> tuple[int, ...]:
    """Rows of z [B,n,T,dh], heads, tokens, and the strides of lr [B,T,n,3]."""
    return z.numel() // z.shape[-1], z.shape[1], z.shape[2], *lr.stride()[:3]


@triton.jit
def hidden_forward(z, h, out, size, BLOCK: tl.constexpr):
    """silu(z) h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + at, mask=at < size, other=0.0)
    y = x * tl.sigmoid(x) * tl.load(h + at, mask=at < size, other=0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def hidden_backward(z, h, grad, grad_z, grad_h, size, BLOCK: tl.constexpr):
    """The gradients of z and h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + at, mask=at < size, other=0.0)
    g = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(x)
    slope = sigma * (1 + x * (1 - sigma))
    tl.store(grad_z + at, g * tl.load(h + at, mask=at < size, other=0.0) * slope, mask=at < size)
    tl.store(grad_h + at, g * x * sigma, mask=at < size)


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
    z,
    h,
    d,
    lr,
    factor0,
    factor1,
    factor2,
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
    eta0, eta1, eta2 = _rates(lr, row, rows, heads, tokens, stride_b, stride_t, stride_n)
    x = tl.load(z + at, mask=inside, other=0.0)
    y = tl.load(h + at, mask=inside, other=0.0)
    of_hidden = tl.load(d + at, mask=inside, other=0.0)
    sigma = tl.sigmoid(x)
    silu = x * sigma
    slope = sigma + silu * (1 - sigma)
    kind = factor0.dtype.element_ty
    tl.store(factor0 + at, (eta0 * of_hidden * y * slope).to(kind), mask=inside)
    tl.store(factor1 + at, (eta1 * silu * y).to(kind), mask=inside)
    tl.store(factor2 + at, (eta2 * of_hidden * silu).to(kind), mask=inside)


@triton.jit
def factors_backward(
    z,
    h,
    d,
    lr,
    grad0,
    grad1,
    grad2,
    grad_z,
    grad_h,
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
    eta0, eta1, eta2 = _rates(lr, row, rows, heads, tokens, stride_b, stride_t, stride_n)
    x = tl.load(z + at, mask=inside, other=0.0)
    y = tl.load(h + at, mask=inside, other=0.0)
    of_hidden = tl.load(d + at, mask=inside, other=0.0)
    a = tl.load(grad0 + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(grad1 + at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(grad2 + at, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(x)
    silu = x * sigma
    slope = sigma + silu * (1 - sigma)
    bend = sigma * (1 - sigma) * (2 + x * (1 - 2 * sigma))
    found = a * eta0 * of_hidden * y * bend + (b * eta1 * y + c * eta2 * of_hidden) * slope
    tl.store(grad_z + at, found, mask=inside)
    tl.store(grad_h + at, a * eta0 * of_hidden * slope + b * eta1 * silu, mask=inside)
    tl.store(grad_d + at, a * eta0 * y * slope + c * eta2 * silu, mask=inside)
    rate = grad_lr + row.to(tl.int64) * 3
    tl.store(rate, tl.sum(a * of_hidden * y * slope, 1), mask=row < rows)
    tl.store(rate + 1, tl.sum(b * silu * y, 1), mask=row < rows)
    tl.store(rate + 2, tl.sum(c * of_hidden * silu, 1), mask=row < rows)


# Widths of a fast head's network in the published models.
_COMPILED = (384, 768)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time, for products in bfloat16."""
    wide = ("z", "h", "d", "lr", "grad_z", "grad_h", "grad_d", "grad_lr")
    types = dict.fromkeys(wide, "*fp32") | integers("size", "rows", "heads", "tokens")
    for kernel in (hidden_forward, hidden_backward):
        yield variant(kernel, "any", {"BLOCK": _TILE, "num_warps": 4}, types)
    for width in _COMPILED:
        for kernel in (factors_forward, factors_backward):
            yield variant(kernel, f"d{width}", _constants(width), types)
