"""Attention of branches in Triton: each reads what it sees of its text where that lies.

A program has a stream and a key head: the queries of all heads that share it are its rows, a few
tokens each, and it goes through the keys of the text that they see and then through the stream's
own.  With s the scores and z their log-sum-exp, kept from the forward, the backward makes the
weights p = exp(s - z) again, and with e = <do, o> a query

    ds = p (do v^T - e) / sqrt(dim),    dq = ds k,    dk = ds^T q,    dv = p^T do.

Gradients of the text's keys and values are sums over streams: there a program has a block of keys
and goes through the streams that see some of them, so that nothing is added twice.  Sums are
float32.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement, launch
from refine_kernels.attention import branches
from refine_kernels.attention.branches import Span
from refine_kernels.host import to_device
from refine_kernels.triton_products import padded, product, products_of
from refine_kernels.triton_variant import Variant, integers, variant

_WIDEST = 128
MOST_ROWS = 32  # queries of a stream that share a key head
MOST_OWN = 32  # tokens of a stream since it left
_LONGEST = 4096  # tokens of the text that one program goes through
FAR = 2**30  # no window


def refusal(
    q: Tensor,
    own: tuple[Tensor, ...],
    text: Sequence[tuple[Tensor, ...]],
    *,
    spans: tuple[Span, ...],
    rows: Sequence[int],
    limit: Sequence[int],
    window: int | None,
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    groups = q.shape[2] // own[0].shape[2]
    seen = sum(span.stop - span.start for span in spans)
    if window is not None:
        seen = min(seen, window)
    if q.shape[-1] > _WIDEST:
        return f"heads are {q.shape[-1]} wide, above {_WIDEST}"
    if groups * q.shape[1] > MOST_ROWS or own[0].shape[1] > MOST_OWN:
        return f"branches have more than {MOST_OWN} tokens or {MOST_ROWS} queries for a key head"
    if seen > _LONGEST:
        return f"branches see more than {_LONGEST} tokens of their text"
    if len(text) > 1:
        return "branches see their text in several pieces"
    return agreement.unknown_dtype(q.dtype) or _disagreement(
        q.shape[-1], groups, window is not None, q.dtype, q.device
    )


def branch_attention(
    q: Tensor,
    own: tuple[Tensor, ...],
    text: Sequence[tuple[Tensor, ...]],
    *,
    spans: tuple[Span, ...],
    rows: Sequence[int],
    limit: Sequence[int],
    window: int | None,
) -> Tensor:
    """As branches.branch_attention, of a text in one piece."""
    (span,), ((text_k, text_v),) = spans, text
    places = to_device(rows, q.device), to_device(limit, q.device)
    return _BranchAttention.apply(q, *own, text_k, text_v, *places, span, window)


@functools.cache
def _disagreement(
    dim: int, groups: int, windowed: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    gen = torch.Generator().manual_seed(0)
    shapes = {
        "q": (3, 2, 2 * groups, dim),
        "own k": (3, 4, 2, dim),
        "own v": (3, 4, 2, dim),
        "text k": (2, 150, 2, dim),
        "text v": (2, 150, 2, dim),
    }
    inputs = {
        name: torch.randn(shape, generator=gen).to(device, dtype) for name, shape in shapes.items()
    }
    options: dict[str, Any] = {
        "spans": (Span(0, 150, 7),),
        "rows": (1, 0, 1),
        "limit": (157, 88, 60),
        "window": 70 if windowed else None,
    }

    def of(form: Any) -> agreement.Form:
        def run(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor) -> list[Tensor]:
            return [form(q, (k, v), [(text_k, text_v)], **options)]

        return run

    return agreement.disagreement(
        of(branch_attention),
        of(branches.branch_attention),
        inputs,
        ["attention"],
        tolerance=agreement.TOLERANCE[dtype],
    )


class _BranchAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        text_k: Tensor,
        text_v: Tensor,
        rows: Tensor,
        limit: Tensor,
        span: Span,
        window: int | None,
    ) -> Tensor:
        given = [launch.dense_rows(x) for x in (q, own_k, own_v, text_k, text_v)]
        run = _Run(given, span, window)
        out = launch.empty(q.shape, q.dtype, q.device)
        total = launch.empty(q.shape[:3], torch.float32, q.device)
        launch.run(
            branches_forward,
            run.grid,
            *(*given, rows, limit, out, total, *run.sizes, *run.strides),
            **run.constants,
        )
        ctx.save_for_backward(*given, rows, limit, out, total)
        ctx.span, ctx.window = span, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, rows, limit, out, total = ctx.saved_tensors
        run = _Run(given, ctx.span, ctx.window)
        grads = [launch.empty(x.shape, x.dtype, x.device) for x in given[:3]]
        for_both = (*given, rows, limit, out, total, grad.contiguous())
        launch.run(
            branches_backward,
            run.grid,
            *(*for_both, *grads, *run.sizes, *run.strides),
            **run.constants,
        )
        if not any(ctx.needs_input_grad[3:5]):
            return *grads, None, None, None, None, None, None
        of_text = [launch.empty(x.shape, x.dtype, x.device) for x in given[3:]]
        texts, tokens, kv_heads = given[3].shape[:3]
        launch.run(
            text_backward,
            (triton.cdiv(tokens, run.constants["BN"]), kv_heads, texts),
            *(*for_both, *of_text, len(rows), *run.sizes, *run.strides),
            **{name: x for name, x in run.constants.items() if name != "BO"},
        )
        return *grads, *of_text, None, None, None, None


class _Run:
    """What the kernels are told of the tensors."""

    def __init__(self, given: list[Tensor], span: Span, window: int | None) -> None:
        q, own_k, _, text_k, text_v = given
        streams, tokens, heads, dim = q.shape
        own, kv_heads = own_k.shape[1:3]
        self.grid = (streams, kv_heads)
        window = FAR if window is None else window
        self.sizes = (*span, window, tokens, own, text_k.shape[1])
        self.strides = tuple(stride for x in given[:3] for stride in x.stride()[:3])
        self.strides += (text_k.stride(0), text_v.stride(0))
        self.constants = _constants(dim, heads // kv_heads, tokens, own, products_of(q))
        strides = (*text_k.stride()[1:3], *text_v.stride()[1:3])
        alignment = launch.alignment(text_k), launch.alignment(text_v)
        self.constants |= text_constants(strides, alignment)


def text_constants(strides: Sequence[int], alignment: Sequence[int]) -> dict[str, int]:
    """Of a token and a head of keys, then of values, which lie among other projections: what their
    places divide by says how much is loaded at once."""
    names = ("STRIDE_XT", "STRIDE_XH", "STRIDE_YT", "STRIDE_YH", "ALIGNED_K", "ALIGNED_V")
    return dict(zip(names, (*strides, *alignment), strict=True))


def _constants(dim: int, groups: int, tokens: int, own: int, products: str) -> dict[str, Any]:
    return {
        "D": dim,
        "BD": padded(dim),
        "G": groups,
        "BM": padded(groups * tokens),
        "BO": padded(own),
        "BN": 64,
        "PRODUCTS": products,
        "num_warps": 4 if dim <= 64 else 8,
        "num_stages": 2,
    }


@triton.jit
def queries_of(x, stride_t, stride_h, head, tokens, G: tl.constexpr, BM: tl.constexpr, BD, D):
    """A stream's rows [BM, BD] of a key head, head by head, each of all tokens."""
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    at = x + (m % tokens) * stride_t + (head * G + m // tokens) * stride_h
    known = (m < G * tokens)[:, None] & (d < D)[None, :]
    return tl.load(at[:, None] + d[None, :], mask=known, other=0.0)


@triton.jit
def keys_of(x, first, last, stride, BLOCK: tl.constexpr, BD, D):
    """Tokens first to `last` of one head, [BLOCK, BD]."""
    n, d = first + tl.arange(0, BLOCK), tl.arange(0, BD)
    at = x + n.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(n < last)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def add_keys(of_q, k, v, seen, scale, peak, mass, found, PRODUCTS: tl.constexpr):
    """Of rows [BM]: the largest score, the sum of exp(s - largest) and that of the values by it,
    with more keys."""
    s = tl.where(seen, product(of_q, tl.trans(k), PRODUCTS) * scale, -1e30)
    higher = tl.maximum(peak, tl.max(s, 1))
    p = tl.where(seen, tl.exp(s - higher[:, None]), 0.0)
    shrink = tl.exp(peak - higher)
    found = found * shrink[:, None] + product(p.to(v.dtype), v, PRODUCTS)
    return higher, mass * shrink + tl.sum(p, 1), found


@triton.jit
def _sees_text(token, end, own, tokens, window, BM: tl.constexpr):
    """Whether rows see tokens of the text, counted through it: [BM, tokens]."""
    step = tl.arange(0, BM) % tokens + own - tokens
    return (token < end)[None, :] & (token[None, :] > (end + step - window)[:, None])


@triton.jit
def _sees_own(own, tokens, window, BM: tl.constexpr, BO: tl.constexpr):
    """Whether rows see tokens of their stream: [BM, BO]."""
    step, token = tl.arange(0, BM) % tokens + own - tokens, tl.arange(0, BO)
    seen = token[None, :] <= step[:, None]
    return seen & (token[None, :] > (step - window)[:, None])


@triton.jit
def _reach(end, start, stop, first, window, own, tokens):
    """The tokens of the piece that some query of a stream sees."""
    low = tl.maximum(start, end + own - tokens - window + 1 - first)
    return low, tl.minimum(stop, end - first)


# Which part of a text is seen depends on the positions: no other code for other parts.
_OF_POSITIONS = ["start", "stop", "first", "length"]


@triton.jit(do_not_specialize=_OF_POSITIONS)
def branches_forward(
    q,
    own_k,
    own_v,
    text_k,
    text_v,
    rows,
    limit,
    out,
    total,
    start,
    stop,
    first,
    window,
    tokens,
    own,
    length,
    stride_qr,
    stride_qt,
    stride_qh,
    stride_kr,
    stride_kt,
    stride_kh,
    stride_vr,
    stride_vt,
    stride_vh,
    stride_xr,
    stride_yr,
    STRIDE_XT: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_YT: tl.constexpr,
    STRIDE_YH: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    ALIGNED_V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BN: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """o and the log-sum-exp of the scores, of a stream and key head."""
    stream, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = 1 / tl.sqrt(D * 1.0)
    row, end = tl.load(rows + stream), tl.load(limit + stream).to(tl.int32)
    of_q = queries_of(q + stream * stride_qr, stride_qt, stride_qh, head, tokens, G, BM, BD, D)
    text_k = tl.multiple_of(text_k + row * stride_xr, ALIGNED_K) + head * STRIDE_XH
    text_v = tl.multiple_of(text_v + row * stride_yr, ALIGNED_V) + head * STRIDE_YH
    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM, BD), tl.float32)
    low, high = _reach(end, start, stop, first, window, own, tokens)
    for at in range(low, high, BN):
        k = keys_of(text_k, at, high, STRIDE_XT, BN, BD, D)
        v = keys_of(text_v, at, high, STRIDE_YT, BN, BD, D)
        seen = _sees_text(at + tl.arange(0, BN) + first, end, own, tokens, window, BM)
        seen = seen & (at + tl.arange(0, BN) < high)[None, :]
        peak, mass, found = add_keys(of_q, k, v, seen, scale, peak, mass, found, PRODUCTS)
    k = keys_of(own_k + stream * stride_kr + head * stride_kh, 0, own, stride_kt, BO, BD, D)
    v = keys_of(own_v + stream * stride_vr + head * stride_vh, 0, own, stride_vt, BO, BD, D)
    seen = _sees_own(own, tokens, window, BM, BO)
    peak, mass, found = add_keys(of_q, k, v, seen, scale, peak, mass, found, PRODUCTS)
    found /= mass[:, None]
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    heads = tl.num_programs(1) * G
    place = (stream * tokens + m % tokens) * heads + head * G + m // tokens
    known = m < G * tokens
    at = out + place[:, None] * D + d[None, :]
    tl.store(at, found.to(out.dtype.element_ty), mask=known[:, None] & (d < D)[None, :])
    tl.store(total + place, peak + tl.log(mass), mask=known)


