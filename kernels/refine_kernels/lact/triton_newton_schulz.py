"""Newton-Schulz's operations in Triton: as in newton_schulz.py.

Matrices are small (384 by 384 in LaCT-760M, a dozen a text) and one step waits for the other, so
what counts is how many launches there are: three a step either way, two for the norm.  A symmetric
result is computed up to its diagonal and written twice: half the multiplications of a library's
product, and no pass over memory for x + x^T.  Sums are float32; results are rounded once.  Other
dtypes than bfloat16 are the library's.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import launch
from refine_kernels.lact import newton_schulz
from refine_kernels.triton_products import product, products_of
from refine_kernels.triton_variant import Variant, variant

DTYPE = torch.bfloat16


def normalised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As newton_schulz.normalised, the norm in float32."""
    if dtype != DTYPE:
        return newton_schulz.normalised(x, dtype)
    x = x.contiguous()
    norm = launch.empty((x.shape[0], 1, 1), torch.float32, x.device)
    out = launch.empty(x.shape, dtype, x.device)
    sums, grid, constants = _pieces(x)
    launch.run(inner_products, grid, x, x, sums, **constants)
    launch.run(divided_by_norm, grid, x, sums, norm, out, EPS=newton_schulz.EPS, **constants)
    return out, norm


def normalised_gradient(grad: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """As newton_schulz.normalised_gradient."""
    if y.dtype != DTYPE:
        return newton_schulz.normalised_gradient(grad, y, norm)
    grad, y = grad.contiguous(), y.contiguous()
    out = launch.empty(grad.shape, grad.dtype, grad.device)
    sums, grid, constants = _pieces(y)
    launch.run(inner_products, grid, grad, y, sums, **constants)
    given = (grad, y, norm, sums, out)
    launch.run(divided_by_norm_gradient, grid, *given, EPS=newton_schulz.EPS, **constants)
    return out


def _pieces(x: Tensor) -> tuple[Tensor, tuple[int, int], dict[str, Any]]:
    """Memory for a sum of each piece of a matrix, and the programs that make them."""
    count, rows, columns = x.shape
    constants = _piece_constants(rows * columns)
    sums = launch.empty((count, constants["PIECES"]), torch.float32, x.device)
    return sums, (constants["PIECES"], count), constants


def _piece_constants(size: int) -> dict[str, Any]:
    block = 4096
    return {"SIZE": size, "BLOCK": block, "PIECES": triton.cdiv(size, block), "num_warps": 4}


def symmetric(
    a: Tensor,
    b: Tensor | None = None,
    *,
    base: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """As newton_schulz.symmetric."""
    if a.dtype != DTYPE:
        return newton_schulz.symmetric(a, b, base=base, beta=beta, alpha=alpha)
    count, rows, columns = a.shape
    out = launch.empty((count, rows, rows), a.dtype, a.device)
    constants = _constants(rows, columns, products_of(a))
    blocks = triton.cdiv(rows, constants["BLOCK"])
    launch.run(
        symmetric_product,
        (blocks, blocks, count),
        *(*_dense(a, b, base), out, beta, alpha),
        **constants,
        TWO=b is not None,
        BASE=base is not None,
    )
    return out


def combined(
    x: Tensor, p: Tensor, *, beta: float, s: Tensor | None = None, y: Tensor | None = None
) -> Tensor:
    """As newton_schulz.combined."""
    if x.dtype != DTYPE:
        return newton_schulz.combined(x, p, beta=beta, s=s, y=y)
    count, rows, columns = x.shape
    out = launch.empty(x.shape, x.dtype, x.device)
    constants = _constants(rows, columns, products_of(x))
    block = constants["BLOCK"]
    launch.run(
        combined_product,
        (triton.cdiv(rows, block), triton.cdiv(columns, block), count),
        *(*_dense(x, p, s, y), out, beta),
        **constants,
        TWO=s is not None,
    )
    return out


BY_KERNELS = newton_schulz.Operations(normalised, normalised_gradient, symmetric, combined)


def _dense(*given: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in given]


def _constants(rows: int, columns: int, products: str) -> dict[str, Any]:
    """Blocks that leave a GPU enough programs of a dozen matrices."""
    wide = rows > 512
    block = 128 if wide else max(16, min(64, triton.next_power_of_2(rows)))
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "BLOCK": block,
        "BK": 32 if wide else block,
        "PRODUCTS": products,
        "num_warps": 8 if wide else 4,
        "num_stages": 3,
    }


@triton.jit
def inner_products(x, y, sums, SIZE: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """<x, y> of a piece of a matrix."""
    piece, n = tl.program_id(0), tl.program_id(1)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    first = n.to(tl.int64) * SIZE
    x = tl.load(x + first + at, mask=at < SIZE, other=0.0).to(tl.float32)
    y = tl.load(y + first + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(sums + n * PIECES + piece, tl.sum(x * y, 0))


@triton.jit
def _total(sums, n, PIECES: tl.constexpr):
    """Of a matrix's pieces."""
    found = 0.0
    for piece in range(0, PIECES):
        found += tl.load(sums + n * PIECES + piece)
    return found


@triton.jit
def divided_by_norm(
    x,
    sums,
    norm,
    out,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """A piece of x / (|x| + eps), and |x|."""
    piece, n = tl.program_id(0), tl.program_id(1)
    length = tl.sqrt(_total(sums, n, PIECES))
    at = piece * BLOCK + tl.arange(0, BLOCK)
    first = n.to(tl.int64) * SIZE
    found = tl.load(x + first + at, mask=at < SIZE, other=0.0).to(tl.float32) / (length + EPS)
    tl.store(out + first + at, found.to(out.dtype.element_ty), mask=at < SIZE)
    tl.store(norm + n, length, mask=piece == 0)


@triton.jit
def divided_by_norm_gradient(
    grad,
    y,
    norm,
    sums,
    out,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """A piece of (dy - <dy, y> q / |x| y) / q."""
    piece, n = tl.program_id(0), tl.program_id(1)
    length = tl.load(norm + n)
    inverse = 1 / (length + EPS)
    # of zeros y is zero too
    along = tl.where(length > 0, _total(sums, n, PIECES) / tl.where(length > 0, length, 1.0), 0.0)
    at = piece * BLOCK + tl.arange(0, BLOCK)
    first = n.to(tl.int64) * SIZE
    found = tl.load(grad + first + at, mask=at < SIZE, other=0.0).to(tl.float32) * inverse
    found -= along * tl.load(y + first + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(out + first + at, found.to(out.dtype.element_ty), mask=at < SIZE)


@triton.jit
def _tile(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a matrix, zeros outside."""
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    at = x + row[:, None] * COLUMNS + column[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _across(
    found,
    a,
    b,
    i,
    j,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """found + rows i of a times rows j of b.  One product a loop: two that add to one sum are more
    than Triton 3.5 compiles for Blackwell."""
    for start in range(0, COLUMNS, BK):
        k = start + tl.arange(0, BK)
        of_b = _tile(b, j, k, ROWS, COLUMNS)
        found += product(_tile(a, i, k, ROWS, COLUMNS), tl.trans(of_b), PRODUCTS)
    return found


@triton.jit
def _down(
    found,
    p,
    x,
    i,
    j,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """found + rows i of p [ROWS, ROWS] times columns j of x."""
    for start in range(0, ROWS, BK):
        k = start + tl.arange(0, BK)
        of_x = _tile(x, k, j, ROWS, COLUMNS)
        found += product(_tile(p, i, k, ROWS, ROWS), of_x, PRODUCTS)
    return found


@triton.jit
def symmetric_product(
    a,
    b,
    base,
    out,
    beta,
    alpha,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TWO: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """A block on or below the diagonal, and the one that mirrors it."""
    if tl.program_id(1) > tl.program_id(0):
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(2).to(tl.int64)
    a += n * ROWS * COLUMNS
    if TWO:
        b += n * ROWS * COLUMNS
    found = tl.zeros((BLOCK, BLOCK), tl.float32)
    if TWO:
        found = _across(found, a, b, i, j, ROWS, COLUMNS, BK, PRODUCTS)
        found = _across(found, b, a, i, j, ROWS, COLUMNS, BK, PRODUCTS)
    else:
        found = _across(found, a, a, i, j, ROWS, COLUMNS, BK, PRODUCTS)
    found *= alpha
    if BASE:
        base += n * ROWS * ROWS
        found += beta * _tile(base, i, j, ROWS, ROWS).to(tl.float32)
    found = found.to(out.dtype.element_ty)
    out += n * ROWS * ROWS
    inside = (i < ROWS)[:, None] & (j < ROWS)[None, :]
    tl.store(out + i[:, None] * ROWS + j[None, :], found, mask=inside)
    if tl.program_id(1) < tl.program_id(0):
        mirrored = (j < ROWS)[:, None] & (i < ROWS)[None, :]
        tl.store(out + j[:, None] * ROWS + i[None, :], tl.trans(found), mask=mirrored)


@triton.jit
def combined_product(
    x,
    p,
    s,
    y,
    out,
    beta,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """A block of beta x + p x, with TWO + s y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(2).to(tl.int64)
    x += n * ROWS * COLUMNS
    p += n * ROWS * ROWS
    if TWO:
        s += n * ROWS * ROWS
        y += n * ROWS * COLUMNS
    found = beta * _tile(x, i, j, ROWS, COLUMNS).to(tl.float32)
    found = _down(found, p, x, i, j, ROWS, COLUMNS, BK, PRODUCTS)
    if TWO:
        found = _down(found, s, y, i, j, ROWS, COLUMNS, BK, PRODUCTS)
    inside = (i < ROWS)[:, None] & (j < COLUMNS)[None, :]
    at = n * ROWS * COLUMNS + i[:, None] * COLUMNS + j[None, :]
    tl.store(out + at, found.to(out.dtype.element_ty), mask=inside)


def variants(widths: tuple[int, ...]) -> Iterator[Variant]:
    """As they are compiled ahead of time, for fast heads of these widths."""
    types = {"beta": "fp32", "alpha": "fp32"}
    of_pieces = {"x": "*fp32", "norm": "*fp32", "sums": "*fp32"}
    for width in widths:
        constants = _piece_constants(width * width) | {"EPS": newton_schulz.EPS}
        for kernel in (inner_products, divided_by_norm, divided_by_norm_gradient):
            yield variant(kernel, f"d{width}", constants, of_pieces)
        constants = _constants(width, width, "bf16")
        for kernel, given in (
            (symmetric_product, {"TWO": False, "BASE": True}),
            (symmetric_product, {"TWO": True, "BASE": True}),
            (combined_product, {"TWO": False}),
            (combined_product, {"TWO": True}),
        ):
            without = () if given["TWO"] else ("b", "s", "y")
            title = f"d{width}_{'two' if given['TWO'] else 'one'}"
            yield variant(kernel, title, constants | given, types, without, products=True)
