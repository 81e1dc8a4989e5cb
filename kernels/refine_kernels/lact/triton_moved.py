"""The rows of moved fast weights, as one pass over memory each way, in Triton: `moved` of forms.py
and its gradients.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import launch
from refine_kernels.lact.fast_weights import ROW_NORM_EPS
from refine_kernels.lact.forms import Moved
from refine_kernels.triton_variant import Variant, integers, variant

_TILE = 2048  # numbers a program holds at a time


def moved(
    weight: Tensor, step: Tensor, norm: Tensor, dtype: torch.dtype, *, prenorm: bool
) -> Moved:
    """As forms.moved."""
    out = launch.empty(step.shape, torch.float32, step.device)
    operand = None
    if prenorm or dtype != torch.float32:
        operand = launch.empty(step.shape, dtype, step.device)
    rows = _Rows(weight, step, norm, prenorm)
    launch.run(
        moved_forward,
        rows.grid,
        *(*rows.tensors, out, operand, *rows.sizes),
        **rows.constants,
        OPERAND=operand is not None,
    )
    return Moved(out, operand)


def moved_gradients(
    weight: Tensor,
    step: Tensor,
    norm: Tensor,
    grad: Tensor | None,
    grad_operand: Tensor | None,
    of_step: Tensor,
    *,
    prenorm: bool,
) -> tuple[Tensor, Tensor]:
    """As forms.moved_gradients."""
    found = launch.empty(step.shape, torch.float32, step.device)
    of_norm = launch.empty((*step.shape[:-1], 1), torch.float32, step.device)
    rows = _Rows(weight, step, norm, prenorm)
    given = {"GRAD": grad, "OPERAND": grad_operand}
    strides = [(0,) * 4 if x is None else x.stride() for x in (grad, grad_operand)]
    launch.run(
        moved_backward,
        rows.grid,
        *(*rows.tensors, *given.values(), of_step, found, of_norm),
        *(*rows.sizes, *strides[0], *strides[1], *of_step.stride()),
        **rows.constants,
        **{name: x is not None for name, x in given.items()},
    )
    return found, of_norm


class _Rows:
    """How a kernel gets the rows: any strides of matrices and of their rows and columns."""

    def __init__(self, weight: Tensor, step: Tensor, norm: Tensor, prenorm: bool) -> None:
        streams, heads, rows, columns = step.shape
        weight, norm = weight.expand(step.shape), norm.expand(streams, heads, rows, 1)
        self.tensors = weight, step, norm
        total = streams * heads * rows
        self.sizes = total, heads, rows, *weight.stride(), *step.stride(), *norm.stride()[:3]
        self.constants = _constants(columns, prenorm)
        self.grid = (triton.cdiv(total, self.constants["ROWS"]),)


def _constants(columns: int, prenorm: bool) -> dict[str, Any]:
    width = triton.next_power_of_2(columns)
    return {
        "D": columns,
        "BD": width,
        "ROWS": max(1, _TILE // width),
        "EPS": ROW_NORM_EPS,
        "PRENORM": prenorm,
        "num_warps": 8 if width > _TILE else 4,
    }


@triton.jit
def _places(stream, head, row, column, stride_s, stride_n, stride_r, stride_c):
    """Where some rows of [B,n,rows,columns] are, [ROWS, BD]."""
    at = stream.to(tl.int64) * stride_s + head * stride_n + row * stride_r
    return at[:, None] + (column * stride_c)[None, :]


@triton.jit
def moved_forward(
    weight,
    step,
    norm,
    out,
    operand,
    total,
    heads,
    rows,
    stride_ws,
    stride_wn,
    stride_wr,
    stride_wc,
    stride_xs,
    stride_xn,
    stride_xr,
    stride_xc,
    stride_ns,
    stride_nn,
    stride_nr,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    PRENORM: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """r s, or with PRENORM r; r s as products take it."""
    place, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    known = place < total
    inside = known[:, None] & (column < D)[None, :]
    stream, head, row = place // (heads * rows), place // rows % heads, place % rows
    at = _places(stream, head, row, column, stride_ws, stride_wn, stride_wr, stride_wc)
    r = tl.load(weight + at, mask=inside, other=0.0)
    at = _places(stream, head, row, column, stride_xs, stride_xn, stride_xr, stride_xc)
    r += tl.load(step + at, mask=inside, other=0.0).to(tl.float32)
    at = stream.to(tl.int64) * stride_ns + head * stride_nn + row * stride_nr
    s = tl.load(norm + at, mask=known, other=0.0) / (tl.sqrt(tl.sum(r * r, 1)) + EPS)
    at = place.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + at, r if PRENORM else r * s[:, None], mask=inside)
    if OPERAND:
        used = (r * s[:, None]).to(operand.dtype.element_ty)
        tl.store(operand + at, used, mask=inside)


@triton.jit
def moved_backward(
    weight,
    step,
    norm,
    grad,
    grad_operand,
    of_step,
    found,
    of_norm,
    total,
    heads,
    rows,
    stride_ws,
    stride_wn,
    stride_wr,
    stride_wc,
    stride_xs,
    stride_xn,
    stride_xr,
    stride_xc,
    stride_ns,
    stride_nn,
    stride_nr,
    stride_gs,
    stride_gn,
    stride_gr,
    stride_gc,
    stride_os,
    stride_on,
    stride_or,
    stride_oc,
    stride_fs,
    stride_fn,
    stride_fr,
    stride_fc,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    PRENORM: tl.constexpr,
    GRAD: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The gradients of weight and step, which are one, and of the norms."""
    place, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    known = place < total
    inside = known[:, None] & (column < D)[None, :]
    stream, head, row = place // (heads * rows), place // rows % heads, place % rows
    at = _places(stream, head, row, column, stride_ws, stride_wn, stride_wr, stride_wc)
    r = tl.load(weight + at, mask=inside, other=0.0)
    at = _places(stream, head, row, column, stride_xs, stride_xn, stride_xr, stride_xc)
    r += tl.load(step + at, mask=inside, other=0.0).to(tl.float32)
    at = stream.to(tl.int64) * stride_ns + head * stride_nn + row * stride_nr
    wanted = tl.load(norm + at, mask=known, other=0.0)
    length = tl.sqrt(tl.sum(r * r, 1))
    inverse = 1 / (length + EPS)
    g, used = tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS, BD), tl.float32)
    if GRAD:
        at = _places(stream, head, row, column, stride_gs, stride_gn, stride_gr, stride_gc)
        g = tl.load(grad + at, mask=inside, other=0.0)
    if OPERAND:
        at = _places(stream, head, row, column, stride_os, stride_on, stride_or, stride_oc)
        used = tl.load(grad_operand + at, mask=inside, other=0.0).to(tl.float32)
    if not PRENORM:
        used += g
    along = tl.sum(used * r, 1)
    used *= (wanted * inverse)[:, None]
    if PRENORM:
        g += used
    else:
        g = used
    at = place.to(tl.int64)[:, None] * D + column[None, :]
    direction = tl.where(length > 0, 1 / tl.where(length > 0, length, 1.0), 0.0)
    g -= r * (along * wanted * inverse * inverse * direction)[:, None]
    tl.store(found + at, g, mask=inside)
    at = _places(stream, head, row, column, stride_fs, stride_fn, stride_fr, stride_fc)
    tl.store(of_step + at, g.to(of_step.dtype.element_ty), mask=inside)
    tl.store(of_norm + place, along * inverse, mask=known)


def variants(widths: tuple[int, ...]) -> Iterator[Variant]:
    """As they are compiled ahead of time, for fast heads of these widths."""
    tensors = ("weight", "norm", "out", "grad", "found", "of_norm")
    types = dict.fromkeys(tensors, "*fp32") | integers("total", "heads", "rows")
    for width in widths:
        for prenorm in (False, True):
            title = f"d{width}_{'prenorm' if prenorm else 'postnorm'}"
            constants = _constants(width, prenorm) | {"GRAD": True, "OPERAND": True}
            for kernel in (moved_forward, moved_backward):
                yield variant(kernel, title, constants, types)
