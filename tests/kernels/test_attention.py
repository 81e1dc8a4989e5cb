"""Attention of a text in both of its forms; of FlashAttention, which no CPU runs, what it is asked
for and when it is not."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels import dispatch, launch
from refine_kernels.attention import flash, sdpa
from refine_kernels.attention.naive import naive_text_attention
from torch import Tensor


def varlen_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch's documentation says of varlen_attn: the last query of a text stands at its last
    key, and a query sees so many keys to its left and to its right, all if -1."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    left, right = window_size
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        assert len(q) <= max_q and len(k) <= max_k
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        at = torch.arange(len(k))
        stands = at[len(k) - len(q) :, None]
        hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
        hidden |= (at < stands - left) if left >= 0 else hidden
        hidden |= (at > stands + right) if right >= 0 else hidden
        scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weights, v))
    return torch.cat(outputs)


def inputs(streams: int, length: int, before: int, heads: int, kv_heads: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(length + 31 * before)
    total = before + length
    shapes = ((length, heads), (total, kv_heads), (total, kv_heads))
    return [
        torch.randn(streams, n, h, 4, dtype=torch.float64, generator=gen).requires_grad_()
        for n, h in shapes
    ]


@pytest.mark.parametrize("form", [sdpa, flash], ids=["torch", "flash"])
@given(
    streams=st.integers(1, 3),
    length=st.integers(1, 20),
    before=st.integers(0, 9),
    groups=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    window=st.none() | st.integers(1, 12),
)
def test_a_text_attends_as_defined(
    form: Any,
    streams: int,
    length: int,
    before: int,
    groups: tuple[int, int],
    window: int | None,
) -> None:
    given = inputs(streams, length, before, *groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_varlen_attn", lambda: varlen_by_definition)
        found = form.text_attention(*given, window=window)
    expected = naive_text_attention(*given, window=window)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), given) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("padding", "begin", "copied"), [(0, 0, False), (8, 0, False), (4, 0, True), (8, 4, True)]
)
def test_what_begins_anywhere_is_copied_for_libraries(
    padding: int, begin: int, copied: bool
) -> None:
    """Of bfloat16: rows of 16 numbers among `padding` others."""
    packed = torch.randn(2, 3, 2, 16 + padding).bfloat16()
    x = packed[..., begin : begin + 16]
    found = launch.aligned(x)
    assert torch.equal(found, x) and (found is not x) == copied
    assert launch.aligned(found) is found


def test_torch_here_has_what_flash_asks_for() -> None:
    assert flash._varlen_attn() is not None


def test_on_a_cpu_torch_runs() -> None:
    dispatch.use(attention="flash")
    try:
        dispatch.text_attention(*inputs(1, 3, 0, 1, 1), window=None)
        assert dispatch.ran()["text_attention on cpu"].startswith(
            "torch, as FlashAttention runs on"
        )
    finally:
        dispatch.use()


@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        (lambda out: out + 0.1 * out.detach(), "attention differs from torch's"),
        (lambda out: out + 0.1 * (out - out.detach()), "gradient of q differs from torch's"),
    ],
)
def test_what_differs_from_torch_is_refused(
    spoiled: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return spoiled(varlen_by_definition(*args, **kwargs))

    chosen = (2, 1, 16, True, torch.float16, torch.device("cpu"))
    monkeypatch.setattr(flash, "_varlen_attn", lambda: varlen_by_definition)
    flash._disagreement.cache_clear()
    assert flash._disagreement(*chosen) is None
    flash._disagreement.cache_clear()
    monkeypatch.setattr(flash, "_varlen_attn", lambda: attention)
    found = flash._disagreement(*chosen)
    flash._disagreement.cache_clear()
    assert found is not None and why in found


def test_what_torch_was_not_built_with_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("No kernel here\nand more of it")

    monkeypatch.setattr(flash, "_varlen_attn", lambda: attention)
    flash._disagreement.cache_clear()
    found = flash._disagreement(2, 1, 16, False, torch.float16, torch.device("cpu"))
    flash._disagreement.cache_clear()
    assert found == "on this machine the kernels do not run (RuntimeError: No kernel here)"
