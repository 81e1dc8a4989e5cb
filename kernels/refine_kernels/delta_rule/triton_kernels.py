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
def _load_chunk(x, number, cols, D: tl.constexpr, C: tl.constexpr):
    """Columns `cols` of chunk `number` of [BH*N,C,D], zero past D."""
    at = x + number * (C * D) + tl.arange(0, C)[:, None] * D + cols[None, :]
    return tl.load(at, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def _store_chunk(x, value, number, cols, D: tl.constexpr, C: tl.constexpr):
    at = x + number * (C * D) + tl.arange(0, C)[:, None] * D + cols[None, :]
    tl.store(at, value, mask=(cols < D)[None, :])


@triton.jit
def _load_state(x, number, rows, cols, K: tl.constexpr, V: tl.constexpr):
    """Part of state `number` of [...,K,V], zero past its edges."""
    at = x + number * (K * V) + rows[:, None] * V + cols[None, :]
    return tl.load(at, mask=(rows < K)[:, None] & (cols < V)[None, :], other=0.0)


@triton.jit
def _store_state(x, value, number, rows, cols, K: tl.constexpr, V: tl.constexpr):
    at = x + number * (K * V) + rows[:, None] * V + cols[None, :]
    tl.store(at, value, mask=(rows < K)[:, None] & (cols < V)[None, :])


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
def _block(a, row, col, C: tl.constexpr):
    """Block (row, col) of 16 by 16 of a [C,C]."""
    i = tl.arange(0, 16)
    return tl.load(a + (16 * row + i)[:, None] * C + (16 * col + i)[None, :])


@triton.jit
def _store_block(a, value, row, col, C: tl.constexpr):
    i = tl.arange(0, 16)
    tl.store(a + (16 * row + i)[:, None] * C + (16 * col + i)[None, :], value)


@triton.jit
def _invert_block(transposed):
    """(I + a)^-1 from a^T, a strictly lower triangular [16,16]: forward substitution."""
    i = tl.arange(0, 16)
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, 16):
        a_row = tl.sum(tl.where(i[None, :] == row, transposed, 0.0), 1)
        known = tl.sum(a_row[:, None] * x, 0)
        x = tl.where(i[:, None] == row, x - known[None, :], x)
    return x


