"""Attention of branches as Triton kernels, against torch's form in float64."""

import importlib.util
from typing import Any

import pytest
import torch
from refine_kernels import launch
from refine_kernels.attention import branches
from refine_kernels.attention.branches import Span
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from refine_kernels.attention import triton_branches

from tests.kernels.interpreter import (
    DEVICE,
    compare,
    interpreter_and_poison,  # noqa: F401
)

# Texts, tokens of theirs, own tokens, queries, heads, heads that share keys, head width.
SIZES = [
    (1, 1, 1, 1, 1, 1, 8),
    (1, 150, 1, 1, 2, 1, 16),
    (2, 70, 5, 5, 4, 2, 20),
    (2, 130, 4, 1, 3, 3, 16),
    (1, 90, 18, 3, 4, 4, 40),
]


def randn(*shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=gen)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("window", [None, 2, 9, 66], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_branches_attend_as_torchs(size, window, dtype, tolerance):
    """Keys and values where they lie among others; streams that left at the beginning, together, at
    the end, and behind the piece's end; a piece that begins within its text."""
    texts, length, own, tokens, heads, groups, dim = size
    kv_heads, first = heads // groups, 0 if length == 1 else 11
    limit = [first, first + length, first + length // 2, first + length // 2, first + length - 1]
    limit = [max(end, 1) for end in limit]
    rows = [i % texts for i in range(len(limit))]
    options: dict[str, Any] = {
        "spans": (Span(0, length, first),),
        "rows": rows,
        "limit": limit,
        "window": window,
    }
    inputs = [
        randn(len(rows), tokens, heads, dim),
        *(randn(len(rows), own, kv_heads, dim + i) for i in (1, 2)),
        *(randn(texts, length, kv_heads, dim + i) for i in (1, 2)),
    ]

    def of(form: Any) -> Any:
        def run(q: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
            own_k, own_v, text_k, text_v = (x[..., :dim] for x in keys_and_values)
            return [form(q, (own_k, own_v), [(text_k, text_v)], **options)]

        return run

    compare(
        of(triton_branches.branch_attention),
        of(branches.branch_attention),
        inputs,
        dtype,
        tolerance,
    )


def test_torchs_form_loses_nothing_of_bfloat16_but_its_last_rounding():
    """Scores of 16 and more, each of which bfloat16 would round by up to 0.06, keep their digits,
    as they do in the attention of the text that the branches left; so do the weights."""
    options: dict[str, Any] = {
        "spans": (Span(0, 150, 0), Span(0, 150, 150)),
        "rows": (0, 0, 0),
        "limit": (120, 200, 300),
        "window": None,
    }
    q = 4 * randn(3, 5, 4, 64)
    others = [randn(*shape, 2, 64) for shape in ((3, 5), (3, 6), (1, 150), (1, 151))]
    others[1], others[3] = others[1][:, :5], others[3][:, :150]
    inputs = [x.bfloat16() for x in (q, *others, *(x.flip(1) for x in others[2:]))]
    upstream = randn(3, 5, 4, 64).bfloat16()

    def of(dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).detach().requires_grad_() for x in inputs]
        query, *own_and_text = given
        pieces = [tuple(own_and_text[i : i + 2]) for i in (0, 2, 4)]
        out = branches.branch_attention(query, pieces[0], pieces[1:], **options)
        return [out, *torch.autograd.grad(out, given, upstream.to(dtype))]

    for found, expected in zip(of(torch.bfloat16), of(torch.float64), strict=True):
        assert (found.double() - expected).norm() < 2e-3 * expected.norm()


def test_a_part_of_a_piece():
    """Of which the rest is never read, and has a gradient of zeros."""
    k, v = (randn(1, 100, 2, 16).float().to(DEVICE) for _ in range(2))
    q, own = randn(3, 2, 2, 16).float().to(DEVICE), randn(3, 2, 2, 16).float().to(DEVICE)
    given = (q, (own, own), [(k, v)])
    options: dict[str, Any] = {
        "spans": (Span(40, 80, 0),),
        "rows": (0, 0, 0),
        "limit": (50, 80, 66),
        "window": 11,
    }
    expected = branches.branch_attention(*given, **options)
    for x in (k, v):
        x[:, :40], x[:, 80:] = torch.nan, torch.nan
        x.requires_grad_()
    found = triton_branches.branch_attention(*given, **options)
    torch.testing.assert_close(found, expected)
    for grad in torch.autograd.grad(found.sum(), (k, v)):
        assert not grad[:, :40].any() and not grad[:, 80:].any() and grad[:, 40:80].any()


def test_what_they_do_not_take():
    def refusal(tokens: int = 1, own: int = 1, length: int = 8, pieces: int = 1, **changed: Any):
        options: dict[str, Any] = {"rows": (0,), "limit": (1,), "window": None} | changed
        options["spans"] = (Span(0, length, 0),) * pieces
        dim = options.pop("dim", 16)
        k = torch.zeros(1, own, 1, dim, device=DEVICE)
        text = torch.zeros(1, length, 1, dim, device=DEVICE)
        q = torch.zeros(1, tokens, 4, dim, device=DEVICE)
        return triton_branches.refusal(q, (k, k), [(text, text)] * pieces, **options)

    assert refusal() is None
    assert "wide" in str(refusal(dim=136))
    assert "queries" in str(refusal(tokens=9, own=9))
    assert "tokens" in str(refusal(own=33))
    assert "more than 4096 tokens" in str(refusal(length=5000))
    assert refusal(length=5000, window=64) is None
    # said once however many they are: the log has a line for each reason
    assert refusal(length=5000) == refusal(length=5001)
    assert "several pieces" in str(refusal(pieces=2))


@pytest.mark.parametrize("wrong", ["branches_forward", "branches_backward", "text_backward"])
def test_kernels_that_disagree_with_torch_are_refused(monkeypatch, wrong):
    run = launch.run
    kind = (16, 2, True, torch.float32, torch.device(DEVICE))

    def wrong_run(kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
        run(kernel, grid, *given, **constants)
        if kernel.fn.__name__ == wrong:
            place = {"branches_forward": 7, "branches_backward": 12, "text_backward": 11}[wrong]
            given[place].mul_(1.1)

    triton_branches._disagreement.cache_clear()
    assert triton_branches._disagreement(*kind) is None
    triton_branches._disagreement.cache_clear()
    monkeypatch.setattr(launch, "run", wrong_run)
    why = triton_branches._disagreement(*kind)
    triton_branches._disagreement.cache_clear()
    assert why is not None and "differs from torch's" in why
    assert ("gradient" in why) == wrong.endswith("backward")
