"""What LaCT's fast network reads for a few tokens, in Triton: a decoded one of every rollout of a
position, or all of the rollouts that are scored.

    f(x) = w1 (silu(w0 x) * (w2 x))

So few rows are bound by the weights, which are megabytes a stream: products of libraries would want
the tokens of a head copied together, and what stands between the products would be a launch of its
own.  Here a program has some of the hidden units of a stream's head: the forward reads its rows of
w0 and w2 and leaves silu(z) h; the backward reads them and its columns of w1, makes the same again,
and writes the gradients of all three, which are products over the few tokens.  A second kernel
multiplies rows with a whole matrix: with w1 the output, with w0 and w2 the gradient of x.

Between the products all is in float32 and rounded once, to what they take.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement, launch
from refine_kernels.lact import chunk, forms
from refine_kernels.lact.fast_weights import FastWeights
from refine_kernels.lact.products import Product
from refine_kernels.triton_products import padded, product, products_in
from refine_kernels.triton_variant import Variant, integers, variant

_MOST = 64  # tokens of a stream; more are worth a library's product
_ROWS = (16, 32, _MOST)  # of a product, as which they are multiplied
_UNITS = 32  # hidden units, or columns of the output, of a program


def takes(weights: FastWeights, x: Tensor) -> bool:
    """Whether the tokens x [B,T,n,d] are few enough; every stream has weights of its own."""
    return 0 < x.shape[1] <= _MOST and weights.w1.shape[0] == x.shape[0]


def read(product: Product, x: Tensor, w02: Tensor, w1: Tensor) -> Tensor:
    """f(x) [B,T,n,d] of w02 [B,n,2dh,d] and w1 [B,n,d,dh], its products as ``product`` says."""
    return _Read.apply(product, x, w02, w1)


def refusal(product: Product, weights: FastWeights, x: Tensor) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    w02, w1 = weights.read()
    given = product, w1.shape[-2:], (x.dtype, w02.dtype, w1.dtype), x.device
    # All at once: how many tokens meet in one chunk's weights depends on the positions, and later,
    # in a pipeline whose messages wait, may be too late to load another kernel.
    return {rows: _disagreement(*given, rows) for rows in _ROWS}[padded(x.shape[1])]


@functools.cache
def _disagreement(
    product: Product,
    size: torch.Size,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    device: torch.device,
    rows: int,
) -> str | None:
    """Of as many tokens as fill most of these ``rows`` of a product: other rows, other code."""
    gen = torch.Generator().manual_seed(0)
    d, dh = size
    inputs = {
        "x": torch.randn(2, rows - 3, 2, d, generator=gen),
        "w02": torch.randn(2, 2, 2 * dh, d, generator=gen) / d**0.5,
        "w1": torch.randn(2, 2, d, dh, generator=gen) / dh**0.5,
    }
    pairs = zip(inputs.items(), dtypes, strict=True)

    def by_library(x: Tensor, w02: Tensor, w1: Tensor) -> list[Tensor]:
        return [chunk.read(product, forms.hidden, x, w02, w1)]

    return agreement.disagreement(
        lambda *given: [read(product, *given)],
        by_library,
        {name: x.to(device, dtype) for (name, x), dtype in pairs},
        ["read"],
        tolerance=agreement.TOLERANCE[torch.float16 if product.tf32 else product.operands],
    )


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Product, x: Tensor, w02: Tensor, w1: Tensor) -> Tensor:
        ctx.save_for_backward(x, w02, w1)
        ctx.product = product
        run = _Run(product, x, w02, w1)
        hidden = launch.empty((*run.batch, run.units), product.operands, x.device)
        launch.run(
            read_hidden,
            run.grid(run.units),
            *(run.x, run.w02, hidden, *run.sizes, *run.x.stride()[:3], *run.w02.stride()[:3]),
            WIDTH=run.width,
            UNITS=run.units,
            **run.constants,
        )
        out = launch.empty(x.shape, x.dtype, x.device)
        _multiply(run, hidden, run.w1.mT, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w02, w1 = ctx.saved_tensors
        run = _Run(ctx.product, x, w02, w1)
        grad = launch.dense_rows(grad)
        of_zh = launch.empty((*run.batch, 2 * run.units), ctx.product.operands, x.device)
        of_w02, of_w1 = (launch.empty(w.shape, w.dtype, w.device) for w in (w02, w1))
        launch.run(
            read_gradients,
            run.grid(run.units),
            *(run.x, run.w02, run.w1, grad, of_zh, of_w02, of_w1, *run.sizes),
            *(*run.x.stride()[:3], *run.w02.stride()[:3], *run.w1.stride()[:3]),
            *grad.stride()[:3],
            WIDTH=run.width,
            UNITS=run.units,
            **run.constants,
        )
        of_x = launch.empty(x.shape, x.dtype, x.device)
        _multiply(run, of_zh, run.w02, of_x)
        return None, of_x, of_w02, of_w1


class _Run:
    """The arguments as the kernels take them: rows wherever they lie."""

    def __init__(self, product: Product, x: Tensor, w02: Tensor, w1: Tensor) -> None:
        self.x, self.w02, self.w1 = (launch.dense_rows(y) for y in (x, w02, w1))
        streams, tokens, self.heads, self.width = x.shape
        self.batch = streams, self.heads, tokens
        self.units = w1.shape[-1]
        self.sizes = self.heads, tokens
        products = products_in(product.operands, x.device, tf32=product.tf32)
        self.constants = _constants(tokens, products)

    def grid(self, columns: int) -> tuple[int, int]:
        return triton.cdiv(columns, _UNITS), self.batch[0] * self.heads


def _multiply(run: _Run, rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """out [B,T,n,columns] = rows [B,n,T,K] matrix [B,n,K,columns]."""
    along = matrix.stride(2) == 1
    launch.run(
        multiply_rows,
        run.grid(run.width),
        *(rows, matrix, out, *run.sizes),
        *matrix.stride()[:2],
        matrix.stride(3 if along else 2),
        *out.stride()[:3],
        COLUMNS=run.width,
        INNER=rows.shape[-1],
        ALONG=along,
        **run.constants,
    )


def _constants(tokens: int, products: str) -> dict[str, Any]:
    return {
        "BT": padded(tokens),
        "BU": _UNITS,
        "BK": 64 if products == "bf16" else 32,
        "PRODUCTS": products,
        "num_warps": 4,
        "num_stages": 4 if products == "bf16" else 2,
    }


@triton.jit
def _tile(x, rows, row, columns, column, stride_row):
    """x[row, column], zero past its edges."""
    at = x + row.to(tl.int64)[:, None] * stride_row + column[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _keep(x, value, rows, row, columns, column, stride_row):
    """Into x[row, column], of what of it there is."""
    at = x + row.to(tl.int64)[:, None] * stride_row + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _before_gate(
    x,
    w02,
    tokens,
    t,
    unit,
    stride_xt,
    stride_wr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    BT: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """z = w0 x and h = w2 x of some hidden units."""
    z, h = tl.zeros((BT, BU), tl.float32), tl.zeros((BT, BU), tl.float32)
    for start in range(0, WIDTH, BK):
        k = start + tl.arange(0, BK)
        rows = _tile(x, tokens, t, WIDTH, k, stride_xt)
        w0 = _tile(w02, UNITS, unit, WIDTH, k, stride_wr)
        w2 = _tile(w02 + UNITS * stride_wr, UNITS, unit, WIDTH, k, stride_wr)
        z += product(rows, tl.trans(w0), PRODUCTS)
        h += product(rows, tl.trans(w2), PRODUCTS)
    return z, h


@triton.jit(do_not_specialize=["tokens"])
def read_hidden(
    x,
    w02,
    hidden,
    heads,
    tokens,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_wb,
    stride_wn,
    stride_wr,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    BT: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """silu(z) h of some hidden units for the tokens of a stream's head."""
    number = tl.program_id(1).to(tl.int64)
    b, head = number // heads, number % heads
    x += b * stride_xb + head * stride_xn
    w02 += b * stride_wb + head * stride_wn
    t, unit = tl.arange(0, BT), tl.program_id(0) * BU + tl.arange(0, BU)
    z, h = _before_gate(
        x, w02, tokens, t, unit, stride_xt, stride_wr, WIDTH, UNITS, BT, BU, BK, PRODUCTS
    )
    hidden += number * tokens * UNITS
    _keep(hidden, z * tl.sigmoid(z) * h, tokens, t, UNITS, unit, UNITS)


