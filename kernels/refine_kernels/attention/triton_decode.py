"""Attention of one token of every branch in Triton (decode.py): the text by its address.

A decode pass has few queries and long texts: the keys that a stream and key head sees of its text
are split among programs, the last of which adds the stream's own, and a second kernel joins what
they found by the largest score p and the sum m of exp(s - p) of each:

    o = sum_i exp(p_i - p) o_i / sum_i exp(p_i - p) m_i.

Sums are float32.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import agreement, launch
from refine_kernels.attention import branches
from refine_kernels.attention.branches import Span
from refine_kernels.attention.decode import TextPlaces
from refine_kernels.attention.triton_branches import (
    FAR,
    MOST_OWN,
    MOST_ROWS,
    add_keys,
    constants_of_text,
    keys_of,
    queries_of,
    text_constants,
)
from refine_kernels.triton_products import padded, products_of
from refine_kernels.triton_variant import Variant, variant

_WIDEST = 256
_PARTS = 16  # of the text that a stream sees


def refusal(
    q: Tensor, own: tuple[Tensor, ...], count: Tensor, text: TextPlaces, *, window: int | None
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    groups = q.shape[2] // own[0].shape[2]
    if q.shape[-1] > _WIDEST:
        return f"heads are {q.shape[-1]} wide, above {_WIDEST}"
    if groups > MOST_ROWS or own[0].shape[1] > MOST_OWN:
        return f"branches have more than {MOST_OWN} tokens or {MOST_ROWS} queries for a key head"
    return agreement.unknown_dtype(q.dtype) or _disagreement(
        q.shape[-1], groups, window is not None, q.dtype, q.device
    )


def decode_attention(
    q: Tensor, own: tuple[Tensor, ...], count: Tensor, text: TextPlaces, *, window: int | None
) -> Tensor:
    """As decode.decode_attention."""
    own_k, own_v = own
    q = launch.dense_rows(q)
    streams, _, heads, dim = q.shape
    kv_heads = own_k.shape[2]
    constants = _constants(dim, heads // kv_heads, own_k.shape[1], q.dtype, products_of(q))
    parts = launch.empty((streams, heads, _PARTS, dim), torch.float32, q.device)
    scales = launch.empty((2, streams, heads, _PARTS), torch.float32, q.device)
    peaks, masses = scales.unbind()
    launch.run(
        decode_parts,
        (streams, kv_heads, _PARTS),
        *(q, own_k, own_v, text.table, count, parts, peaks, masses),
        FAR if window is None else window,
        *(q.stride(0), q.stride(2)),
        *(stride for x in own for stride in x.stride()[:3]),
        **text_constants(text.strides, text.alignment),
        **constants,
    )
    out = launch.empty(q.shape, q.dtype, q.device)
    joined = {name: constants[name] for name in ("D", "BD", "PARTS", "num_warps", "num_stages")}
    launch.run(decode_join, (streams * heads,), parts, peaks, masses, out, **joined)
    return out


@functools.cache
def _disagreement(
    dim: int, groups: int, windowed: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    gen = torch.Generator().manual_seed(0)
    shapes = {
        "q": (3, 1, 2 * groups, dim),
        "own k": (3, 4, 2, dim),
        "own v": (3, 4, 2, dim),
        "text k": (2, 300, 2, dim),
        "text v": (2, 300, 2, dim),
    }
    inputs = {
        name: torch.randn(shape, generator=gen).to(device, dtype) for name, shape in shapes.items()
    }
    rows, limit, count = (1, 0, 1), (300, 88, 260), 3
    window = 170 if windowed else None
    made = torch.full((1,), count, device=device)

    def by_address(q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor) -> list[Tensor]:
        places = TextPlaces.of(text_k, text_v, rows, limit)
        return [decode_attention(q, (k, v), made, places, window=window)]

    def by_torch(q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> list[Tensor]:
        own = k[:, :count], v[:, :count]
        options: dict[str, Any] = {"spans": (Span(0, 300, 0),), "rows": rows, "limit": limit}
        return [branches.branch_attention(q, own, [text], window=window, **options)]

    return agreement.disagreement(
        by_address,
        by_torch,
        inputs,
        ["attention"],
        tolerance=agreement.TOLERANCE[dtype],
        gradients=False,
    )


def _constants(
    dim: int, groups: int, own: int, dtype: torch.dtype, products: str
) -> dict[str, Any]:
    return {
        "D": dim,
        "BD": padded(dim),
        "G": groups,
        "BM": padded(groups),
        "BO": padded(own),
        "BN": max(16, min(64, 2**14 // (dim * dtype.itemsize))),
        "PARTS": _PARTS,
        "PRODUCTS": products,
        "num_warps": 4,
        "num_stages": 2,
    }


@triton.jit
def decode_parts(
    q,
    own_k,
    own_v,
    table,
    count,
    out,
    peaks,
    masses,
    window,
    stride_qr,
    stride_qh,
    stride_kr,
    stride_kt,
    stride_kh,
    stride_vr,
    stride_vt,
    stride_vh,
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
    PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    """o, not yet divided by m, and p and m, of a stream and key head over a part of its text."""
    stream, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    scale = 1 / tl.sqrt(D * 1.0)
    text_k = tl.load(table + stream * 3).to(tl.pointer_type(own_k.dtype.element_ty))
    text_v = tl.load(table + stream * 3 + 1).to(tl.pointer_type(own_v.dtype.element_ty))
    text_k = tl.multiple_of(text_k, ALIGNED_K) + head * STRIDE_XH
    text_v = tl.multiple_of(text_v, ALIGNED_V) + head * STRIDE_YH
    end, own = tl.load(table + stream * 3 + 2).to(tl.int32), tl.load(count).to(tl.int32)
    of_q = queries_of(q + stream * stride_qr, 0, stride_qh, head, 1, G, BM, BD, D)
    peak = tl.full((BM,), -1e30, tl.float32)
    mass = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM, BD), tl.float32)
    begin = tl.maximum(0, end + own - window)
    size = tl.cdiv(tl.maximum(end - begin, 0), PARTS)
    low = begin + part * size
    high = tl.minimum(low + size, end)
    n = tl.arange(0, BN)
    for at in range(low, high, BN):
        k = keys_of(text_k, at, high, STRIDE_XT, BN, BD, D)
        v = keys_of(text_v, at, high, STRIDE_YT, BN, BD, D)
        seen = (at + n < high)[None, :]
        peak, mass, found = add_keys(of_q, k, v, seen, scale, peak, mass, found, PRODUCTS)
    if part == PARTS - 1:
        k = keys_of(own_k + stream * stride_kr + head * stride_kh, 0, own, stride_kt, BO, BD, D)
        v = keys_of(own_v + stream * stride_vr + head * stride_vh, 0, own, stride_vt, BO, BD, D)
        token = tl.arange(0, BO)
        seen = ((token < own) & (token >= own - window))[None, :]
        peak, mass, found = add_keys(of_q, k, v, seen, scale, peak, mass, found, PRODUCTS)
    m, d = tl.arange(0, BM), tl.arange(0, BD)
    place = ((stream * tl.num_programs(1) + head) * G + m) * PARTS + part
    tl.store(peaks + place, peak, mask=m < G)
    tl.store(masses + place, mass, mask=m < G)
    at = out + place[:, None] * D + d[None, :]
    tl.store(at, found, mask=(m < G)[:, None] & (d < D)[None, :])


@triton.jit
def decode_join(parts, peaks, masses, out, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr):
    """o of a stream and head."""
    row = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, PARTS), tl.arange(0, BD)
    place = row * PARTS + i
    peak = tl.load(peaks + place)
    weight = tl.exp(peak - tl.max(peak, 0))
    at = parts + place[:, None] * D + d[None, :]
    found = tl.load(at, mask=(d < D)[None, :], other=0.0)
    total = tl.sum(weight * tl.load(masses + place), 0)
    o = tl.sum(weight[:, None] * found, 0) / total
    tl.store(out + row * D + d, o.to(out.dtype.element_ty), mask=d < D)


# Head widths, key heads, heads to each, what lies beside a token's values, and tokens of a stream:
# of the presets with attention (LaCT-760M first), and the most.
_COMPILED = (
    *((64, 24, 1, 3104, 4), (128, 20, 1, 0, 4), (256, 2, 4, 0, 4)),
    (256, 4, 8, 0, MOST_OWN),
)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time."""
    types = {"table": "*i64", "count": "*i64", "window": "i32"}
    scratch = dict.fromkeys(("peaks", "masses", "parts"), "*fp32")
    for dim, heads, groups, beside, own in _COMPILED:
        constants = _constants(dim, groups, own, torch.bfloat16, "bf16")
        constants |= constants_of_text(dim, heads, beside)
        title = f"d{dim}_{groups}rows"
        yield variant(
            decode_parts,
            title,
            constants,
            types | scratch | {"out": "*fp32"},
            products=True,
            few_rows=True,
        )
        yield variant(decode_join, title, constants, scratch)
