"""RMS norm, maybe gated and added to something, as one pass over memory each way: what rms_norm.py
computes, in Triton.

A program takes some rows whole.  The gradient of the gain is a sum over all rows: each program
sums its own, and torch adds those sums up.
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
from refine_kernels.rms_norm import rms_norm as by_torch
from refine_kernels.triton_variant import Variant, integers, variant

_WIDEST = 16384
_BLOCK = 4096  # elements a program holds at a time
_PROGRAMS = 1024  # of the backward, at most


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """As rms_norm.rms_norm."""
    return _RMSNorm.apply(x, weight, gate, base, eps)


def refusal(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    base: Tensor | None = None,
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    if x.shape[-1] > _WIDEST:
        return f"rows are {x.shape[-1]} wide, above {_WIDEST}"
    return agreement.unknown_dtype(x.dtype) or _disagreement(
        x.shape[-1], _gate_kind(gate), base is not None, x.dtype, x.device
    )


@functools.cache
def _disagreement(
    width: int, gate: str, base: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(3, 5, width, generator=gen),
        "weight": 1 + torch.rand(width, generator=gen),
    }
    if gate != "none":
        inputs["gate"] = torch.randn(3, 5, width if gate == "full" else 1, generator=gen)
    if base:
        inputs["base"] = torch.randn(3, 5, width, generator=gen)
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}

    def of(form: Any) -> agreement.Form:
        def run(x: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor]:
            further = dict(zip(list(inputs)[2:], others, strict=True))
            return [form(x, weight, 1e-5, **further)]

        return run

    return agreement.disagreement(
        of(rms_norm),
        of(by_torch.rms_norm),
        inputs,
        ["output"],
        tolerance=agreement.TOLERANCE[dtype],
    )


def _gate_kind(gate: Tensor | None) -> str:
    if gate is None:
        return "none"
    return "row" if gate.shape[-1] == 1 else "full"


class _Run:
    """The arguments as the kernels take them: rows of width D, those of a gate where they lie."""

    def __init__(self, x: Tensor, gate: Tensor | None) -> None:
        self.x = x.contiguous()
        self.width = x.shape[-1]
        self.rows = x.numel() // self.width
        self.kind = _gate_kind(gate)
        self.heads, self.strides, self.gate = 1, (0, 0), None
        if gate is not None:
            self.heads = x.shape[-2] if x.dim() > 1 else 1
            self.gate = launch.dense_rows(gate.reshape(-1, self.heads, gate.shape[-1]))
            self.strides = (self.gate.stride(0), self.gate.stride(1))
        self.constants = _constants(self.width, self.kind)

    @property
    def block(self) -> int:
        return self.constants["ROWS"]


def _constants(width: int, kind: str) -> dict[str, Any]:
    columns = triton.next_power_of_2(width)
    return {
        "D": width,
        "BD": columns,
        "ROWS": max(1, _BLOCK // columns),
        "GATE": kind,
        "num_warps": 8 if columns >= _BLOCK else 4,
    }


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, base: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        run = _Run(x, gate)
        base = None if base is None else base.contiguous()
        y = launch.empty(x.shape, x.dtype, x.device)
        launch.run(
            rms_norm_forward,
            (triton.cdiv(run.rows, run.block),),
            *(run.x, weight, run.gate, base, y, run.rows, run.heads, *run.strides, eps),
            BASE=base is not None,
            **run.constants,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate = ctx.saved_tensors
        run = _Run(x, gate)
        steps = triton.cdiv(run.rows, run.block * _PROGRAMS)
        programs = triton.cdiv(run.rows, run.block * steps)
        grad_x = launch.empty(x.shape, x.dtype, x.device)
        grad_gate = None if gate is None else launch.empty(gate.shape, gate.dtype, x.device)
        sums = launch.empty((programs, run.width), torch.float32, x.device)
        launch.run(
            rms_norm_backward,
            (programs,),
            *(run.x, weight, run.gate, grad.contiguous(), grad_x, grad_gate, sums),
            *(run.rows, steps, run.heads, *run.strides, ctx.eps),
            **run.constants,
        )
        of_base = grad if ctx.needs_input_grad[3] else None
        return grad_x, sums.sum(0).to(weight.dtype), grad_gate, of_base, None


@triton.jit
def _gates(gate, row, column, inside, heads, stride_token, stride_head, GATE: tl.constexpr):
    """The gates z of some rows, [ROWS, BD] or for one a row [ROWS, 1]."""
    at = (row // heads).to(tl.int64) * stride_token + (row % heads) * stride_head
    if GATE == "full":
        z = tl.load(gate + at[:, None] + column[None, :], mask=inside, other=0.0)
    else:
        z = tl.load(gate + at, mask=row >= 0, other=0.0)[:, None]
    return z.to(tl.float32)


@triton.jit
def rms_norm_forward(
    x,
    weight,
    gate,
    base,
    y,
    rows,
    heads,
    stride_token,
    stride_head,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    GATE: tl.constexpr,
    BASE: tl.constexpr,
):
    """y = x / rms(x) * weight, times silu(gate), plus base."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BD)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    out = value * scale[:, None] * gain[None, :]
    if GATE != "none":
        row = tl.where(row < rows, row, 0)
        z = _gates(gate, row, column, inside, heads, stride_token, stride_head, GATE)
        out *= z * tl.sigmoid(z)
    if BASE:
        out += tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(
    x,
    weight,
    gate,
    grad,
    grad_x,
    grad_gate,
    sums,
    rows,
    steps,
    heads,
    stride_token,
    stride_head,
    eps,
    D: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    GATE: tl.constexpr,
):
    """With u = x / rms(x) and d the gradient of u: dx = (d - u mean(d u)) / rms(x)."""
    column = tl.arange(0, BD)
    gain = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros((BD,), tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + column[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        of_y = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
        unit = value * scale[:, None]
        if GATE != "none":
            known = tl.where(row < rows, row, 0)
            z = _gates(gate, known, column, inside, heads, stride_token, stride_head, GATE)
            sigma = tl.sigmoid(z)
            of_silu = of_y * unit * gain[None, :]
            slope = sigma * (1 + z * (1 - sigma))
            if GATE == "full":
                found = (of_silu * slope).to(grad_gate.dtype.element_ty)
                tl.store(grad_gate + at, found, mask=inside)
            else:
                found = tl.sum(of_silu, 1)[:, None] * slope
                found = found.to(grad_gate.dtype.element_ty)
                tl.store(grad_gate + row[:, None], found, mask=(row < rows)[:, None])
            of_y *= z * sigma
        total += tl.sum(of_y * unit, 0)
        of_unit = of_y * gain[None, :]
        along = tl.sum(of_unit * unit, 1) / D
        found = (of_unit - unit * along[:, None]) * scale[:, None]
        tl.store(grad_x + at, found.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * D + column, total, mask=column < D)


# Widths of the published models from 0.4B to 7B: of layers, and of heads, with a gate for each
# number or for each head; the last added to something.
_COMPILED = (
    (1024, "none", False),
    (2048, "none", False),
    (4096, "none", False),
    (128, "full", False),
    (256, "full", False),
    (384, "row", True),
)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    types = {"sums": "*fp32", "eps": "fp32", **integers("rows", "steps", "heads")}
    for width, kind, base in _COMPILED:
        without = [*(("gate", "grad_gate") if kind == "none" else ()), *([] if base else ["base"])]
        for kernel in (rms_norm_forward, rms_norm_backward):
            constants = _constants(width, kind) | {"BASE": base}
            yield variant(kernel, f"d{width}_{kind}", constants, types, without)