@triton.jit(do_not_specialize=["tokens"])
def read_gradients(
    x,
    w02,
    w1,
    grad,
    of_zh,
    of_w02,
    of_w1,
    heads,
    tokens,
    stride_xb,
    stride_xt,
    stride_xn,
    stride_wb,
    stride_wn,
    stride_wr,
    stride_vb,
    stride_vn,
    stride_vr,
    stride_gb,
    stride_gt,
    stride_gn,
    WIDTH: tl.constexpr,
    UNITS: tl.constexpr,
    BT: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Of some hidden units of a stream's head: the gradients of z and h, and of the weights."""
    number = tl.program_id(1).to(tl.int64)
    b, head = number // heads, number % heads
    x += b * stride_xb + head * stride_xn
    w02 += b * stride_wb + head * stride_wn
    w1 += b * stride_vb + head * stride_vn
    grad += b * stride_gb + head * stride_gn
    t, unit = tl.arange(0, BT), tl.program_id(0) * BU + tl.arange(0, BU)
    z, h = _before_gate(
        x, w02, tokens, t, unit, stride_xt, stride_wr, WIDTH, UNITS, BT, BU, BK, PRODUCTS
    )
    of_hidden = tl.zeros((BT, BU), tl.float32)
    for start in range(0, WIDTH, BK):
        k = start + tl.arange(0, BK)
        of_rows = _tile(grad, tokens, t, WIDTH, k, stride_gt)
        columns = _tile(w1, WIDTH, k, UNITS, unit, stride_vr)
        of_hidden += product(of_rows, columns, PRODUCTS)
    sigma = tl.sigmoid(z)
    silu = z * sigma
    f = silu * h
    of_z = of_hidden * h * (sigma + silu * (1 - sigma))
    of_h = of_hidden * silu
    of_zh += number * tokens * 2 * UNITS
    _keep(of_zh, of_z, tokens, t, UNITS, unit, 2 * UNITS)
    _keep(of_zh + UNITS, of_h, tokens, t, UNITS, unit, 2 * UNITS)
    of_w02 += number * 2 * UNITS * WIDTH
    of_w1 += number * UNITS * WIDTH
    for start in range(0, WIDTH, BK):
        k = start + tl.arange(0, BK)
        rows = _tile(x, tokens, t, WIDTH, k, stride_xt)
        of_rows = _tile(grad, tokens, t, WIDTH, k, stride_gt)
        found = product(tl.trans(of_z), rows, PRODUCTS)
        _keep(of_w02, found, UNITS, unit, WIDTH, k, WIDTH)
        found = product(tl.trans(of_h), rows, PRODUCTS)
        _keep(of_w02 + UNITS * WIDTH, found, UNITS, unit, WIDTH, k, WIDTH)
        found = product(tl.trans(of_rows), f, PRODUCTS)
        _keep(of_w1, found, WIDTH, k, UNITS, unit, UNITS)


@triton.jit(do_not_specialize=["tokens"])
def multiply_rows(
    rows,
    matrix,
    out,
    heads,
    tokens,
    stride_mb,
    stride_mn,
    stride_mr,
    stride_ob,
    stride_ot,
    stride_on,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ALONG: tl.constexpr,
    BT: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Some columns of rows [T, INNER] times a matrix [INNER, COLUMNS] of a stream's head; ALONG: of
    the matrix a column's numbers, not a row's, lie side by side."""
    number = tl.program_id(1).to(tl.int64)
    b, head = number // heads, number % heads
    rows += number * tokens * INNER
    matrix += b * stride_mb + head * stride_mn
    t, column = tl.arange(0, BT), tl.program_id(0) * BU + tl.arange(0, BU)
    total = tl.zeros((BT, BU), tl.float32)
    for start in range(0, INNER, BK):
        k = start + tl.arange(0, BK)
        a = _tile(rows, tokens, t, INNER, k, INNER)
        if ALONG:
            m = tl.trans(_tile(matrix, COLUMNS, column, INNER, k, stride_mr))
        else:
            m = _tile(matrix, INNER, k, COLUMNS, column, stride_mr)
        total += product(a, m, PRODUCTS)
    out += b * stride_ob + head * stride_on
    _keep(out, total, tokens, t, COLUMNS, column, stride_ot)


def variants(widths: tuple[int, ...]) -> Iterator[Variant]:
    """As they are compiled ahead of time, for products in bfloat16 and fast heads of these widths:
    of each number of rows that their products can have."""
    types = integers("heads", "tokens")
    for width, tokens in itertools.product(widths, _ROWS):
        constants = _constants(tokens, "bf16")
        title = f"d{width}_t{constants['BT']}"
        constants |= {"WIDTH": width, "UNITS": width, "COLUMNS": width}
        for kernel in (read_hidden, read_gradients):
            yield variant(kernel, title, constants, types, products=True, few_rows=True)
        for along, inner in ((True, width), (False, 2 * width)):
            yield variant(
                multiply_rows,
                f"{title}_of_{inner}",
                constants | {"INNER": inner, "ALONG": along},
                types,
                products=True,
                few_rows=True,
            )
