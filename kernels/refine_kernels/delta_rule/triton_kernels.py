"""Triton kernels of the chunkwise delta rule, with and without decay, forward and backward.

The equations and names are those of chunk.py.  With W = (I + G diag(beta))^-1 exp(c) K the errors of
a chunk are E = (I + G diag(beta))^-1 V - W S, so only two products a chunk depend on the state:

    forward     prepare (all chunks at once)   W, E without the state's part
                scan    (chunk after chunk)    E, S before each chunk
                output  (all chunks at once)   O
    backward    prepare and scan again, then
                local   (all chunks at once)   P^T dO
                reverse (last chunk first)     dU, dS after each chunk, tapped states' gradients added
                inputs  (all chunks at once)   dq, dk, dv, dbeta, dg

triton_chunk.py launches them.  Deviations from chunk.py: the products' operands are rounded to the
input's precision (sums and the state stay float32), norms enter as a factor per token instead of
as unit vectors, and a log decay counts as at least LEAST_LOG_DECAY, whose exp is zero in float32.

Layouts: q, k, v [B,T,heads,D] with strides, last dimension dense; o and all gradients of inputs
[B,T,H,D] dense; beta, g [B,T,H]; states [N,BH,K,V] float32; what lives from one kernel to the next
[BH,N,C,D], full chunks, of which rows past the end of the text are zero.
"""

import triton
import triton.language as tl

# exp(-104) is less than half of the least number above zero in float32.  Sums of a chunk's log
# decays stay below 64 * 104, so that their differences keep an absolute accuracy of 5e-4 even
# after decays that erase everything, and -inf does no harm.
LEAST_LOG_DECAY = tl.constexpr(-104.0)


@triton.jit
def _product(a, b, PRODUCTS: tl.constexpr):
    """a @ b in float32 from operands rounded as PRODUCTS says.

    "bf16": bfloat16, "tf32": TF32, "tf32x3": three TF32 products, nearly float32.
    "bf16-as-fp32": rounded to bfloat16, multiplied as float32, for the interpreter, which has no
    bfloat16 product; the products of two bfloat16 numbers are exact either way.
    """
    if PRODUCTS == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRODUCTS == "bf16-as-fp32":
        return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32))
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRODUCTS)


