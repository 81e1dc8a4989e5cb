"""Decode form of both delta rules in one launch: what recurrent.py computes, in Triton.

A program holds some columns of a head's state for all tokens, so that the state is read once and
written once.  Norms, decay, read, write and output are float32; nothing is differentiated here.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import agreement, launch
from refine_kernels.delta_rule import recurrent as by_torch
from refine_kernels.triton_variant import Variant, integers, variant

_LARGEST_KEY = 256
_ELEMENTS = 4096  # of a state, that a program holds


def recurrent_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """As recurrent.recurrent_delta_rule, without gradients."""
    return _rule(q, k, v, beta, None, scale, qk_norm_eps, initial_state)


def recurrent_gated_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """As gated_delta_rule.recurrent.recurrent_gated_delta_rule, without gradients."""
    return _rule(q, k, v, beta, g, scale, qk_norm_eps, initial_state)


def refusal(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> str | None:
    """Why the kernel is not for these arguments here, None if it is."""
    if k.shape[-1] > _LARGEST_KEY:
        return f"keys are {k.shape[-1]} wide, above {_LARGEST_KEY}"
    inputs = (q, k, v, beta, g, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "the decode form has a gradient to find"
    shape = (k.shape[-1], v.shape[-1], v.shape[2] // k.shape[2])
    return agreement.unknown_dtype(v.dtype) or _disagreement(
        shape, g is not None, qk_norm_eps, v.dtype, v.device
    )


@functools.cache
def _disagreement(
    shape: tuple[int, int, int],
    gated: bool,
    qk_norm_eps: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    k_dim, v_dim, groups = shape
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 2, 2, k_dim, generator=gen) for _ in range(2))
    if qk_norm_eps is None:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    heads = 2 * groups
    inputs = {
        "q": q,
        "k": k,
        "v": torch.randn(3, 2, heads, v_dim, generator=gen),
        "beta": torch.rand(3, 2, heads, generator=gen),
        "g": -torch.rand(3, 2, heads, generator=gen),
        "state": torch.randn(3, heads, k_dim, v_dim, generator=gen),
    }

    def of(rule: Any) -> agreement.Form:
        def run(*given: Tensor) -> Any:
            q, k, v, beta, g, state = given
            return rule(q, k, v, beta, g if gated else None, None, qk_norm_eps, state.float())

        return run

    return agreement.disagreement(
        of(_rule),
        of(by_torch.recurrent_rule),
        # rates and states come in float32 whatever the tokens are
        {name: x.to(device, dtype if name in "qkv" else None) for name, x in inputs.items()},
        ["output", "state"],
        tolerance=agreement.TOLERANCE[dtype],
        gradients=False,
    )


def _rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    qk_norm_eps: float | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Both rules; g [B,T,H] is the log decay (<= 0), None for no decay."""
    batch, tokens, heads, v_dim = v.shape
    k_dim = k.shape[-1]
    state = launch.empty((batch, heads, k_dim, v_dim), torch.float32, v.device)
    o = None if q is None else launch.empty(v.shape, v.dtype, v.device)
    q = None if q is None else launch.dense_rows(q)
    k, v = launch.dense_rows(k), launch.dense_rows(v)
    constants = _constants(k_dim, v_dim, heads // k.shape[2], qk_norm_eps is not None)
    launch.run(
        recurrent,
        (triton.cdiv(v_dim, constants["BV"]), batch * heads),
        *(q, k, v, beta.contiguous(), None if g is None else g.contiguous()),
        None if initial_state is None else initial_state.float().contiguous(),
        *(o, state, tokens, heads, k_dim**-0.5 if scale is None else scale, qk_norm_eps or 0.0),
        *((0, 0, 0) if q is None else q.stride()[:3]),
        *(*k.stride()[:3], *v.stride()[:3]),
        **constants,
    )
    return o, state


def _constants(k_dim: int, v_dim: int, groups: int, norm: bool) -> dict[str, Any]:
    rows = triton.next_power_of_2(k_dim)
    columns = min(max(16, _ELEMENTS // rows), triton.next_power_of_2(v_dim))
    return {
        "GROUPS": groups,
        "K": k_dim,
        "V": v_dim,
        "BK": rows,
        "BV": columns,
        "NORM": norm,
        "num_warps": 4,
    }


@triton.jit
def _unit(x, row, K: tl.constexpr, NORM: tl.constexpr, eps):
    """A key or query, with norm one if so wanted."""
    x = tl.load(x + row, mask=row < K, other=0.0).to(tl.float32)
    if NORM:
        x *= 1 / tl.sqrt(tl.sum(x * x, 0) + eps)
    return x


@triton.jit
def recurrent(
    q,
    k,
    v,
    beta,
    g,
    initial_state,
    o,
    final_state,
    n,
    H,
    scale,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    NORM: tl.constexpr,
):
    """S = exp(g) S, u = beta (v - S^T k), S += k u^T, o = scale S^T q, token after token."""
    row, column = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    b, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    inside = (row < K)[:, None] & (column < V)[None, :]
    at = tl.program_id(1).to(tl.int64) * K * V + row[:, None] * V + column[None, :]
    state = tl.zeros((BK, BV), tl.float32)
    if initial_state is not None:
        state = tl.load(initial_state + at, mask=inside, other=0.0)
    k += b * stride_kb + (head // GROUPS) * stride_kh
    v += b * stride_vb + head * stride_vh
    if q is not None:
        q += b * stride_qb + (head // GROUPS) * stride_qh
    for t in range(n):
        token = (b * n + t) * H + head
        key = _unit(k + t * stride_kt, row, K, NORM, eps)
        value = tl.load(v + t * stride_vt + column, mask=column < V, other=0.0).to(tl.float32)
        if g is not None:
            state *= tl.exp(tl.load(g + token).to(tl.float32))
        rate = tl.load(beta + token).to(tl.float32)
        write = rate * (value - tl.sum(key[:, None] * state, 0))
        state += key[:, None] * write[None, :]
        if q is not None:
            query = scale * _unit(q + t * stride_qt, row, K, NORM, eps)
            read = tl.sum(query[:, None] * state, 0)
            tl.store(o + token * V + column, read.to(o.dtype.element_ty), mask=column < V)
    tl.store(final_state + at, state, mask=inside)


# Key and value widths of the published models from 0.4B to 7B.
_COMPILED = ((64, 64), (128, 128), (192, 192), (256, 256), (256, 512))


def variants() -> Iterator[Variant]:
    """As it is compiled ahead of time, for bfloat16 tokens and gates in float32."""
    types = dict.fromkeys(("beta", "g", "initial_state", "final_state"), "*fp32")
    types |= {"scale": "fp32", "eps": "fp32", **integers("n", "H")}
    for k_dim, v_dim in _COMPILED:
        constants = _constants(k_dim, v_dim, 1, True)
        yield variant(recurrent, f"k{k_dim}_v{v_dim}", constants, types)
