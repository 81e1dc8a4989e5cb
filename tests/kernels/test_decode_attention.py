"""Attention of one token of every branch over a text by its address, against torch's form of the
attention of branches in float64."""

import importlib.util
from typing import Any

import pytest
import torch
from refine_kernels import dispatch, launch
from refine_kernels.attention import branches
from refine_kernels.attention.branches import Span
from refine_kernels.attention.decode import TextPlaces
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from refine_kernels.attention import triton_decode

from tests.kernels.interpreter import (
    DEVICE,
    assert_near,
    interpreter_and_poison,  # noqa: F401
)

# Texts, tokens of theirs, room for own tokens, those there are, heads, heads that share keys, head
# width.
SIZES = [
    (1, 1, 1, 1, 1, 1, 8),
    (1, 150, 4, 1, 2, 1, 16),
    (2, 70, 5, 5, 4, 2, 20),
    (2, 130, 18, 17, 4, 4, 40),
]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one after another; some still have no keys."""
    monkeypatch.setattr(triton_decode, "_PARTS", 4)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=gen).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("window", [None, 1, 9, 66], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_token_attends_as_torchs(size, window, dtype, tolerance):
    """Keys and values where they lie among others; streams that left a text at its beginning,
    together and at its end; room that nobody wrote yet."""
    texts, length, room, count, heads, groups, dim = size
    kv_heads = heads // groups
    limit = [1, length, length // 2, length // 2, length - 1]
    rows = [i % texts for i in range(len(limit))]
    q = randn(len(rows), 1, heads, dim, dtype=dtype)
    text = [randn(texts, length, kv_heads, dim + i, dtype=dtype)[..., :dim] for i in (1, 2)]
    own = [randn(len(rows), room, kv_heads, dim + i, dtype=dtype)[..., :dim] for i in (1, 2)]
    of_own = [x[:, :count].double().cpu() for x in own]
    for x in own:
        x[:, count:] = torch.nan
    expected = branches.branch_attention(
        q.double().cpu(),
        (of_own[0], of_own[1]),
        [tuple(x.double().cpu() for x in text)],
        spans=(Span(0, length, 0),),
        rows=rows,
        limit=limit,
        window=window,
    )
    made = torch.tensor([count], device=DEVICE)
    found = triton_decode.decode_attention(
        q, (own[0], own[1]), made, TextPlaces.of(text[0], text[1], rows, limit), window=window
    )
    assert found.dtype == dtype and found.shape == q.shape
    assert_near([found], [expected], tolerance)


def test_the_place_of_a_text_is_data():
    """The same tables with other numbers in them are another text."""
    keys = [randn(1, n, 2, 16, dtype=torch.float32) for n in (30, 40)]
    values = [x.flip(1) for x in keys]
    q, own = (randn(1, 1, 2, 16, dtype=torch.float32) for _ in range(2))
    made = torch.ones(1, dtype=torch.long, device=DEVICE)
    first, second = (TextPlaces.of(keys[i], values[i], [0], [30 - i]) for i in (0, 1))

    def read() -> Tensor:
        return triton_decode.decode_attention(q, (own, own), made, first, window=None)

    before = read()
    first.table.copy_(second.table)
    expected = triton_decode.decode_attention(q, (own, own), made, second, window=None)
    torch.testing.assert_close(read(), expected, rtol=0, atol=0)
    assert not torch.equal(read(), before)


@pytest.mark.parametrize(("offset", "width", "known"), [(0, 16, 16), (2, 18, 8), (1, 17, 4)])
def test_addresses_are_said_to_divide_as_they_do(offset, width, known):
    """The compiler loads as many bytes at once."""
    x = torch.zeros(1, 4, width, device=DEVICE)[..., offset : offset + 16].unflatten(-1, (2, 8))
    assert TextPlaces.of(x, x, [0], [4]).alignment == (known, known)
    behind = x[:, 1:]
    assert all(place % known == 0 for place in TextPlaces.of(behind, behind, [0], [3]).table[0, :2])


def test_what_they_do_not_take():
    def refusal(own: int = 1, dim: int = 16, heads: int = 4) -> str | None:
        k = torch.zeros(1, own, 1, dim, device=DEVICE)
        q = torch.zeros(1, 1, heads, dim, device=DEVICE)
        places = TextPlaces.of(k, k, [0], [1])
        made = torch.ones(1, dtype=torch.long, device=DEVICE)
        return triton_decode.refusal(q, (k, k), made, places, window=None)

    assert refusal() is None
    assert "wide" in str(refusal(dim=264))
    assert "queries" in str(refusal(heads=33))
    assert "tokens" in str(refusal(own=33))


def test_torch_has_no_form():
    k = torch.zeros(1, 1, 1, 300, device=DEVICE)
    made = torch.ones(1, dtype=torch.long, device=DEVICE)
    given: Any = (k, (k, k), made, TextPlaces.of(k, k, [0], [1]))
    for form, why in (("triton", "300 wide"), ("torch", "not wanted")):
        dispatch.use(branches=form)
        with pytest.raises(RuntimeError, match=why):
            dispatch.decode_attention(*given, window=None)


@pytest.mark.parametrize(("wrong", "place"), [("decode_parts", 5), ("decode_join", 3)])
def test_kernels_that_disagree_with_torch_are_refused(monkeypatch, wrong, place):
    run = launch.run
    kind = (16, 2, True, torch.float32, torch.device(DEVICE))

    def wrong_run(kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
        run(kernel, grid, *given, **constants)
        if kernel.fn.__name__ == wrong:
            given[place].mul_(1.1)

    triton_decode._disagreement.cache_clear()
    assert triton_decode._disagreement(*kind) is None
    triton_decode._disagreement.cache_clear()
    monkeypatch.setattr(launch, "run", wrong_run)
    why = triton_decode._disagreement(*kind)
    triton_decode._disagreement.cache_clear()
    assert why is not None and "differs from torch's" in why
