"""Triton kernels of the chunkwise delta rule, with and without decay, forward and backward.

The equations and names are those of chunk.py.  With X = (I + G diag(beta))^-1 and W = X exp(c) K
the errors of a chunk are E = X V - W S, so only two products a chunk have to wait for the state:

    forward     gram      G diag(beta), c, norms of keys        all chunks at once
                invert    X in its place                        all chunks at once
                apply     W, X V                                all chunks at once
                scan      S before each chunk, E                chunk after chunk
                output    O                                     all chunks at once
    backward    gram, invert, apply and scan again, then
                local     P^T dO                                all chunks at once
                queries   dq, dP                                all chunks at once
                reverse   dS after each chunk, dU               chunk before chunk
                inputs    dk, dv, dbeta, dg                     all chunks at once

`reverse` adds the gradients of tapped states as it comes by them.  docs/kernels.md says what each
moves and why the work is split so.

triton_chunk.py launches them.  Deviations from chunk.py: the products' operands are rounded to the
input's precision (sums and the state stay float32), norms enter as a factor per token instead of
as unit vectors, and a log decay counts as at least LEAST_LOG_DECAY, whose exp is zero in float32.

Layouts: q, k, v [B,T,heads,D] with strides, last dimension dense; o and all gradients of inputs
[B,T,H,D] dense; beta, g [B,T,H]; states [N,BH,K,V] float32; what lives from one kernel to the next
[BH,N,C,D], full chunks, of which rows past the end of the text are zero.
"""

import triton
import triton.language as tl

from refine_kernels.delta_rule.triton_tiles import (
    LEAST_LOG_DECAY,
    decays_between,
    dot32,
    inverse_norms,
    invert_block,
    load_chunk,
    load_dense,
    load_per_token,
    load_rows,
    load_state,
    store_chunk,
    store_dense,
    store_per_token,
    store_state,
)
from refine_kernels.triton_products import product


@triton.jit
def _block(a, row, col, C: tl.constexpr):
    """Block (row, col) of 16 by 16 of a [C,C]."""
    i = tl.arange(0, 16)
    return tl.load(a + (16 * row + i)[:, None] * C + (16 * col + i)[None, :])


