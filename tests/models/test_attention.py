"""Attention in query blocks, of texts in pieces and of branches, against its definition."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refine_kernels.dispatch import rotate
from torch import Tensor

from refine_mcore.benchmark.memory import describe, saved_tensors
from refine_mcore.models.attention import attend, rotary_table
from refine_mcore.models.state import TokenHistory
from tests.models.zoo import assert_same

EXAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
WINDOWS = st.none() | st.integers(1, 40)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One query at a time: q [T, heads, d] belong to the last T of k, v [S, kv_heads, d]."""
    length, heads, dim = q.shape
    before, group = k.shape[0] - length, heads // k.shape[1]
    out = torch.empty_like(q)
    for t in range(length):
        stop = before + t + 1
        start = 0 if window is None else max(0, stop - window)
        for head in range(heads):
            keys, values = k[start:stop, head // group], v[start:stop, head // group]
            out[t, head] = (keys @ q[t, head] / dim**0.5).softmax(0) @ values
    return out


def random_qkv(
    streams: int, queries: int, keys: int, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads, in float64; they need gradients."""
    shapes = ((streams, queries, 4, 6), *[(streams, keys, kv_heads, 6)] * 2)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return q, k, v


def assert_same_with_gradients(
    actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]
) -> None:
    assert_same([actual], [expected])
    weights = torch.randn_like(expected)
    got = torch.autograd.grad((actual * weights).sum(), inputs)
    assert_same(got, torch.autograd.grad((expected * weights).sum(), inputs))


@EXAMPLES
@given(
    length=st.integers(1, 30),
    before=st.integers(0, 30),
    window=WINDOWS,
    block=st.sampled_from([1, 3, 7, 512]),
    together=st.sampled_from([2, 16]),
    texts=st.sampled_from([1, 2]),
)
def test_attention_of_a_text(
    length: int,
    before: int,
    window: int | None,
    block: int,
    together: int,
    texts: int,
    monkeypatch,
) -> None:
    """With the history that an earlier piece leaves: all of it, or the last window - 1 tokens."""
    monkeypatch.setattr("refine_kernels.attention.sdpa._MAX_QUERY_BLOCK", block)
    monkeypatch.setattr("refine_kernels.attention.sdpa._BLOCKS_TOGETHER", together)
    q, k, v = random_qkv(texts, length, before + length)
    past = None
    if before:
        past = TokenHistory(((k[:, :before], v[:, :before]),))
        past = past if window is None else past.keep_last(window - 1)
    out = attend(q, TokenHistory.extend(past, (k[:, before:], v[:, before:])), window)
    expected = torch.stack([naive_attention(*row, window) for row in zip(q, k, v, strict=True)])
    assert_same_with_gradients(out, expected, (q, k, v))


PIECES = st.lists(st.integers(1, 9), min_size=2, max_size=6)


def in_pieces(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """x [R, T, ...], as tensors of their own."""
    return tuple(part.clone() for part in x.split(lengths, 1))


@EXAMPLES
@given(lengths=PIECES, window=WINDOWS, kv_heads=st.sampled_from([1, 2, 4]))
def test_attention_of_a_text_in_many_pieces(
    lengths: list[int], window: int | None, kv_heads: int
) -> None:
    """Piece after piece, each behind the history that the last one left."""
    total = sum(lengths)
    q, k, v = random_qkv(2, total, total, kv_heads)
    past, outs = None, []
    for q_i, k_i, v_i in zip(*(in_pieces(x, lengths) for x in (q, k, v)), strict=True):
        past = TokenHistory.extend(past, (k_i, v_i))
        outs.append(attend(q_i, past, window))
        past = past if window is None else past.keep_last(window - 1)
    expected = torch.stack([naive_attention(*row, window) for row in zip(q, k, v, strict=True)])
    assert_same_with_gradients(torch.cat(outs, dim=1), expected, (q, k, v))


@EXAMPLES
@given(
    lengths=PIECES,
    own=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    window=WINDOWS,
    kv_heads=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_attention_of_branches_in_many_pieces(
    lengths: list[int], own: list[int], window: int | None, kv_heads: int, data: st.DataObject
) -> None:
    """The text in pieces, and the branches' own tokens too; the last of these ask."""
    branch = st.tuples(st.integers(0, 2), st.integers(0, sum(lengths)))
    branches = data.draw(st.lists(branch, min_size=1, max_size=4), label="(text, position)")
    _, text_k, text_v = random_qkv(3, 1, sum(lengths), kv_heads)
    q, k, v = random_qkv(len(branches), own[-1], sum(own), kv_heads)
    pieces = zip(in_pieces(text_k, lengths), in_pieces(text_v, lengths), strict=True)
    rows, limit = zip(*branches, strict=True)
    reach = None if window is None else max(window - 1, 7)  # `last` asks for so many below
    history = TokenHistory.branch(tuple(pieces), rows, limit, reach)
    for piece in zip(in_pieces(k, own), in_pieces(v, own), strict=True):
        history = history.append(piece)
    expected = [
        naive_attention(
            q[i], torch.cat([text_k[b, :p], k[i]]), torch.cat([text_v[b, :p], v[i]]), window
        )
        for i, (b, p) in enumerate(branches)
    ]
    inputs = (q, k, v, text_k, text_v)
    assert_same_with_gradients(attend(q, history, window), torch.stack(expected), inputs)
    for i, (b, p) in enumerate(branches):
        asked = min(p + sum(own), 7)
        seen = [torch.cat([x[b, :p], y[i]])[-asked:] for x, y in ((text_k, k), (text_v, v))]
        assert_same([x[0] for x in history.last(i, asked)], seen)


@EXAMPLES
@given(
    length=st.integers(1, 6),
    own=st.integers(0, 6),
    window=WINDOWS,
    branches=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=5),
)
def test_attention_of_branches(
    length: int, own: int, window: int | None, branches: list[tuple[int, int]]
) -> None:
    """Branches that left their texts anywhere, with some tokens of their own behind them."""
    _, text_k, text_v = random_qkv(3, 1, 20)
    q, k, v = random_qkv(len(branches), length, own + length)
    rows, limit = zip(*branches, strict=True)
    reach = None if window is None else window - 1
    history = TokenHistory.branch(((text_k, text_v),), rows, limit, reach).append((k, v))
    out = attend(q, history, window)
    expected = [
        naive_attention(
            q[i], torch.cat([text_k[b, :p], k[i]]), torch.cat([text_v[b, :p], v[i]]), window
        )
        for i, (b, p) in enumerate(branches)
    ]
    assert_same_with_gradients(out, torch.stack(expected), (q, k, v, text_k, text_v))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("before", [0, 96])
def test_a_window_keeps_keys_and_values_once_and_one_mask(kv_heads: int, before: int) -> None:
    """Blocks of 64 queries see up to 191 keys: kept are q, k, v, the output and its row sums, not
    a copy of keys and values per block; and the next layer needs no mask of its own."""
    text, heads, dim = 512, 4, 64
    q = torch.randn(1, text, heads, dim, dtype=torch.bfloat16, requires_grad=True)
    k, v = (
        torch.randn(1, before + text, kv_heads, dim, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    window = 64 if before == 0 else 128
    allowed = sum(x.nbytes for x in (q, k, v, q)) + text * heads * 4
    first = saved_tensors(lambda: attend(q, TokenHistory(((k, v),)), window))
    masks = [one for one in first if len(one.shape) == 2 or one.shape[:2] == (1, 1)]
    assert sum(one.bytes for one in first) - sum(one.bytes for one in masks) <= allowed, describe(
        first
    )
    assert len(masks) <= 3

    def two_layers() -> tuple[Tensor, Tensor]:
        history = TokenHistory(((k, v),))
        return attend(q, history, window), attend(q * 1.0, history, window)

    twice = saved_tensors(two_layers)
    more = sum(one.bytes for one in twice) - sum(one.bytes for one in first)
    assert more <= 2 * q.nbytes + text * heads * 4, describe(twice)


def test_rotation_is_by_the_position_of_each_stream() -> None:
    """Pairs (i, i + dim/2) turn by position * base^(-2i/dim)."""
    x = torch.randn(2, 3, 1, 4, dtype=torch.float64)
    rotated = rotate(x, *rotary_table((5, 9), 3, 4, 100.0, x))
    for stream, start in enumerate((5, 9)):
        for t in range(3):
            for i in range(2):
                turn = torch.polar(torch.ones(()), torch.tensor((start + t) * 100.0 ** (-i / 2)))
                pair = torch.complex(x[stream, t, 0, i], x[stream, t, 0, i + 2]) * turn
                found = torch.complex(rotated[stream, t, 0, i], rotated[stream, t, 0, i + 2])
                torch.testing.assert_close(found, pair, rtol=0, atol=1e-6)
    one_start = rotate(x, *rotary_table((5, 5), 3, 4, 100.0, x))
    assert torch.equal(one_start[0], rotated[0])
