"""A state from the writes since another, in Triton: what read.py computes, a kernel each way.

With unit keys n_t = k_t / |k_t|, w_t = exp(g_{t+1} + ... + g_T) and the gradient G of the state
after,

    du_t = w_t G^T n_t        dS_0 = exp(g_1 + ... + g_T) G        D_t = G u_t
    dn_t = w_t D_t            dg_s = sum_{t < s} w_t <n_t, D_t> + <dS_0, S_0>

and dk_t = (dn_t - n_t <n_t, dn_t>) / |k_t|.  All in float32, products as three of TF32, which
together have float32's precision.
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
from refine_kernels.delta_rule import read as by_torch
from refine_kernels.triton_products import padded
from refine_kernels.triton_variant import Variant, integers, variant

_WIDEST = 256  # keys and values
_LONGEST = 64  # tokens that a program takes at a time, and the backward in all
# Rows and columns of a state that a program holds at a time; the backward holds more of each.
_KEYS, _KEYS_BACKWARD, _VALUES = 64, 32, 32


def state_from_writes(
    state: Tensor,
    k: Tensor,
    writes: Tensor,
    g: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    qk_norm_eps: float | None = None,
) -> Tensor:
    """As read.state_from_writes: one launch, with gradients one each way for every 64 tokens."""
    given = (state, k, writes, g)
    graph = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    if k.shape[1] <= _LONGEST or not graph:
        return _Read.apply(state, k, writes, g, counts, qk_norm_eps)
    for first in range(0, k.shape[1], _LONGEST):
        tokens = slice(first, first + _LONGEST)
        piece = (None if x is None else x[:, tokens] for x in (k, writes, g))
        left = None if counts is None else counts - first
        state = _Read.apply(state, *piece, left, qk_norm_eps)
    return state


def refusal(
    state: Tensor,
    k: Tensor,
    writes: Tensor,
    g: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    qk_norm_eps: float | None = None,
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    if state.dtype != torch.float32 or k.dtype not in agreement.TOLERANCE:
        return f"states are {state.dtype} and keys {k.dtype}"
    if max(state.shape[-2:]) > _WIDEST:
        return f"states are {state.shape[-2]} by {state.shape[-1]}, above {_WIDEST}"
    shape = (k.shape[-1], writes.shape[-1], writes.shape[2] // k.shape[2])
    return _disagreement(shape, g is not None, qk_norm_eps is not None, k.dtype, k.device)


@functools.cache
def _disagreement(
    shape: tuple[int, int, int], gated: bool, norm: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    k_dim, v_dim, groups = shape
    gen = torch.Generator().manual_seed(0)
    inputs = {
        "state": torch.randn(2, 2 * groups, k_dim, v_dim, generator=gen).to(device),
        "k": torch.randn(2, 70, 2, k_dim, generator=gen).to(device, dtype),
        "writes": torch.randn(2, 70, 2 * groups, v_dim, generator=gen).to(device),
    }
    if gated:
        inputs["g"] = -torch.rand(2, 70, 2 * groups, generator=gen).to(device)
    inputs["counts"] = torch.tensor([70, 8]).to(device)
    eps = 1e-6 if norm else None

    def of(form: Any) -> agreement.Form:
        return lambda *given: [form(*given[:-1], counts=given[-1], qk_norm_eps=eps)]

    return agreement.disagreement(
        of(state_from_writes),
        of(by_torch.state_from_writes),
        inputs,
        ["state"],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        k: Tensor,
        writes: Tensor,
        g: Tensor | None,
        counts: Tensor | None,
        eps: float | None,
    ) -> Tensor:
        ctx.save_for_backward(state, k, writes, g, counts)
        ctx.eps = eps
        run = _Run(state, k, writes, g, counts, eps)
        out = launch.empty(state.shape, torch.float32, state.device)
        blocks = (
            triton.cdiv(n, run.constants[b]) for n, b in ((k.shape[-1], "BK"), (run.v_dim, "BV"))
        )
        grid = (*blocks, run.streams * run.heads)
        launch.run(read_forward, grid, *run.tensors, out, *run.sizes, **run.constants)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, k, writes, g, counts = ctx.saved_tensors
        run = _Run(state, k, writes, g, counts, ctx.eps)
        shared = run.heads // k.shape[2]
        grad = grad.contiguous()
        keyed = (*writes.shape[:3], k.shape[-1])
        grad_k = launch.empty(keyed, torch.float32 if shared > 1 else k.dtype, k.device)
        grad_writes = launch.empty(writes.shape, writes.dtype, k.device)
        grad_state, grad_g = grad, None
        if g is not None:
            grad_state = launch.empty(state.shape, torch.float32, k.device)
            grad_g = launch.empty(g.shape, g.dtype, k.device)
        constants = _of_backward(run.constants)
        launch.run(
            read_backward,
            (run.streams * run.heads,),
            *(*run.tensors, grad, grad_state, grad_g, grad_writes, grad_k, *run.sizes),
            **constants,
        )
        if shared > 1:
            grad_k = grad_k.unflatten(2, (-1, shared)).sum(3).to(k.dtype)
        return grad_state, grad_k, grad_writes, grad_g, None, None


class _Run:
    """The arguments as the kernels take them."""

    def __init__(
        self,
        state: Tensor,
        k: Tensor,
        writes: Tensor,
        g: Tensor | None,
        counts: Tensor | None,
        eps: float | None,
    ) -> None:
        k, writes = launch.dense_rows(k), launch.dense_rows(writes)
        g = None if g is None else g.contiguous()
        self.tensors = state.contiguous(), k, writes, g, counts
        self.streams, tokens, self.heads, self.v_dim = writes.shape
        strides = (*k.stride()[:3], *writes.stride()[:3])
        self.sizes = (tokens, self.heads, 0.0 if eps is None else eps, *strides)
        groups = self.heads // k.shape[2]
        self.constants = _constants(
            k.shape[-1], self.v_dim, groups, g is not None, eps is not None
        ) | {"COUNTED": counts is not None}


def _constants(k_dim: int, v_dim: int, groups: int, gated: bool, norm: bool) -> dict[str, Any]:
    return {
        "K": k_dim,
        "V": v_dim,
        "GROUPS": groups,
        "BT": _LONGEST,
        "BK": min(_KEYS, padded(k_dim)),
        "BV": min(_VALUES, padded(v_dim)),
        "GATED": gated,
        "NORM": norm,
        "num_warps": 8,
        "num_stages": 1,
    }


def _of_backward(constants: dict[str, Any]) -> dict[str, Any]:
    warps = 8 if constants["GATED"] else 4
    return constants | {"BK": min(constants["BK"], _KEYS_BACKWARD), "num_warps": warps}


@triton.jit
def _keys(k, t, column, count, stride_t, K):
    """Keys [BT, BK] of a head as they are given, zero past the tokens that count."""
    inside = (t < count)[:, None] & (column < K)[None, :]
    at = k + t[:, None] * stride_t + column[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _one_over_lengths(k, t, count, eps, stride_t, K: tl.constexpr, BK: tl.constexpr):
    """1 / |k_t|, [BT]."""
    squares = tl.zeros((t.shape[0],), tl.float32)
    for first in range(0, K, BK):
        keys = _keys(k, t, first + tl.arange(0, BK), count, stride_t, K)
        squares += tl.sum(keys * keys, 1)
    return 1 / tl.sqrt(squares + eps)


@triton.jit
def _decays(g, t, stream, head, count, tokens, heads):
    """w [BT], and the decay of the state.  Sums of what comes later: differences of sums from the
    beginning would lose what is small beside those."""
    at = g + (stream.to(tl.int64) * tokens + t) * heads + head
    later = tl.load(at + heads, mask=t + 1 < count, other=0.0).to(tl.float32)
    total = tl.sum(tl.load(at, mask=t < count, other=0.0).to(tl.float32), 0)
    return tl.exp(tl.cumsum(later, 0, reverse=True)), tl.exp(total)


# How many tokens there are to read depends on the positions: no other code for other numbers.
@triton.jit(do_not_specialize=["tokens"])
def read_forward(
    state,
    k,
    writes,
    g,
    counts,
    out,
    tokens,
    heads,
    eps,
    stride_kr,
    stride_kt,
    stride_kh,
    stride_ur,
    stride_ut,
    stride_uh,
    K: tl.constexpr,
    V: tl.constexpr,
    GROUPS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """exp(c_T) S_0 + sum_t w_t n_t u_t^T, a block of a head's state."""
    stream, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    count = tokens
    if COUNTED:
        count = tl.minimum(count, tl.load(counts + stream).to(tl.int32))
    row, column = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    k += stream.to(tl.int64) * stride_kr + (head // GROUPS) * stride_kh
    writes += stream.to(tl.int64) * stride_ur + head * stride_uh
    inside = (row < K)[:, None] & (column < V)[None, :]
    at = tl.program_id(2).to(tl.int64) * K * V + row[:, None] * V + column[None, :]
    s = tl.load(state + at, mask=inside, other=0.0)
    for first in range(0, count, BT):
        t, stop = first + tl.arange(0, BT), tl.minimum(count, first + BT)
        keys = _keys(k, t, row, stop, stride_kt, K)
        if NORM:
            keys *= _one_over_lengths(k, t, stop, eps, stride_kt, K, BK)[:, None]
        if GATED:
            w, decay = _decays(g, t, stream, head, stop, tokens, heads)
            keys *= w[:, None]
            s *= decay
        u = _keys(writes, t, column, stop, stride_ut, V)
        s += tl.dot(tl.trans(keys), u, input_precision="tf32x3")
    tl.store(out + at, s, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def read_backward(
    state,
    k,
    writes,
    g,
    counts,
    grad,
    grad_state,
    grad_g,
    grad_writes,
    grad_k,
    tokens,
    heads,
    eps,
    stride_kr,
    stride_kt,
    stride_kh,
    stride_ur,
    stride_ut,
    stride_uh,
    K: tl.constexpr,
    V: tl.constexpr,
    GROUPS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """The gradients of a head, of the writes, then of the decays and keys: w_t <n_t, D_t> is
    <du_t, u_t>.  That of the state is G itself where nothing decays."""
    head_of_all = tl.program_id(0)
    stream, head = head_of_all // heads, head_of_all % heads
    t = tl.arange(0, BT)
    count = tokens
    if COUNTED:
        count = tl.minimum(count, tl.load(counts + stream).to(tl.int32))
    k += stream.to(tl.int64) * stride_kr + (head // GROUPS) * stride_kh
    writes += stream.to(tl.int64) * stride_ur + head * stride_uh
    place = (stream.to(tl.int64) * tokens + t) * heads + head
    matrix = head_of_all.to(tl.int64) * K * V
    inverse = tl.full((BT,), 1.0, tl.float32)
    if NORM:
        inverse = _one_over_lengths(k, t, count, eps, stride_kt, K, BK)
    w, decay, kept = tl.full((BT,), 1.0, tl.float32), 1.0, 0.0
    if GATED:
        w, decay = _decays(g, t, stream, head, count, tokens, heads)
    share = tl.zeros((BT,), tl.float32)
    for v in range(0, V, BV):
        column = v + tl.arange(0, BV)
        of_u = tl.zeros((BT, BV), tl.float32)
        for first in range(0, K, BK):
            row = first + tl.arange(0, BK)
            inside = (row < K)[:, None] & (column < V)[None, :]
            at = matrix + row[:, None] * V + column[None, :]
            after = tl.load(grad + at, mask=inside, other=0.0)
            keys = _keys(k, t, row, count, stride_kt, K) * (inverse * w)[:, None]
            of_u += tl.dot(keys, after, input_precision="tf32x3")
            if GATED:
                after *= decay
                kept += tl.sum(after * tl.load(state + at, mask=inside, other=0.0))
                tl.store(grad_state + at, after, mask=inside)
        share += tl.sum(of_u * _keys(writes, t, column, count, stride_ut, V), 1)
        known = (t < tokens)[:, None] & (column < V)[None, :]
        to = grad_writes + place[:, None] * V + column[None, :]
        tl.store(to, of_u.to(grad_writes.dtype.element_ty), mask=known)
    if GATED:
        of_g = tl.where(t < count, tl.cumsum(share, 0) - share + kept, 0.0)
        tl.store(grad_g + place, of_g.to(grad_g.dtype.element_ty), mask=t < tokens)
    for first in range(0, K, BK):
        row = first + tl.arange(0, BK)
        of_keys = tl.zeros((BT, BK), tl.float32)
        for v in range(0, V, BV):
            column = v + tl.arange(0, BV)
            inside = (row < K)[:, None] & (column < V)[None, :]
            at = matrix + row[:, None] * V + column[None, :]
            after = tl.load(grad + at, mask=inside, other=0.0)
            u = _keys(writes, t, column, count, stride_ut, V)
            of_keys += tl.dot(u, tl.trans(after), input_precision="tf32x3")
        of_keys *= w[:, None]
        if NORM:
            keys = _keys(k, t, row, count, stride_kt, K) * inverse[:, None]
            of_keys = (of_keys - keys * share[:, None]) * inverse[:, None]
        known = (t < tokens)[:, None] & (row < K)[None, :]
        to = grad_k + place[:, None] * K + row[None, :]
        tl.store(to, of_keys.to(grad_k.dtype.element_ty), mask=known)


# Key and value widths of the published models, and value heads that share a key.
_COMPILED = ((64, 64, 1), (128, 128, 1), (128, 128, 2), (256, 256, 1))


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time, for a whole chunk of tokens."""
    tensors = (
        "state",
        "writes",
        "g",
        "out",
        "grad",
        "grad_state",
        "grad_g",
        "grad_writes",
    )
    types = dict.fromkeys(tensors, "*fp32") | {"eps": "fp32", "counts": "*i64"}
    types |= integers("tokens", "heads")
    for k_dim, v_dim, groups in _COMPILED:
        for gated in (False, True):
            constants = _constants(k_dim, v_dim, groups, gated, True)
            constants |= {"COUNTED": True}
            without = () if gated else ("g", "grad_state", "grad_g")
            of_keys = {"grad_k": "*fp32"} if groups > 1 else {}
            title = f"k{k_dim}_v{v_dim}_{groups}_{'gated' if gated else 'plain'}"
            yield variant(read_forward, title, constants, types, without, products=True)
            constants = _of_backward(constants)
            yield variant(read_backward, title, constants, types | of_keys, without, products=True)