@triton.jit
def _of_rows(
    stream,
    head,
    heads,
    q,
    out,
    total,
    grad,
    stride_qr,
    stride_qt,
    stride_qh,
    tokens,
    G: tl.constexpr,
    BM: tl.constexpr,
    BD,
    D,
):
    """What the backward needs of the rows: q, do, z and e."""
    of_q = queries_of(q + stream * stride_qr, stride_qt, stride_qh, head, tokens, G, BM, BD, D)
    begin = stream * tokens * heads * D
    of_o = queries_of(grad + begin, heads * D, D, head, tokens, G, BM, BD, D)
    o = queries_of(out + begin, heads * D, D, head, tokens, G, BM, BD, D)
    m = tl.arange(0, BM)
    place = (stream * tokens + m % tokens) * heads + head * G + m // tokens
    z = tl.load(total + place, mask=m < G * tokens, other=0.0)
    e = tl.sum(of_o.to(tl.float32) * o.to(tl.float32), 1)
    return of_q, of_o, z, e


@triton.jit
def _of_scores(of_q, of_o, z, e, k, v, seen, scale, PRODUCTS: tl.constexpr):
    """p and ds of some keys."""
    s = product(of_q, tl.trans(k), PRODUCTS) * scale
    p = tl.where(seen, tl.exp(s - z[:, None]), 0.0)
    ds = p * (product(of_o, tl.trans(v), PRODUCTS) - e[:, None]) * scale
    return p, tl.where(seen, ds, 0.0)


