"""Both delta rules over a few tokens that follow a state: one Triton kernel each way.

What chunk.py computes, for a single chunk of at most 16 tokens: branches off a text are that short,
and a launch is most of what they cost.  A forward program holds some columns of a head's state, the
backward one goes through all of them; with the names of chunk.py

    dU = P^T dO + exp(c_C - c) K dS'          L = (I + G diag(beta))^-T (beta dU) = dV
    dS = exp(c_C) dS' + (exp(c) Q)^T dO - (exp(c) K)^T L
    dP = dO U^T      dG = -L U^T      d(exp(c) Q) = dO S^T      d(exp(c) K) = -L S^T
    d(exp(c_C - c) K) = U dS'^T       dbeta = sum((dU - G^T L) E)

Products of operands rounded as triton_kernels.py says; the triangular system in float32.
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
from refine_kernels.delta_rule import chunk
from refine_kernels.delta_rule.triton_tiles import (
    LEAST_LOG_DECAY,
    decays_between,
    dot32,
    inverse_norms,
    invert_block,
    load_dense,
    load_per_token,
    load_rows,
    load_state,
    store_dense,
    store_per_token,
    store_state,
)
from refine_kernels.triton_products import padded, product
from refine_kernels.triton_variant import Variant, integers, variant

MOST_TOKENS = 16
# Columns of a state that a program holds at a time, the backward with wide keys.
_COLUMNS, _FEW_COLUMNS = 32, 16
_WIDE = 128


def few_tokens_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float,
    qk_norm_eps: float | None,
    state: Tensor,
    products: str,
) -> tuple[Tensor, Tensor]:
    """Output and state after at most 16 tokens; arguments as chunk.chunk_rule takes them."""
    options = {"scale": scale, "eps": qk_norm_eps, "products": products}
    return _FewTokens.apply(q, k, v, beta, g, state, options)


@functools.cache
def disagreement(
    shape: tuple[int, int, int],
    gated: bool,
    qk_norm_eps: float | None,
    products: str,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """What the kernels get wrong on this machine, None if nothing: five tokens of two streams."""
    k_dim, v_dim, groups = shape
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, 2, k_dim, generator=gen) for _ in range(2))
    if qk_norm_eps is None:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    heads = 2 * groups
    inputs = {
        "q": q,
        "k": k,
        "v": torch.randn(2, 5, heads, v_dim, generator=gen),
        "beta": torch.rand(2, 5, heads, generator=gen) / 2,
    }
    if gated:
        inputs["g"] = -torch.rand(2, 5, heads, generator=gen)
    inputs["state"] = torch.randn(2, heads, k_dim, v_dim, generator=gen)

    def ours(*given: Tensor) -> list[Tensor]:
        q, k, v, beta, *g, state = given
        scale = k_dim**-0.5
        gate = g[0] if gated else None
        return [*few_tokens_rule(q, k, v, beta, gate, scale, qk_norm_eps, state.float(), products)]

    def by_torch(*given: Tensor) -> list[Tensor]:
        q, k, v, beta, *g, state = given
        gate = g[0] if gated else None
        out = chunk.chunk_rule(q, k, v, beta, gate, None, qk_norm_eps, state.float(), 64, False)
        assert out.o is not None and out.final_state is not None
        return [out.o, out.final_state]

    return agreement.disagreement(
        ours,
        by_torch,
        # rates and states come in float32 whatever the tokens are
        {name: x.to(device, dtype if name in "qkv" else None) for name, x in inputs.items()},
        ["output", "final state"],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _FewTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        state: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, beta, g, state)
        ctx.options = options
        ctx.set_materialize_grads(False)
        run = _Run(q, k, v, beta, g, state, options)
        o = launch.empty(v.shape, v.dtype, v.device)
        final_state = launch.empty(state.shape, torch.float32, v.device)
        grid = (triton.cdiv(v.shape[-1], run.constants["BV"]), run.heads)
        launch.run(few_forward, grid, *run.tensors, o, final_state, *run.sizes, **run.constants)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, state = ctx.saved_tensors
        run = _Run(q, k, v, beta, g, state, ctx.options)
        grad_o = v.new_zeros(v.shape) if grad_o is None else grad_o.contiguous()
        shared = v.shape[2] // k.shape[2]
        keyed, dtype = (*v.shape[:3], k.shape[-1]), torch.float32 if shared > 1 else k.dtype
        grad_q, grad_k = (launch.empty(keyed, dtype, v.device) for _ in range(2))
        grad_v = launch.empty(v.shape, v.dtype, v.device)
        grad_beta = launch.empty(beta.shape, beta.dtype, v.device)
        grad_g = None if g is None else launch.empty(g.shape, g.dtype, v.device)
        grad_state = launch.empty(state.shape, torch.float32, v.device)
        grad_final = None if grad_final is None else grad_final.contiguous()
        launch.run(
            few_backward,
            (run.heads,),
            *(*run.tensors, grad_o, grad_final, grad_g, grad_beta, grad_v, grad_state),
            *(grad_q, grad_k, *run.sizes),
            **_of_backward(run.constants, final=grad_final is not None),
        )
        if shared > 1:
            grad_q, grad_k = (
                x.unflatten(2, (-1, shared)).sum(3).to(k.dtype) for x in (grad_q, grad_k)
            )
        return grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state, None


class _Run:
    """The arguments as the kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        state: Tensor,
        options: dict[str, Any],
    ) -> None:
        q, k, v = (launch.dense_rows(x) for x in (q, k, v))
        g = None if g is None else g.contiguous()
        self.tensors = q, k, v, beta.contiguous(), g, state.contiguous()
        batch, tokens, heads, v_dim = v.shape
        self.heads = batch * heads
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self.sizes = (tokens, heads, options["scale"], options["eps"] or 0.0, *strides)
        self.constants = _constants(
            *(k.shape[-1], v_dim, heads // k.shape[2]),
            gated=g is not None,
            norm=options["eps"] is not None,
            products=options["products"],
        )


def _constants(
    k_dim: int, v_dim: int, groups: int, *, gated: bool, norm: bool, products: str
) -> dict[str, Any]:
    return {
        "GROUPS": groups,
        "K": k_dim,
        "V": v_dim,
        "C": MOST_TOKENS,
        "BK": padded(k_dim),
        "BV": min(_COLUMNS, padded(v_dim)),
        "GATED": gated,
        "NORM": norm,
        "PRODUCTS": products,
        "num_warps": 4 if k_dim <= _WIDE else 8,
    }


def _of_backward(constants: dict[str, Any], *, final: bool) -> dict[str, Any]:
    columns = constants["BV"] if constants["K"] <= _WIDE else _FEW_COLUMNS
    return constants | {"BV": columns, "num_warps": 8, "FINAL": final}


@triton.jit
def _keyed(
    x,
    stride_b,
    stride_t,
    stride_h,
    b,
    head,
    n,
    eps,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Queries or keys [C,BK] of a head in float32, unit if asked for, and 1 / their lengths."""
    rows = load_rows(x, stride_b, stride_t, stride_h, b, head, 0, n, tl.arange(0, BK), K, C)
    rows = rows.to(tl.float32)
    inverse = inverse_norms(rows, 0, n, eps, NORM, C)
    return rows * inverse[:, None], inverse


@triton.jit
def _log_decays(g, b, h, n, H, C: tl.constexpr):
    """c [C], as large past the text as at its end."""
    return tl.cumsum(tl.maximum(load_per_token(g, b, h, 0, n, H, C), LEAST_LOG_DECAY), 0)


@triton.jit
def few_forward(
    q,
    k,
    v,
    beta,
    g,
    state,
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
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """O and the state after the tokens."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    queries, _ = _keyed(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, n, eps, K, C, BK, NORM)
    keys, _ = _keyed(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, n, eps, K, C, BK, NORM)
    values = load_rows(v, stride_vb, stride_vt, stride_vh, b, h, 0, n, cols, V, C)
    rates = load_per_token(beta, b, h, 0, n, H, C)
    s = load_state(state, bh, cols_k, cols, K, V)
    queries *= scale
    causal, lower = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    gram = tl.where(lower, product(keys, tl.trans(keys), PRODUCTS), 0.0)
    scores = tl.where(causal, product(queries, tl.trans(keys), PRODUCTS), 0.0)
    explained, out = product(keys, s, PRODUCTS), product(queries, s, PRODUCTS)
    k_out = keys
    if GATED:
        c = _log_decays(g, b, h, n, H, C)
        decays = decays_between(c, C)
        gram *= decays
        scores *= decays
        explained *= tl.exp(c)[:, None]
        out *= tl.exp(c)[:, None]
        last = tl.sum(tl.where(i == C - 1, c, 0.0), 0)
        k_out = keys * tl.exp(last - c)[:, None]
        s *= tl.exp(last)
    x = invert_block(tl.trans(gram * rates[None, :]))
    u = dot32(x, values.to(tl.float32) - explained) * rates[:, None]
    out += product(scores, u, PRODUCTS)
    s += product(tl.trans(k_out), u, PRODUCTS)
    store_dense(o, out.to(o.dtype.element_ty), b, h, 0, n, cols, H, V, C)
    store_state(final_state, s, bh, cols_k, cols, K, V)


@triton.jit
def few_backward(
    q,
    k,
    v,
    beta,
    g,
    state,
    grad_o,
    grad_final,
    grad_g,
    grad_beta,
    grad_v,
    grad_state,
    grad_q,
    grad_k,
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
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    FINAL: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """All gradients of a head; those of q and k one for each value head."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    queries, norms_q = _keyed(
        q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, n, eps, K, C, BK, NORM
    )
    keys, norms_k = _keyed(
        k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, n, eps, K, C, BK, NORM
    )
    rates = load_per_token(beta, b, h, 0, n, H, C)
    queries *= scale
    causal, lower = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    gram = tl.where(lower, product(keys, tl.trans(keys), PRODUCTS), 0.0)
    scores = tl.where(causal, product(queries, tl.trans(keys), PRODUCTS), 0.0)
    k_in, q_in, k_out, retained = keys, queries, keys, 1.0
    if GATED:
        c = _log_decays(g, b, h, n, H, C)
        decays = decays_between(c, C)
        gram *= decays
        scores *= decays
        last = tl.sum(tl.where(i == C - 1, c, 0.0), 0)
        k_in, q_in = keys * tl.exp(c)[:, None], queries * tl.exp(c)[:, None]
        k_out, retained = keys * tl.exp(last - c)[:, None], tl.exp(last)
    x = invert_block(tl.trans(gram * rates[None, :]))
    d_k_in, d_q_in = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    d_k_out = tl.zeros((C, BK), tl.float32)
    d_gram, d_scores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    d_rates = tl.zeros((C,), tl.float32)
    kept = 0.0
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        s = load_state(state, bh, cols_k, cols, K, V)
        values = load_rows(v, stride_vb, stride_vt, stride_vh, b, h, 0, n, cols, V, C)
        d_o = load_dense(grad_o, b, h, 0, n, cols, H, V, C)
        e = dot32(x, values.to(tl.float32) - product(k_in, s, PRODUCTS))
        u = e * rates[:, None]
        d_u = product(tl.trans(scores), d_o, PRODUCTS)
        d_s = product(tl.trans(q_in), d_o, PRODUCTS)
        if FINAL:
            after = load_state(grad_final, bh, cols_k, cols, K, V)
            d_u += product(k_out, after, PRODUCTS)
            d_s += retained * after
            d_k_out += product(u, tl.trans(after), PRODUCTS)
            if GATED:
                kept += tl.sum(tl.sum(after * s, 1), 0)
        d_v = dot32(tl.trans(x), d_u * rates[:, None])
        store_dense(grad_v, d_v.to(grad_v.dtype.element_ty), b, h, 0, n, cols, H, V, C)
        d_s -= product(tl.trans(k_in), d_v, PRODUCTS)
        store_state(grad_state, d_s, bh, cols_k, cols, K, V)
        d_rates += tl.sum((d_u - product(tl.trans(gram), d_v, PRODUCTS)) * e, 1)
        d_gram -= product(d_v, tl.trans(u), PRODUCTS)
        d_scores += product(d_o, tl.trans(u), PRODUCTS)
        d_k_in -= product(d_v, tl.trans(s), PRODUCTS)
        d_q_in += product(d_o, tl.trans(s), PRODUCTS)
    store_per_token(grad_beta, d_rates.to(grad_beta.dtype.element_ty), b, h, 0, n, H, C)
    d_gram, d_scores = tl.where(lower, d_gram, 0.0), tl.where(causal, d_scores, 0.0)
    if GATED:
        between = d_gram * gram + d_scores * scores
        by_end = tl.sum(d_k_out * k_out, 1)
        d_c = tl.sum(between, 1) - tl.sum(between, 0) - by_end
        d_c += tl.sum(d_k_in * k_in, 1) + tl.sum(d_q_in * q_in, 1)
        d_g = tl.cumsum(d_c, 0, reverse=True) + tl.sum(by_end, 0) + retained * kept
        counted = load_per_token(g, b, h, 0, n, H, C) >= LEAST_LOG_DECAY
        d_g = tl.where(counted, d_g, 0.0).to(grad_g.dtype.element_ty)
        store_per_token(grad_g, d_g, b, h, 0, n, H, C)
        d_gram *= decays
        d_scores *= decays
        d_q_in *= tl.exp(c)[:, None]
        d_k_in *= tl.exp(c)[:, None]
        d_k_out *= tl.exp(last - c)[:, None]
    d_q = d_q_in + product(d_scores, keys, PRODUCTS)
    d_k = d_k_in + d_k_out
    d_k += product(d_gram + tl.trans(d_gram), keys, PRODUCTS)
    d_k += product(tl.trans(d_scores), queries, PRODUCTS)
    if NORM:
        d_k = (d_k - keys * tl.sum(d_k * keys, 1)[:, None]) * norms_k[:, None]
        # of unit queries, of which those here are `scale` times
        along = tl.sum(d_q * queries, 1) / (scale * scale)
        d_q = (d_q - queries * along[:, None]) * norms_q[:, None]
    d_q *= scale
    store_dense(grad_q, d_q.to(grad_q.dtype.element_ty), b, h, 0, n, cols_k, H, K, C)
    store_dense(grad_k, d_k.to(grad_k.dtype.element_ty), b, h, 0, n, cols_k, H, K, C)


# Key and value widths of the published models, and value heads that share a key.
_COMPILED = ((64, 64, 1), (96, 192, 1), (128, 128, 1), (128, 128, 2), (192, 192, 1), (256, 256, 1))


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time: bfloat16, gates and states in float32."""
    tensors = ("beta", "g", "state", "final_state", "grad_g", "grad_beta", "grad_state")
    types = dict.fromkeys(tensors, "*fp32") | {"scale": "fp32", "eps": "fp32"}
    types |= integers("n", "H")
    for k_dim, v_dim, groups in _COMPILED:
        for gated in (False, True):
            constants = _constants(k_dim, v_dim, groups, gated=gated, norm=True, products="bf16")
            without = ("grad_final", *(() if gated else ("g", "grad_g")))
            of_keys = {"grad_q": "*fp32", "grad_k": "*fp32"} if groups > 1 else {}
            title = f"k{k_dim}_v{v_dim}_{groups}_{'gated' if gated else 'plain'}"
            options = {"products": True, "may_spill": k_dim > _WIDE}
            yield variant(few_forward, title, constants, types, without, **options)
            constants = _of_backward(constants, final=False)
            yield variant(few_backward, title, constants, types | of_keys, without, **options)