@triton.jit
def _store_block(a, value, row, col, C: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(a + (16 * row + i)[:, None] * C + (16 * col + i)[None, :], value)


@triton.jit
def invert(matrices, C: tl.constexpr):
    """(I + a)^-1 in place of each strictly lower triangular a of [.,C,C], float32, C <= 64.

    Blocks of 16 by forward substitution, row of blocks after row of blocks.  No powers of a, which
    explode where keys repeat.
    """
    a = matrices + tl.program_id(0).to(tl.int64) * (C * C)
    x00 = invert_block(tl.trans(_block(a, 0, 0, C)))
    if C >= 32:
        a10 = _block(a, 1, 0, C)
        x11 = invert_block(tl.trans(_block(a, 1, 1, C)))
        x10 = -dot32(x11, dot32(a10, x00))
    if C >= 64:
        a20, a21 = _block(a, 2, 0, C), _block(a, 2, 1, C)
        x22 = invert_block(tl.trans(_block(a, 2, 2, C)))
        x21 = -dot32(x22, dot32(a21, x11))
        x20 = -dot32(x22, dot32(a20, x00) + dot32(a21, x10))
        a30, a31, a32 = _block(a, 3, 0, C), _block(a, 3, 1, C), _block(a, 3, 2, C)
        x33 = invert_block(tl.trans(_block(a, 3, 3, C)))
        x32 = -dot32(x33, dot32(a32, x22))
        x31 = -dot32(x33, dot32(a31, x11) + dot32(a32, x21))
        x30 = -dot32(x33, dot32(a30, x00) + dot32(a31, x10) + dot32(a32, x20))
        _store_block(a, x20, 2, 0, C)
        _store_block(a, x21, 2, 1, C)
        _store_block(a, x22, 2, 2, C)
        _store_block(a, x30, 3, 0, C)
        _store_block(a, x31, 3, 1, C)
        _store_block(a, x32, 3, 2, C)
        _store_block(a, x33, 3, 3, C)
    if C >= 32:
        _store_block(a, x10, 1, 0, C)
        _store_block(a, x11, 1, 1, C)
    _store_block(a, x00, 0, 0, C)


@triton.jit(do_not_specialize=["n"])
def gram(
    k,
    beta,
    g,
    matrices,
    log_decays,
    k_norms,
    n,
    H,
    eps,
    stride_kb,
    stride_kt,
    stride_kh,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """G diag(beta), c and the inverse norms of the keys."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(0) + chunk
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    keys = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    norms = inverse_norms(keys, first, n, eps, NORM, C)
    rates = load_per_token(beta, b, h, first, n, H, C)
    a = product(keys, tl.trans(keys), PRODUCTS) * norms[:, None] * (norms * rates)[None, :]
    if GATED:
        steps = tl.maximum(load_per_token(g, b, h, first, n, H, C), LEAST_LOG_DECAY)
        c = tl.cumsum(steps, 0)
        a *= decays_between(c, C)
        tl.store(log_decays + place * C + i, c)
    tl.store(k_norms + place * C + i, norms)
    at = matrices + place * (C * C) + i[:, None] * C + i[None, :]
    tl.store(at, tl.where(i[:, None] > i[None, :], a, 0.0))


@triton.jit(do_not_specialize=["n"])
def apply(
    k,
    v,
    inverse,
    log_decays,
    k_norms,
    w,
    errors,
    n,
    H,
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
    PRODUCTS: tl.constexpr,
):
    """W and (I + G diag(beta))^-1 V."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(0) + chunk
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    x = tl.load(inverse + place * (C * C) + i[:, None] * C + i[None, :])
    keys = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    from_start = tl.load(k_norms + place * C + i)
    if GATED:
        from_start *= tl.exp(tl.load(log_decays + place * C + i))
    of_keys = product(x * from_start[None, :], keys, PRODUCTS)
    store_chunk(w, of_keys, place, cols_k, K, C)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        values = load_rows(v, stride_vb, stride_vt, stride_vh, b, h, first, n, cols, V, C)
        store_chunk(errors, product(x, values, PRODUCTS), place, cols, V, C)


@triton.jit(do_not_specialize=["n"])
def scan(
    k,
    beta,
    w,
    errors,
    log_decays,
    k_norms,
    initial_state,
    states,
    final_state,
    writes,
    n,
    H,
    stride_kb,
    stride_kt,
    stride_kh,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    WRITES: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """The states before each chunk and after the last; E in place of what `apply` left; U [B,T,H,V]
    if asked for."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    count = tl.cdiv(n, C)
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    state = load_state(initial_state, bh, cols_k, cols, K, V)
    for chunk in range(count):
        first = chunk * C
        place = bh * count + chunk
        store_state(states, state, chunk * tl.num_programs(1) + bh, cols_k, cols, K, V)
        w_ = load_chunk(w, place, cols_k, K, C)
        e = load_chunk(errors, place, cols, V, C) - product(w_, state, PRODUCTS)
        store_chunk(errors, e, place, cols, V, C)
        keys = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
        weight = load_per_token(beta, b, h, first, n, H, C)
        if WRITES:
            u = (e * weight[:, None]).to(writes.dtype.element_ty)
            store_dense(writes, u, b, h, first, n, cols, H, V, C)
        weight *= tl.load(k_norms + place * C + i)
        if GATED:
            c = tl.load(log_decays + place * C + i)
            last = tl.load(log_decays + place * C + C - 1)
            weight *= tl.exp(last - c)
            state *= tl.exp(last)
        state += product(tl.trans(keys), e * weight[:, None], PRODUCTS)
    store_state(final_state, state, bh, cols_k, cols, K, V)


@triton.jit(do_not_specialize=["n"])
def output(
    q,
    k,
    beta,
    errors,
    log_decays,
    k_norms,
    states,
    o,
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
    """O = exp(c) Q S + P U."""
    chunk, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(1) + chunk
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    queries = load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
    q_norms = scale * inverse_norms(queries, first, n, eps, NORM, C)
    keys = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    weight = tl.load(k_norms + place * C + i) * load_per_token(beta, b, h, first, n, H, C)
    scores = product(queries, tl.trans(keys), PRODUCTS) * q_norms[:, None] * weight[None, :]
    if GATED:
        c = tl.load(log_decays + place * C + i)
        scores *= decays_between(c, C)
        q_norms *= tl.exp(c)
    else:
        scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    state = load_state(states, chunk * tl.num_programs(2) + bh, cols_k, cols, K, V)
    out = product(queries, state, PRODUCTS) * q_norms[:, None]
    out += product(scores, load_chunk(errors, place, cols, V, C), PRODUCTS)
    store_dense(o, out, b, h, first, n, cols, H, V, C)


@triton.jit(do_not_specialize=["n"])
def local(
    q,
    k,
    grad_o,
    log_decays,
    k_norms,
    q_norms,
    grad_writes,
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
    """P^T dO, the gradient of the writes by the outputs of their own chunk; scaled query norms."""
    chunk, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(1) + chunk
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    queries = load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
    norms = scale * inverse_norms(queries, first, n, eps, NORM, C)
    tl.store(q_norms + place * C + i, norms)  # the same from each block of columns
    keys = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    norms_k = tl.load(k_norms + place * C + i)
    # of keys (rows) and queries (columns): P transposed
    scores = product(keys, tl.trans(queries), PRODUCTS) * norms_k[:, None] * norms[None, :]
    if GATED:
        scores *= tl.trans(decays_between(tl.load(log_decays + place * C + i), C))
    else:
        scores = tl.where(i[:, None] <= i[None, :], scores, 0.0)
    d_o = load_dense(grad_o, b, h, first, n, cols, H, V, C)
    store_chunk(grad_writes, product(scores, d_o, PRODUCTS), place, cols, V, C)


@triton.jit(do_not_specialize=["n"])
def reverse(
    q,
    k,
    beta,
    grad_o,
    w,
    log_decays,
    k_norms,
    q_norms,
    slots,
    given,
    grad_writes,
    grad_states,
    grad_initial,
    n,
    H,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUT: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Gradients of the states after each chunk, of the initial state and, completing what `local`
    left, of the writes as output and next state use them.

    slots[i] says which of ``given`` [.,BH,K,V] is a gradient for the state after chunk i, -1: none.
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    count = tl.cdiv(n, C)
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    d_state = tl.zeros((BK, BV), tl.float32)
    for back in range(count):
        chunk = count - 1 - back
        first = chunk * C
        place = bh * count + chunk
        slot = tl.load(slots + chunk)
        if slot >= 0:
            number = tl.cast(slot, tl.int64) * tl.num_programs(1) + bh
            d_state += load_state(given, number, cols_k, cols, K, V)
        store_state(grad_states, d_state, place, cols_k, cols, K, V)
        keys = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
        out_weight = tl.load(k_norms + place * C + i)
        if GATED:
            c = tl.load(log_decays + place * C + i)
            last = tl.load(log_decays + place * C + C - 1)
            out_weight *= tl.exp(last - c)
        d_u = product(keys, d_state, PRODUCTS) * out_weight[:, None]
        if OUTPUT:
            d_u += load_chunk(grad_writes, place, cols, V, C)
        store_chunk(grad_writes, d_u, place, cols, V, C)
        if GATED:
            d_state *= tl.exp(last)
        if OUTPUT:
            queries = load_rows(
                q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C
            )
            in_weight = tl.load(q_norms + place * C + i)
            if GATED:
                in_weight *= tl.exp(c)
            d_o = load_dense(grad_o, b, h, first, n, cols, H, V, C)
            d_state += product(tl.trans(queries), d_o * in_weight[:, None], PRODUCTS)
        w_ = load_chunk(w, place, cols_k, K, C)
        rates = load_per_token(beta, b, h, first, n, H, C)
        d_state -= product(tl.trans(w_), d_u * rates[:, None], PRODUCTS)
    store_state(grad_initial, d_state, bh, cols_k, cols, K, V)


@triton.jit(do_not_specialize=["n"])
def queries(
    q,
    k,
    beta,
    grad_o,
    errors,
    log_decays,
    k_norms,
    states,
    grad_q,
    grad_scores,
    grad_log_decays,
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
    """Gradients of q (one for each value head), of P before its decay and, by O alone, of c.

    That of exp(c) Q is dO S^T, that of P is dO U^T.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(0) + chunk
    number = chunk * tl.num_programs(1) + bh
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    d_q = tl.zeros((C, BK), tl.float32)
    d_scores = tl.zeros((C, C), tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        d_o = load_dense(grad_o, b, h, first, n, cols, H, V, C)
        d_scores += product(d_o, tl.trans(load_chunk(errors, place, cols, V, C)), PRODUCTS)
        state = load_state(states, number, cols_k, cols, K, V)
        d_q += product(d_o, tl.trans(state), PRODUCTS)
    d_scores *= load_per_token(beta, b, h, first, n, H, C)[None, :]
    norms_k = tl.load(k_norms + place * C + i)
    q_ = load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
    k_ = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    inverse_q = inverse_norms(q_, first, n, eps, NORM, C)
    norms_q = scale * inverse_q
    if GATED:
        c = tl.load(log_decays + place * C + i)
        d_q *= tl.exp(c)[:, None]
        d_scores *= decays_between(c, C)
        d_c = tl.sum(d_q * q_, 1) * norms_q
        between = product(q_, tl.trans(k_), PRODUCTS) * norms_q[:, None] * norms_k[None, :]
        between *= d_scores
        d_c += tl.sum(between, 1) - tl.sum(between, 0)
        tl.store(grad_log_decays + place * C + i, d_c)
    else:
        d_scores = tl.where(i[:, None] >= i[None, :], d_scores, 0.0)
    tl.store(grad_scores + place * (C * C) + i[:, None] * C + i[None, :], d_scores)
    d_q += product(d_scores * norms_k[None, :], k_, PRODUCTS)
    d_q *= norms_q[:, None]
    if NORM:
        d_q -= (tl.sum(d_q * q_, 1) * inverse_q * inverse_q)[:, None] * q_
    store_dense(grad_q, d_q, b, h, first, n, cols_k, H, K, C)


@triton.jit(do_not_specialize=["n"])
def inputs(
    q,
    k,
    beta,
    g,
    inverse,
    errors,
    log_decays,
    k_norms,
    q_norms,
    states,
    grad_states,
    grad_writes,
    grad_scores,
    grad_log_decays,
    grad_k,
    grad_v,
    grad_beta,
    grad_g,
    n,
    H,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    OUTPUT: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Gradients of k (one for each value head), v, beta and g.

    With L = (I + G diag(beta))^-T (beta dU), the gradient of V, that of exp(c) K is -L S^T, that of
    exp(c_C - c) K is U dS^T, that of G is -L U^T, and that of beta the sum over columns of
    (dU - G^T L) E.

    The gradient of g_j gathers what depends on exp(c_t), t >= j, on exp(c_C - c_s), s < j, and on
    exp(c_t - c_s), s < j <= t.  The last comes as sums of rows less sums of columns of one matrix,
    so that what lies on one side of j alone cancels but for float32's rounding.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(0) + chunk
    number = chunk * tl.num_programs(1) + bh
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    rates = load_per_token(beta, b, h, first, n, H, C)
    d_k = tl.zeros((C, BK), tl.float32)
    crossed = tl.zeros((C, C), tl.float32)  # L E^T
    d_rates = tl.zeros((C,), tl.float32)
    adjoint = tl.trans(tl.load(inverse + place * (C * C) + i[:, None] * C + i[None, :]))
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        d_u = load_chunk(grad_writes, place, cols, V, C)
        d_v = product(adjoint, d_u * rates[:, None], PRODUCTS)
        store_dense(grad_v, d_v, b, h, first, n, cols, H, V, C)
        e = load_chunk(errors, place, cols, V, C)
        d_rates += tl.sum(d_u.to(tl.float32) * e, 1)
        crossed += product(d_v, tl.trans(e), PRODUCTS)
        state = load_state(states, number, cols_k, cols, K, V)
        d_k -= product(d_v, tl.trans(state), PRODUCTS)

    k_ = load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    norms_k = tl.load(k_norms + place * C + i)
    writes = rates
    if GATED:
        c = tl.load(log_decays + place * C + i)
        last = tl.load(log_decays + place * C + C - 1)
        d_k *= tl.exp(c)[:, None]
        writes = rates * tl.exp(last - c)
        by_start = tl.sum(d_k * k_, 1) * norms_k
    kept = 0.0
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        u = load_chunk(errors, place, cols, V, C) * writes[:, None]
        d_state = load_state(grad_states, place, cols_k, cols, K, V)
        d_k += product(u, tl.trans(d_state), PRODUCTS)
        if GATED:
            state = load_state(states, number, cols_k, cols, K, V)
            kept += tl.sum(tl.sum(state * d_state, 1), 0)

    lower = i[:, None] > i[None, :]
    matrix = product(k_, tl.trans(k_), PRODUCTS) * norms_k[:, None] * norms_k[None, :]
    matrix = tl.where(lower, matrix, 0.0)
    if GATED:
        matrix *= decays_between(c, C)  # G
        d_k_in_and_out = tl.sum(d_k * k_, 1) * norms_k
        by_end = d_k_in_and_out - by_start
        between = -crossed * rates[None, :] * matrix
        d_c = by_start + tl.sum(between, 1) - tl.sum(between, 0)
        if OUTPUT:
            d_c += tl.load(grad_log_decays + place * C + i)
        d_g = tl.cumsum(d_c, 0, reverse=True)
        d_g += tl.cumsum(by_end, 0) - by_end + tl.exp(last) * kept
        counted = load_per_token(g, b, h, first, n, H, C) >= LEAST_LOG_DECAY
        store_per_token(grad_g, tl.where(counted, d_g, 0.0), b, h, first, n, H, C)
    d_rates -= tl.sum(matrix * crossed, 0)
    store_per_token(grad_beta, d_rates, b, h, first, n, H, C)
    d_gram = tl.where(lower, -crossed * rates[None, :], 0.0)
    if GATED:
        d_gram *= decays_between(c, C)
    d_k += product((d_gram + tl.trans(d_gram)) * norms_k[None, :], k_, PRODUCTS)
    if OUTPUT:
        d_scores = tl.load(grad_scores + place * (C * C) + i[:, None] * C + i[None, :])
        q_ = load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
        norms_q = tl.load(q_norms + place * C + i)
        d_k += product(tl.trans(d_scores) * norms_q[None, :], q_, PRODUCTS)
    d_k *= norms_k[:, None]
    if NORM:
        d_k -= (tl.sum(d_k * k_, 1) * norms_k * norms_k)[:, None] * k_
    store_dense(grad_k, d_k, b, h, first, n, cols_k, H, K, C)