@triton.jit(do_not_specialize=_OF_POSITIONS)
def branches_backward(
    q,
    own_k,
    own_v,
    text_k,
    text_v,
    rows,
    limit,
    out,
    total,
    grad,
    grad_q,
    grad_k,
    grad_v,
    start,
    stop,
    first,
    window,
    tokens,
    own,
    length,
    stride_qr,
    stride_qt,
    stride_qh,
    stride_kr,
    stride_kt,
    stride_kh,
    stride_vr,
    stride_vt,
    stride_vh,
    stride_xr,
    stride_yr,
    STRIDE_XT: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_YT: tl.constexpr,
    STRIDE_YH: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    ALIGNED_V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BN: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """The gradients of the queries and of the own keys and values, of a stream and key head."""
    stream, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = 1 / tl.sqrt(D * 1.0)
    kv_heads = tl.num_programs(1)
    row, end = tl.load(rows + stream), tl.load(limit + stream).to(tl.int32)
    of_q, of_o, z, e = _of_rows(
        stream,
        head,
        kv_heads * G,
        q,
        out,
        total,
        grad,
        stride_qr,
        stride_qt,
        stride_qh,
        tokens,
        G,
        BM,
        BD,
        D,
    )
    text_k = tl.multiple_of(text_k + row * stride_xr, ALIGNED_K) + head * STRIDE_XH
    text_v = tl.multiple_of(text_v + row * stride_yr, ALIGNED_V) + head * STRIDE_YH
    found = tl.zeros((BM, BD), tl.float32)
    low, high = _reach(end, start, stop, first, window, own, tokens)
    for at in range(low, high, BN):
        k = keys_of(text_k, at, high, STRIDE_XT, BN, BD, D)
        v = keys_of(text_v, at, high, STRIDE_YT, BN, BD, D)
        seen = _sees_text(at + tl.arange(0, BN) + first, end, own, tokens, window, BM)
        seen = seen & (at + tl.arange(0, BN) < high)[None, :]
        p, ds = _of_scores(of_q, of_o, z, e, k, v, seen, scale, PRODUCTS)
        found += product(ds.to(k.dtype), k, PRODUCTS)
    k = keys_of(own_k + stream * stride_kr + head * stride_kh, 0, own, stride_kt, BO, BD, D)
    v = keys_of(own_v + stream * stride_vr + head * stride_vh, 0, own, stride_vt, BO, BD, D)
    p, ds = _of_scores(
        of_q, of_o, z, e, k, v, _sees_own(own, tokens, window, BM, BO), scale, PRODUCTS
    )
    m, n, d = tl.arange(0, BM), tl.arange(0, BO), tl.arange(0, BD)
    # rows that are none weigh nothing
    known = (m < G * tokens)[:, None]
    p, ds = tl.where(known, p, 0.0), tl.where(known, ds, 0.0)
    found += product(ds.to(k.dtype), k, PRODUCTS)
    place = (stream * tokens + m % tokens) * kv_heads * G + head * G + m // tokens
    at = grad_q + place[:, None] * D + d[None, :]
    tl.store(at, found.to(grad_q.dtype.element_ty), mask=known & (d < D)[None, :])
    at = ((stream * own + n) * kv_heads + head)[:, None] * D + d[None, :]
    inside = (n < own)[:, None] & (d < D)[None, :]
    of_k = product(tl.trans(ds.to(k.dtype)), of_q, PRODUCTS)
    tl.store(grad_k + at, of_k.to(grad_k.dtype.element_ty), mask=inside)
    of_v = product(tl.trans(p.to(k.dtype)), of_o, PRODUCTS)
    tl.store(grad_v + at, of_v.to(grad_v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_OF_POSITIONS)
def text_backward(
    q,
    own_k,
    own_v,
    text_k,
    text_v,
    rows,
    limit,
    out,
    total,
    grad,
    grad_k,
    grad_v,
    streams,
    start,
    stop,
    first,
    window,
    tokens,
    own,
    length,
    stride_qr,
    stride_qt,
    stride_qh,
    stride_kr,
    stride_kt,
    stride_kh,
    stride_vr,
    stride_vt,
    stride_vh,
    stride_xr,
    stride_yr,
    STRIDE_XT: tl.constexpr,
    STRIDE_XH: tl.constexpr,
    STRIDE_YT: tl.constexpr,
    STRIDE_YH: tl.constexpr,
    ALIGNED_K: tl.constexpr,
    ALIGNED_V: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """The gradients of a block of keys and values of a text, from all streams that see them."""
    begin, head, text = tl.program_id(0) * BN, tl.program_id(1), tl.program_id(2).to(tl.int64)
    scale = 1 / tl.sqrt(D * 1.0)
    kv_heads = tl.num_programs(1)
    text_k = tl.multiple_of(text_k + text * stride_xr, ALIGNED_K) + head * STRIDE_XH
    text_v = tl.multiple_of(text_v + text * stride_yr, ALIGNED_V) + head * STRIDE_YH
    k = keys_of(text_k, begin, length, STRIDE_XT, BN, BD, D)
    v = keys_of(text_v, begin, length, STRIDE_YT, BN, BD, D)
    of_k = tl.zeros((BN, BD), tl.float32)
    of_v = tl.zeros((BN, BD), tl.float32)
    n, m = begin + tl.arange(0, BN), tl.arange(0, BM)
    for number in range(streams):
        end = tl.load(limit + number).to(tl.int32)
        low, high = _reach(end, start, stop, first, window, own, tokens)
        if (tl.load(rows + number) == text) & (low < begin + BN) & (high > begin):
            stream = tl.cast(number, tl.int64)
            of_q, of_o, z, e = _of_rows(
                stream,
                head,
                kv_heads * G,
                q,
                out,
                total,
                grad,
                stride_qr,
                stride_qt,
                stride_qh,
                tokens,
                G,
                BM,
                BD,
                D,
            )
            seen = _sees_text(n + first, end, own, tokens, window, BM)
            seen = seen & ((n >= low) & (n < high))[None, :] & (m < G * tokens)[:, None]
            p, ds = _of_scores(of_q, of_o, z, e, k, v, seen, scale, PRODUCTS)
            of_k += product(tl.trans(ds.to(k.dtype)), of_q, PRODUCTS)
            of_v += product(tl.trans(p.to(k.dtype)), of_o, PRODUCTS)
    d = tl.arange(0, BD)
    at = ((text * length + n) * kv_heads + head)[:, None] * D + d[None, :]
    inside = (n < length)[:, None] & (d < D)[None, :]
    tl.store(grad_k + at, of_k.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + at, of_v.to(grad_v.dtype.element_ty), mask=inside)


# Head widths, key heads, heads to each, what lies beside a token's values, tokens of a stream at a
# time and since it left: of the presets with attention (LaCT-760M first), and the most.
_COMPILED = (
    *((64, 24, 1, 3104, 5, 5), (64, 24, 1, 3104, 1, 5), (128, 20, 1, 0, 5, 5)),
    (128, 4, 4, 0, 8, MOST_OWN),
)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time: rollouts that are scored, and decoded."""
    types = {"rows": "*i64", "limit": "*i64", "total": "*fp32"}
    types |= integers("start", "stop", "first", "window", "tokens", "own", "length", "streams")
    for dim, heads, groups, beside, tokens, own in _COMPILED:
        constants = _constants(dim, groups, tokens, own, "bf16")
        constants |= constants_of_text(dim, heads, beside)
        title = f"d{dim}_{groups * tokens}rows"
        kernels = [branches_forward] + [branches_backward, text_backward] * (tokens > 1)
        for kernel in kernels:
            yield variant(kernel, title, constants, types, products=True, few_rows=True)


def constants_of_text(dim: int, heads: int, beside: int) -> dict[str, int]:
    """Of keys side by side, and of values with so many other numbers a token, in bfloat16."""
    token = heads * dim + beside
    return text_constants((heads * dim, dim, token, dim), (16, math.gcd(16, 2 * token)))