@triton.jit
def _dot32(a, b):
    """a @ b in float32 proper."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def invert(matrices, C: tl.constexpr):
    """(I + a)^-1 in place of each strictly lower triangular a of [.,C,C], float32, C <= 64.

    Blocks of 16 by forward substitution, row of blocks after row of blocks.  No powers of a, which
    explode where keys repeat.
    """
    a = matrices + tl.program_id(0).to(tl.int64) * (C * C)
    x00 = _invert_block(tl.trans(_block(a, 0, 0, C)))
    if C >= 32:
        a10 = _block(a, 1, 0, C)
        x11 = _invert_block(tl.trans(_block(a, 1, 1, C)))
        x10 = -_dot32(x11, _dot32(a10, x00))
    if C >= 64:
        a20, a21 = _block(a, 2, 0, C), _block(a, 2, 1, C)
        x22 = _invert_block(tl.trans(_block(a, 2, 2, C)))
        x21 = -_dot32(x22, _dot32(a21, x11))
        x20 = -_dot32(x22, _dot32(a20, x00) + _dot32(a21, x10))
        a30, a31, a32 = _block(a, 3, 0, C), _block(a, 3, 1, C), _block(a, 3, 2, C)
        x33 = _invert_block(tl.trans(_block(a, 3, 3, C)))
        x32 = -_dot32(x33, _dot32(a32, x22))
        x31 = -_dot32(x33, _dot32(a31, x11) + _dot32(a32, x21))
        x30 = -_dot32(x33, _dot32(a30, x00) + _dot32(a31, x10) + _dot32(a32, x20))
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
    keys = _load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    norms = _inverse_norms(keys, first, n, eps, NORM, C)
    rates = _load_per_token(beta, b, h, first, n, H, C)
    a = _product(keys, tl.trans(keys), PRODUCTS) * norms[:, None] * (norms * rates)[None, :]
    if GATED:
        steps = tl.maximum(_load_per_token(g, b, h, first, n, H, C), LEAST_LOG_DECAY)
        c = tl.cumsum(steps, 0)
        a *= _decays(c, C)
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
    keys = _load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    from_start = tl.load(k_norms + place * C + i)
    if GATED:
        from_start *= tl.exp(tl.load(log_decays + place * C + i))
    of_keys = _product(x * from_start[None, :], keys, PRODUCTS)
    _store_chunk(w, of_keys, place, cols_k, K, C)
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        values = _load_rows(v, stride_vb, stride_vt, stride_vh, b, h, first, n, cols, V, C)
        _store_chunk(errors, _product(x, values, PRODUCTS), place, cols, V, C)


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
    state = _load_state(initial_state, bh, cols_k, cols, K, V)
    for chunk in range(count):
        first = chunk * C
        place = bh * count + chunk
        _store_state(states, state, chunk * tl.num_programs(1) + bh, cols_k, cols, K, V)
        w_ = _load_chunk(w, place, cols_k, K, C)
        e = _load_chunk(errors, place, cols, V, C) - _product(w_, state, PRODUCTS)
        _store_chunk(errors, e, place, cols, V, C)
        keys = _load_rows(
            k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
        )
        weight = _load_per_token(beta, b, h, first, n, H, C)
        if WRITES:
            u = (e * weight[:, None]).to(writes.dtype.element_ty)
            _store_dense(writes, u, b, h, first, n, cols, H, V, C)
        weight *= tl.load(k_norms + place * C + i)
        if GATED:
            c = tl.load(log_decays + place * C + i)
            last = tl.load(log_decays + place * C + C - 1)
            weight *= tl.exp(last - c)
            state *= tl.exp(last)
        state += _product(tl.trans(keys), e * weight[:, None], PRODUCTS)
    _store_state(final_state, state, bh, cols_k, cols, K, V)


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
    queries = _load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
    q_norms = scale * _inverse_norms(queries, first, n, eps, NORM, C)
    keys = _load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    weight = tl.load(k_norms + place * C + i) * _load_per_token(beta, b, h, first, n, H, C)
    scores = _product(queries, tl.trans(keys), PRODUCTS) * q_norms[:, None] * weight[None, :]
    if GATED:
        c = tl.load(log_decays + place * C + i)
        scores *= _decays(c, C)
        q_norms *= tl.exp(c)
    else:
        scores = tl.where(i[:, None] >= i[None, :], scores, 0.0)
    state = _load_state(states, chunk * tl.num_programs(2) + bh, cols_k, cols, K, V)
    out = _product(queries, state, PRODUCTS) * q_norms[:, None]
    out += _product(scores, _load_chunk(errors, place, cols, V, C), PRODUCTS)
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
    queries = _load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
    norms = scale * _inverse_norms(queries, first, n, eps, NORM, C)
    tl.store(q_norms + place * C + i, norms)  # the same from each block of columns
    keys = _load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    norms_k = tl.load(k_norms + place * C + i)
    # of keys (rows) and queries (columns): P transposed
    scores = _product(keys, tl.trans(queries), PRODUCTS) * norms_k[:, None] * norms[None, :]
    if GATED:
        scores *= tl.trans(_decays(tl.load(log_decays + place * C + i), C))
    else:
        scores = tl.where(i[:, None] <= i[None, :], scores, 0.0)
    d_o = _load_dense(grad_o, b, h, first, n, cols, H, V, C)
    _store_chunk(grad_writes, _product(scores, d_o, PRODUCTS), place, cols, V, C)


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
            d_state += _load_state(given, number, cols_k, cols, K, V)
        _store_state(grad_states, d_state, place, cols_k, cols, K, V)
        keys = _load_rows(
            k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C
        )
        out_weight = tl.load(k_norms + place * C + i)
        if GATED:
            c = tl.load(log_decays + place * C + i)
            last = tl.load(log_decays + place * C + C - 1)
            out_weight *= tl.exp(last - c)
        d_u = _product(keys, d_state, PRODUCTS) * out_weight[:, None]
        if OUTPUT:
            d_u += _load_chunk(grad_writes, place, cols, V, C)
        _store_chunk(grad_writes, d_u, place, cols, V, C)
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
        w_ = _load_chunk(w, place, cols_k, K, C)
        rates = _load_per_token(beta, b, h, first, n, H, C)
        d_state -= _product(tl.trans(w_), d_u * rates[:, None], PRODUCTS)
    _store_state(grad_initial, d_state, bh, cols_k, cols, K, V)


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
        d_o = _load_dense(grad_o, b, h, first, n, cols, H, V, C)
        d_scores += _product(d_o, tl.trans(_load_chunk(errors, place, cols, V, C)), PRODUCTS)
        state = _load_state(states, number, cols_k, cols, K, V)
        d_q += _product(d_o, tl.trans(state), PRODUCTS)
    d_scores *= _load_per_token(beta, b, h, first, n, H, C)[None, :]
    norms_k = tl.load(k_norms + place * C + i)
    q_ = _load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
    k_ = _load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
    inverse_q = _inverse_norms(q_, first, n, eps, NORM, C)
    norms_q = scale * inverse_q
    if GATED:
        c = tl.load(log_decays + place * C + i)
        d_q *= tl.exp(c)[:, None]
        d_scores *= _decays(c, C)
        d_c = tl.sum(d_q * q_, 1) * norms_q
        between = _product(q_, tl.trans(k_), PRODUCTS) * norms_q[:, None] * norms_k[None, :]
        between *= d_scores
        d_c += tl.sum(between, 1) - tl.sum(between, 0)
        tl.store(grad_log_decays + place * C + i, d_c)
    else:
        d_scores = tl.where(i[:, None] >= i[None, :], d_scores, 0.0)
    tl.store(grad_scores + place * (C * C) + i[:, None] * C + i[None, :], d_scores)
    d_q += _product(d_scores * norms_k[None, :], k_, PRODUCTS)
    d_q *= norms_q[:, None]
    if NORM:
        d_q -= (tl.sum(d_q * q_, 1) * inverse_q * inverse_q)[:, None] * q_
    _store_dense(grad_q, d_q, b, h, first, n, cols_k, H, K, C)


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
    rates = _load_per_token(beta, b, h, first, n, H, C)
    d_k = tl.zeros((C, BK), tl.float32)
    crossed = tl.zeros((C, C), tl.float32)  # L E^T
    d_rates = tl.zeros((C,), tl.float32)
    adjoint = tl.trans(tl.load(inverse + place * (C * C) + i[:, None] * C + i[None, :]))
    for start in range(0, V, BV):
        cols = start + tl.arange(0, BV)
        d_u = _load_chunk(grad_writes, place, cols, V, C)
        d_v = _product(adjoint, d_u * rates[:, None], PRODUCTS)
        _store_dense(grad_v, d_v, b, h, first, n, cols, H, V, C)
        e = _load_chunk(errors, place, cols, V, C)
        d_rates += tl.sum(d_u.to(tl.float32) * e, 1)
        crossed += _product(d_v, tl.trans(e), PRODUCTS)
        state = _load_state(states, number, cols_k, cols, K, V)
        d_k -= _product(d_v, tl.trans(state), PRODUCTS)

    k_ = _load_rows(k, stride_kb, stride_kt, stride_kh, b, h // GROUPS, first, n, cols_k, K, C)
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
        u = _load_chunk(errors, place, cols, V, C) * writes[:, None]
        d_state = _load_state(grad_states, place, cols_k, cols, K, V)
        d_k += _product(u, tl.trans(d_state), PRODUCTS)
        if GATED:
            state = _load_state(states, number, cols_k, cols, K, V)
            kept += tl.sum(tl.sum(state * d_state, 1), 0)

    lower = i[:, None] > i[None, :]
    matrix = _product(k_, tl.trans(k_), PRODUCTS) * norms_k[:, None] * norms_k[None, :]
    matrix = tl.where(lower, matrix, 0.0)
    if GATED:
        matrix *= _decays(c, C)  # G
        d_k_in_and_out = tl.sum(d_k * k_, 1) * norms_k
        by_end = d_k_in_and_out - by_start
        between = -crossed * rates[None, :] * matrix
        d_c = by_start + tl.sum(between, 1) - tl.sum(between, 0)
        if OUTPUT:
            d_c += tl.load(grad_log_decays + place * C + i)
        d_g = tl.cumsum(d_c, 0, reverse=True)
        d_g += tl.cumsum(by_end, 0) - by_end + tl.exp(last) * kept
        counted = _load_per_token(g, b, h, first, n, H, C) >= LEAST_LOG_DECAY
        _store_per_token(grad_g, tl.where(counted, d_g, 0.0), b, h, first, n, H, C)
    d_rates -= tl.sum(matrix * crossed, 0)
    _store_per_token(grad_beta, d_rates, b, h, first, n, H, C)
    d_gram = tl.where(lower, -crossed * rates[None, :], 0.0)
    if GATED:
        d_gram *= _decays(c, C)
    d_k += _product((d_gram + tl.trans(d_gram)) * norms_k[None, :], k_, PRODUCTS)
    if OUTPUT:
        d_scores = tl.load(grad_scores + place * (C * C) + i[:, None] * C + i[None, :])
        q_ = _load_rows(q, stride_qb, stride_qt, stride_qh, b, h // GROUPS, first, n, cols_k, K, C)
        norms_q = tl.load(q_norms + place * C + i)
        d_k += _product(tl.trans(d_scores) * norms_q[None, :], q_, PRODUCTS)
    d_k *= norms_k[:, None]
    if NORM:
        d_k -= (tl.sum(d_k * k_, 1) * norms_k * norms_k)[:, None] * k_
    _store_dense(grad_k, d_k, b, h, first, n, cols_k, H, K, C)