@triton.jit
def _load_rows(
    x, stride_b, stride_t, stride_h, b, head, first, n, cols, D: tl.constexpr, C: tl.constexpr
):
    """Rows first..first+C of x[b, :, head, cols]; zero past row n and column D."""
    rows = tl.arange(0, C)
    x += b * stride_b + head * stride_h + tl.cast(first, tl.int64) * stride_t
    mask = (first + rows < n)[:, None] & (cols < D)[None, :]
    return tl.load(x + rows[:, None] * stride_t + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _load_dense(x, b, head, first, n, cols, H, D: tl.constexpr, C: tl.constexpr):
    """_load_rows of a dense [B,T,H,D]."""
    return _load_rows(x, tl.cast(n, tl.int64) * H * D, H * D, D, b, head, first, n, cols, D, C)


@triton.jit
def _store_dense(x, value, b, head, first, n, cols, H, D: tl.constexpr, C: tl.constexpr):
    """`value` into rows first..first+C of x[b, :, head, cols], as far as x reaches."""
    rows = tl.arange(0, C)
    x += (b * n + first) * (H * D) + head * D
    mask = (first + rows < n)[:, None] & (cols < D)[None, :]
    tl.store(x + rows[:, None] * (H * D) + cols[None, :], value, mask=mask)


@triton.jit
def _load_per_token(x, b, head, first, n, H, C: tl.constexpr):
    """x[b, first:first+C, head] of a dense [B,T,H] as float32, zero past n."""
    rows = tl.arange(0, C)
    x += (b * n + first) * H + head
    return tl.load(x + rows * H, mask=first + rows < n, other=0.0).to(tl.float32)


@triton.jit
def _store_per_token(x, value, b, head, first, n, H, C: tl.constexpr):
    rows = tl.arange(0, C)
    x += (b * n + first) * H + head
    tl.store(x + rows * H, value, mask=first + rows < n)


@triton.jit
def _chunk_pointers(x, chunk, cols, D: tl.constexpr, C: tl.constexpr):
    """Addresses of chunk number `chunk` of [BH*N,C,D], and which of them exist."""
    rows = tl.arange(0, C)
    mask = (rows >= 0)[:, None] & (cols < D)[None, :]
    return x + chunk * (C * D) + rows[:, None] * D + cols[None, :], mask


@triton.jit
def _state_pointers(x, number, rows, cols, K: tl.constexpr, V: tl.constexpr):
    """Addresses of state number `number` of [...,K,V], and which of them exist."""
    mask = (rows < K)[:, None] & (cols < V)[None, :]
    return x + number * (K * V) + rows[:, None] * V + cols[None, :], mask


@triton.jit
def _inverse_norms(x, first, n, eps, NORM: tl.constexpr, C: tl.constexpr):
    """1 / sqrt(sum of squares + eps) of each row, zero past n; ones if no norm is asked for."""
    valid = first + tl.arange(0, C) < n
    if NORM:
        x = x.to(tl.float32)
        return tl.where(valid, tl.rsqrt(tl.sum(x * x, 1) + eps), 0.0)
    else:
        return tl.where(valid, 1.0, 0.0)


@triton.jit
def _decays(c, C: tl.constexpr):
    """exp(c_t - c_s) for s <= t, else zero; no exp of what is above the diagonal."""
    i = tl.arange(0, C)
    causal = i[:, None] >= i[None, :]
    return tl.where(causal, tl.exp(tl.where(causal, c[:, None] - c[None, :], 0.0)), 0.0)


@triton.jit
def _unit_lower_inverse(a, C: tl.constexpr, EXACT: tl.constexpr):
    """(I + a)^-1 for strictly lower triangular a [C,C], in float32.

    The diagonal blocks of 16 by forward substitution, all at once; then pairs of blocks are joined,
    the lower left part of a pair being -(second inverse) a (first inverse).  No powers of a, which
    explode where keys repeat.
    """
    B: tl.constexpr = 16
    i = tl.arange(0, C)
    same = (i // B)[:, None] == (i // B)[None, :]
    blocks = tl.reshape(tl.where(same, a, 0.0), (C // B, B, C // B, B))
    blocks = tl.sum(blocks, 2)  # [C/B,B,B]
    row = tl.arange(0, B)[None, :, None]
    x = tl.where(row == tl.arange(0, B)[None, None, :], 1.0, 0.0) + tl.zeros_like(blocks)
    for r in range(1, B):
        a_r = tl.sum(tl.where(row == r, blocks, 0.0), 1)
        known = tl.sum(a_r[:, :, None] * x, 1)
        x = tl.where(row == r, x - known[:, None, :], x)
    x = tl.broadcast_to(tl.reshape(x, (C // B, B, 1, B)), (C // B, B, C // B, B))
    x = tl.where(same, tl.reshape(x, (C, C)), 0.0)
    if C >= 2 * B:
        x = _join_pairs(x, a, B, C, EXACT)
    if C >= 4 * B:
        x = _join_pairs(x, a, 2 * B, C, EXACT)
    return x


@triton.jit
def _join_pairs(x, a, B: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """From the inverses of the diagonal blocks of B to those of 2B."""
    i = tl.arange(0, C)
    pair = (i // (2 * B))[:, None] == (i // (2 * B))[None, :]
    lower_left = pair & ((i // B)[:, None] != (i // B)[None, :])
    return x - _product(x, _product(tl.where(lower_left, a, 0.0), x, EXACT), EXACT)


@triton.jit(do_not_specialize=["n"])
def prepare(
    k,
    v,
    beta,
    g,
    w,
    errors,
    inverse,
    log_decays,
    k_norms,
    n,
    H,
    eps,
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
    KEEP_INVERSE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """W, (I + G diag(beta))^-1 V, c and the inverse norms of the keys; the inverse if kept."""
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(0) + chunk
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    keys = _load_rows(
        k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
    )
    norms = _inverse_norms(keys, first, n, eps, NORM, C)
    rates = _load_per_token(beta, b, h, first, n, H, C)
    gram = _product(keys, tl.trans(keys), PRODUCTS) * norms[:, None] * norms[None, :]
    if GATED:
        g_ = tl.maximum(_load_per_token(g, b, h, first, n, H, C), LEAST_LOG_DECAY)
        c = tl.cumsum(g_, 0)
        gram *= _decays(c, C)
        from_start = norms * tl.exp(c)
    else:
        c = tl.zeros((C,), tl.float32)
        from_start = norms
    a = tl.where(i[:, None] > i[None, :], gram * rates[None, :], 0.0)
    x = _unit_lower_inverse(a, C, EXACT)
    tl.store(log_decays + place * C + i, c)
    tl.store(k_norms + place * C + i, norms)
    if KEEP_INVERSE:
        tl.store(inverse + place * (C * C) + i[:, None] * C + i[None, :], x)
    to, mask = _chunk_pointers(w, place, cols_k, K, C)
    tl.store(to, _product(x * from_start[None, :], keys, PRODUCTS), mask=mask)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        values = _load_rows(v, stride_vb, stride_vt, stride_vh, b, h, first, n, cols, V, C)
        to, mask = _chunk_pointers(errors, place, cols, V, C)
        tl.store(to, _product(x, values, PRODUCTS), mask=mask)


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
    PRODUCTS: tl.constexpr,
):
    """The states before each chunk and after the last; E in place of what `prepare` left."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    count = tl.cdiv(n, C)
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    at, mask_s = _state_pointers(initial_state, bh, cols_k, cols, K, V)
    state = tl.load(at, mask=mask_s, other=0.0)
    for chunk in range(count):
        first = chunk * C
        place = bh * count + chunk
        at, _ = _state_pointers(states, chunk * tl.num_programs(1) + bh, cols_k, cols, K, V)
        tl.store(at, state, mask=mask_s)
        at, mask = _chunk_pointers(w, place, cols_k, K, C)
        w_ = tl.load(at, mask=mask, other=0.0)
        at, mask = _chunk_pointers(errors, place, cols, V, C)
        e = tl.load(at, mask=mask, other=0.0) - _product(w_, state, PRODUCTS)
        tl.store(at, e, mask=mask)
        keys = _load_rows(
            k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
        )
        weight = _load_per_token(beta, b, h, first, n, H, C)
        weight *= tl.load(k_norms + place * C + i)
        if GATED:
            c = tl.load(log_decays + place * C + i)
            last = tl.load(log_decays + place * C + C - 1)
            weight *= tl.exp(last - c)
            state *= tl.exp(last)
        state += _product(tl.trans(keys), e * weight[:, None], PRODUCTS)
    at, _ = _state_pointers(final_state, bh, cols_k, cols, K, V)
    tl.store(at, state, mask=mask_s)


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
    queries = _load_rows(
        q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C
    )
    q_norms = scale * _inverse_norms(queries, first, n, eps, NORM, C)
    keys = _load_rows(
        k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
    )
    weight = tl.load(k_norms + place * C + i) * _load_per_token(beta, b, h, first, n, H, C)
    scores = _product(queries, tl.trans(keys), PRODUCTS) * q_norms[:, None] * weight[None, :]
    if GATED:
        c = tl.load(log_decays + place * C + i)
        scores *= _decays(c, C)
        q_norms *= tl.exp(c)
    else:
        scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    at, mask = _state_pointers(
        states, chunk * tl.num_programs(2) + bh, cols_k, cols, K, V
    )
    out = _product(queries, tl.load(at, mask=mask, other=0.0), PRODUCTS) * q_norms[:, None]
    at, mask = _chunk_pointers(errors, place, cols, V, C)
    out += _product(scores, tl.load(at, mask=mask, other=0.0), PRODUCTS)
    _store_dense(o, out, b, h, first, n, cols, H, V, C)


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
    queries = _load_rows(
        q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C
    )
    norms = scale * _inverse_norms(queries, first, n, eps, NORM, C)
    tl.store(q_norms + place * C + i, norms)  # the same from each block of columns
    keys = _load_rows(
        k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
    )
    norms_k = tl.load(k_norms + place * C + i)
    # of keys (rows) and queries (columns): P transposed
    scores = _product(keys, tl.trans(queries), PRODUCTS) * norms_k[:, None] * norms[None, :]
    if GATED:
        scores *= tl.trans(_decays(tl.load(log_decays + place * C + i), C))
    else:
        scores = tl.where(i[:, None] <= i[None, :], scores, 0.0)
    d_o = _load_dense(grad_o, b, h, first, n, cols, H, V, C)
    at, mask = _chunk_pointers(grad_writes, place, cols, V, C)
    tl.store(at, _product(scores, d_o, PRODUCTS), mask=mask)


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
        at, mask_s = _state_pointers(
            given, tl.cast(slot, tl.int64) * tl.num_programs(1) + bh, cols_k, cols, K, V
        )
        d_state += tl.load(at, mask=mask_s & (slot >= 0), other=0.0)
        at, _ = _state_pointers(grad_states, place, cols_k, cols, K, V)
        tl.store(at, d_state, mask=mask_s)
        keys = _load_rows(
            k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
        )
        out_weight = tl.load(k_norms + place * C + i)
        if GATED:
            c = tl.load(log_decays + place * C + i)
            last = tl.load(log_decays + place * C + C - 1)
            out_weight *= tl.exp(last - c)
        d_u = _product(keys, d_state, PRODUCTS) * out_weight[:, None]
        at, mask = _chunk_pointers(grad_writes, place, cols, V, C)
        if OUTPUT:
            d_u += tl.load(at, mask=mask, other=0.0)
        tl.store(at, d_u, mask=mask)
        if GATED:
            d_state *= tl.exp(last)
        if OUTPUT:
            queries = _load_rows(
                q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C
            )
            in_weight = tl.load(q_norms + place * C + i)
            if GATED:
                in_weight *= tl.exp(c)
            d_o = _load_dense(grad_o, b, h, first, n, cols, H, V, C)
            d_state += _product(tl.trans(queries), d_o * in_weight[:, None], PRODUCTS)
        at, mask = _chunk_pointers(w, place, cols_k, K, C)
        w_ = tl.load(at, mask=mask, other=0.0)
        rates = _load_per_token(beta, b, h, first, n, H, C)
        d_state -= _product(tl.trans(w_), d_u * rates[:, None], PRODUCTS)
    at, mask_s = _state_pointers(grad_initial, bh, cols_k, cols, K, V)
    tl.store(at, d_state, mask=mask_s)


@triton.jit(do_not_specialize=["n"])
def inputs(
    q,
    k,
    beta,
    g,
    grad_o,
    inverse,
    errors,
    log_decays,
    k_norms,
    states,
    grad_states,
    grad_writes,
    grad_q,
    grad_k,
    grad_v,
    grad_beta,
    grad_g,
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
    OUTPUT: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """Gradients of q, k (one for each value head), v, beta and g.

    With L = (I + G diag(beta))^-T (beta dU), the gradient of V: dG = -L U^T, the gradient of beta
    is the sum of (dU - G^T L) E over columns, and with X = L E^T

        exp(c) K:        -L S^T          exp(c_C - c) K:   U dS^T
        exp(c) Q:        dO S^T          P:                dO U^T.

    A gradient of log decay g_j gathers what depends on exp(c_t), t >= j, on exp(c_C - c_s), s < j,
    and on exp(c_t - c_s), s < j <= t: each sum has no terms that cancel.
    """
    chunk, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    first = chunk * C
    place = bh * tl.num_programs(0) + chunk
    number = chunk * tl.num_programs(1) + bh
    i, cols_k = tl.arange(0, C), tl.arange(0, BK)
    keys = _load_rows(
        k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
    )
    norms_k = tl.load(k_norms + place * C + i)
    rates = _load_per_token(beta, b, h, first, n, H, C)
    if GATED:
        c = tl.load(log_decays + place * C + i)
        last = tl.load(log_decays + place * C + C - 1)
        decays = _decays(c, C)
        from_start = tl.exp(c)
        to_end = tl.exp(last - c)
    else:
        decays = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
        from_start = tl.full((C,), 1.0, tl.float32)
        to_end = from_start
    by_start = tl.zeros((C,), tl.float32)
    between = tl.zeros((C, C), tl.float32)
    d_scores = tl.zeros((C, C), tl.float32)

    # d_q, and d_scores for d_k
    if OUTPUT:
        queries = _load_rows(
            q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C
        )
        inverse_q = _inverse_norms(queries, first, n, eps, NORM, C)
        norms_q = scale * inverse_q
        d_q = tl.zeros((C, BK), tl.float32)
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            d_o = _load_dense(grad_o, b, h, first, n, cols, H, V, C)
            at, mask = _chunk_pointers(errors, place, cols, V, C)
            e = tl.load(at, mask=mask, other=0.0)
            at, mask = _state_pointers(states, number, cols_k, cols, K, V)
            state = tl.load(at, mask=mask, other=0.0)
            d_q += _product(d_o, tl.trans(state), PRODUCTS)
            d_scores += _product(d_o, tl.trans(e), PRODUCTS)
        d_q *= from_start[:, None]
        d_scores *= decays * rates[None, :]
        if GATED:
            by_start += tl.sum(d_q * queries, 1) * norms_q
            scores = _product(queries, tl.trans(keys), PRODUCTS)
            between += d_scores * scores * norms_q[:, None] * norms_k[None, :]
        d_q += _product(d_scores * norms_k[None, :], keys, PRODUCTS)
        d_q *= norms_q[:, None]
        if NORM:
            along = tl.sum(d_q * queries, 1) * inverse_q * inverse_q
            d_q -= along[:, None] * queries
        _store_dense(grad_q, d_q, b, h, first, n, cols_k, H, K, C)

    # d_v, d_beta, and of d_k what comes through exp(c) K
    d_k = tl.zeros((C, BK), tl.float32)
    crossed = tl.zeros((C, C), tl.float32)  # X
    d_rates = tl.zeros((C,), tl.float32)
    x = tl.load(inverse + place * (C * C) + i[:, None] * C + i[None, :])
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        at, mask = _chunk_pointers(grad_writes, place, cols, V, C)
        d_u = tl.load(at, mask=mask, other=0.0)
        d_v = _product(tl.trans(x), d_u * rates[:, None], PRODUCTS)
        _store_dense(grad_v, d_v, b, h, first, n, cols, H, V, C)
        at, mask = _chunk_pointers(errors, place, cols, V, C)
        e = tl.load(at, mask=mask, other=0.0)
        d_rates += tl.sum(d_u.to(tl.float32) * e, 1)
        crossed += _product(d_v, tl.trans(e), PRODUCTS)
        at, mask = _state_pointers(states, number, cols_k, cols, K, V)
        state = tl.load(at, mask=mask, other=0.0)
        d_k -= _product(d_v, tl.trans(state), PRODUCTS)
    d_k *= from_start[:, None]
    of_start = tl.sum(d_k * keys, 1) * norms_k
    by_start += of_start

    # what comes through exp(c_C - c) K
    kept = tl.zeros((BK,), tl.float32)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        at, mask = _chunk_pointers(errors, place, cols, V, C)
        u = tl.load(at, mask=mask, other=0.0) * (rates * to_end)[:, None]
        at, mask = _state_pointers(grad_states, place, cols_k, cols, K, V)
        d_state = tl.load(at, mask=mask, other=0.0)
        d_k += _product(u, tl.trans(d_state), PRODUCTS)
        if GATED:
            at, mask = _state_pointers(states, number, cols_k, cols, K, V)
            kept += tl.sum(tl.load(at, mask=mask, other=0.0) * d_state, 1)
    by_end = tl.sum(d_k * keys, 1) * norms_k - of_start

    # what comes through G and P
    gram = tl.where(i[:, None] > i[None, :], _product(keys, tl.trans(keys), PRODUCTS), 0.0)
    gram *= norms_k[:, None] * norms_k[None, :]
    d_rates -= tl.sum(gram * decays * crossed, 0)
    _store_per_token(grad_beta, d_rates, b, h, first, n, H, C)
    d_gram = tl.where(i[:, None] > i[None, :], -crossed * decays * rates[None, :], 0.0)
    d_k += _product((d_gram + tl.trans(d_gram)) * norms_k[None, :], keys, PRODUCTS)
    if OUTPUT:
        d_k += _product(tl.trans(d_scores) * norms_q[None, :], queries, PRODUCTS)
    d_k *= norms_k[:, None]
    if NORM:
        along = tl.sum(d_k * keys, 1) * norms_k * norms_k
        d_k -= along[:, None] * keys
    _store_dense(grad_k, d_k, b, h, first, n, cols_k, H, K, C)

    if GATED:
        between += d_gram * gram
        d_g = tl.cumsum(by_start + tl.sum(between, 1) - tl.sum(between, 0), 0, reverse=True)
        d_g += tl.cumsum(by_end, 0) - by_end + tl.exp(last) * tl.sum(kept, 0)
        counted = _load_per_token(g, b, h, first, n, H, C) >= LEAST_LOG_DECAY
        _store_per_token(grad_g, tl.where(counted, d_g, 0.0), b, h, first, n, H, C)
