"""The gates of the delta rules as one launch each way: what gates.py computes, in Triton.

The gradients of bias and rate are sums over all tokens: each program sums its own, and torch adds
those sums up.
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
from refine_kernels.delta_gates import gates as by_torch
from refine_kernels.triton_variant import Variant, integers, variant

_BLOCK = 1024  # numbers a program holds at a time
_PROGRAMS = 256  # of the backward, at most
_MOST_HEADS = 256


def delta_gates(
    b: Tensor,
    a: Tensor | None = None,
    bias: Tensor | None = None,
    log_rate: Tensor | None = None,
    *,
    doubled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As gates.delta_gates."""
    beta, g = _Gates.apply(b, a, bias, log_rate, doubled)
    return beta, g


def refusal(
    b: Tensor,
    a: Tensor | None = None,
    bias: Tensor | None = None,
    log_rate: Tensor | None = None,
    *,
    doubled: bool = False,
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    if b.shape[-1] > _MOST_HEADS:
        return f"there are {b.shape[-1]} heads, more than {_MOST_HEADS}"
    return agreement.unknown_dtype(b.dtype) or _disagreement(
        b.shape[-1], a is not None, doubled, b.dtype, b.device
    )


@functools.cache
def _disagreement(
    heads: int, gated: bool, doubled: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    gen = torch.Generator().manual_seed(0)
    names = ["b", "a", "bias", "log rate"] if gated else ["b"]
    shapes = {"b": (2, 70, heads), "a": (2, 70, heads), "bias": (heads,), "log rate": (heads,)}
    inputs = {name: torch.randn(shapes[name], generator=gen) for name in names}
    wide = ("bias", "log rate")

    def of(form: Any) -> agreement.Form:
        return lambda *given: list(form(*given, doubled=doubled)[: 2 if gated else 1])

    return agreement.disagreement(
        of(delta_gates),
        of(by_torch.delta_gates),
        {name: x.to(device, None if name in wide else dtype) for name, x in inputs.items()},
        ["beta", "g"][: 2 if gated else 1],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        b: Tensor,
        a: Tensor | None,
        bias: Tensor | None,
        log_rate: Tensor | None,
        doubled: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(b, a, bias, log_rate)
        ctx.doubled = doubled
        run = _Run(b, a, doubled)
        beta = launch.empty(b.shape, torch.float32, b.device)
        g = None if a is None else launch.empty(b.shape, torch.float32, b.device)
        grid = (triton.cdiv(run.rows, run.constants["ROWS"]),)
        launch.run(
            gates_forward, grid, *run.tensors, bias, log_rate, beta, g, *run.sizes, **run.constants
        )
        return beta, g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_beta: Tensor, grad_g: Tensor | None) -> tuple[Tensor | None, ...]:
        b, a, bias, log_rate = ctx.saved_tensors
        run = _Run(b, a, ctx.doubled)
        steps = triton.cdiv(run.rows, run.constants["ROWS"] * _PROGRAMS)
        programs = triton.cdiv(run.rows, run.constants["ROWS"] * steps)
        grad_b = launch.empty(b.shape, b.dtype, b.device)
        grad_a, sums = None, None
        if a is not None:
            assert grad_g is not None
            grad_g = grad_g.contiguous()
            grad_a = launch.empty(a.shape, a.dtype, a.device)
            sums = launch.empty((programs, 2, b.shape[-1]), torch.float32, b.device)
        launch.run(
            gates_backward,
            (programs,),
            *(*run.tensors, bias, log_rate, grad_beta.contiguous(), grad_g, grad_b, grad_a, sums),
            *(steps, *run.sizes),
            **run.constants,
        )
        if sums is None:
            return grad_b, None, None, None, None
        of_bias, of_rate = sums.sum(0).unbind(0)
        return grad_b, grad_a, of_bias.to(bias.dtype), of_rate.to(log_rate.dtype), None


class _Run:
    """The arguments as the kernels take them: rows of heads where they lie."""

    def __init__(self, b: Tensor, a: Tensor | None, doubled: bool) -> None:
        heads = b.shape[-1]
        b = launch.dense_rows(b.reshape(-1, heads))
        a = None if a is None else launch.dense_rows(a.reshape(-1, heads))
        self.tensors, self.rows = (b, a), b.shape[0]
        self.sizes = (self.rows, b.stride(0), 0 if a is None else a.stride(0))
        self.constants = _constants(heads, a is not None, doubled)


def _constants(heads: int, gated: bool, doubled: bool) -> dict[str, Any]:
    columns = triton.next_power_of_2(heads)
    return {
        "H": heads,
        "BH": columns,
        "ROWS": max(1, _BLOCK // columns),
        "GATED": gated,
        "DOUBLED": doubled,
        "num_warps": 4,
    }


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), also where 1 + exp(x) rounds to 1."""
    small = tl.exp(tl.minimum(x, 20.0))
    sum_ = 1 + small
    rounded = tl.where(sum_ == 1, 1.0, sum_ - 1)
    return tl.where(x > 20, x, tl.where(sum_ == 1, small, tl.log(sum_) * (small / rounded)))


@triton.jit
def gates_forward(
    b,
    a,
    bias,
    log_rate,
    beta,
    g,
    rows,
    stride_b,
    stride_a,
    H: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    DOUBLED: tl.constexpr,
):
    """beta and g of some rows."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    head = tl.arange(0, BH)[None, :]
    inside = (row < rows) & (head < H)
    strength = tl.sigmoid(tl.load(b + row * stride_b + head, mask=inside, other=0.0).to(tl.float32))
    if DOUBLED:
        strength *= 2
    tl.store(beta + row * H + head, strength, mask=inside)
    if GATED:
        x = tl.load(a + row * stride_a + head, mask=inside, other=0.0).to(tl.float32)
        x += tl.load(bias + head, mask=head < H, other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(log_rate + head, mask=head < H, other=0.0).to(tl.float32))
        tl.store(g + row * H + head, -rate * _softplus(x), mask=inside)


@triton.jit
def gates_backward(
    b,
    a,
    bias,
    log_rate,
    grad_beta,
    grad_g,
    grad_b,
    grad_a,
    sums,
    steps,
    rows,
    stride_b,
    stride_a,
    H: tl.constexpr,
    BH: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    DOUBLED: tl.constexpr,
):
    """db, da and this program's sums for bias and rate; softplus' = sigmoid, dg / dlog_rate = g."""
    head = tl.arange(0, BH)[None, :]
    of_bias, of_rate = tl.zeros((BH,), tl.float32), tl.zeros((BH,), tl.float32)
    if GATED:
        shift = tl.load(bias + head, mask=head < H, other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(log_rate + head, mask=head < H, other=0.0).to(tl.float32))
    for step in range(steps):
        row = ((tl.program_id(0) * steps + step) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (head < H)
        at = row * H + head
        s = tl.sigmoid(tl.load(b + row * stride_b + head, mask=inside, other=0.0).to(tl.float32))
        d = tl.load(grad_beta + at, mask=inside, other=0.0).to(tl.float32) * s * (1 - s)
        if DOUBLED:
            d *= 2
        tl.store(grad_b + at, d.to(grad_b.dtype.element_ty), mask=inside)
        if GATED:
            x = tl.load(a + row * stride_a + head, mask=inside, other=0.0).to(tl.float32) + shift
            of_g = tl.load(grad_g + at, mask=inside, other=0.0).to(tl.float32) * -rate
            of_a = of_g * tl.sigmoid(x)
            tl.store(grad_a + at, of_a.to(grad_a.dtype.element_ty), mask=inside)
            of_bias += tl.sum(of_a, 0)
            of_rate += tl.sum(of_g * _softplus(x), 0)
    if GATED:
        column = tl.arange(0, BH)
        to = sums + tl.program_id(0) * 2 * H + column
        tl.store(to, of_bias, mask=column < H)
        tl.store(to + H, of_rate, mask=column < H)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    wide = ("bias", "log_rate", "beta", "g", "grad_beta", "grad_g", "sums")
    types = dict.fromkeys(wide, "*fp32") | integers("rows", "steps")
    for heads in (16, 32):
        for gated in (False, True):
            without = () if gated else ("a", "bias", "log_rate", "g", "grad_g", "grad_a", "sums")
            title = f"h{heads}_{'gated' if gated else 'plain'}"
            for kernel in (gates_forward, gates_backward):
                constants = _constants(heads, gated, False)
                yield variant(kernel, title, constants, types, without)
