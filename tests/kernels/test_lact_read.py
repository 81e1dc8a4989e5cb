"""What LaCT reads for a few tokens by kernels, against the fast network's definition in float64."""

import importlib.util
from typing import Any

import pytest
import torch
from refine_kernels import dispatch, launch
from refine_kernels.lact.fast_weights import FastWeights
from refine_kernels.lact.naive import naive_read
from refine_kernels.lact.products import product_in
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from refine_kernels.lact import triton_forms, triton_read

from tests.kernels.interpreter import (
    DEVICE,
    assert_near,
    compare,
    interpreter_and_poison,  # noqa: F401
)

# streams, tokens, heads, width of a head, hidden units
SHAPES = [
    (1, 1, 1, 16, 16),
    (2, 5, 3, 20, 37),
    (3, 16, 1, 70, 33),
    (1, 20, 2, 96, 32),
    (1, 64, 1, 40, 24),
]
PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)]


def randn(*shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=gen)


def problem(streams: int, tokens: int, heads: int, width: int, units: int) -> list[Tensor]:
    """Queries and weights whose hidden units are of size 1; the products of each are told apart."""
    x = randn(streams, tokens, heads, width)
    w02 = randn(streams, heads, 2 * units, width) / width**0.5
    return [x, w02, randn(streams, heads, width, units) / units**0.5]


def read(x: Tensor, w02: Tensor, w1: Tensor) -> list[Tensor]:
    dispatch.use(lact="triton")
    return [dispatch.apply_fast_weights(FastWeights(w02, w1), x)]


def by_definition(x: Tensor, w02: Tensor, w1: Tensor) -> list[Tensor]:
    return [naive_read(FastWeights(w02, w1), x)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_read(monkeypatch, shape, dtype, tolerance):
    """Outputs and gradients, in two launches each way."""
    launched: list[str] = []
    run = launch.run

    def seen(kernel: Any, *given: Any, **constants: Any) -> None:
        launched.append(kernel.fn.__name__)
        run(kernel, *given, **constants)

    given = problem(*shape)
    read(*(x.to(DEVICE, dtype) for x in given))  # what checks the kernels is done
    monkeypatch.setattr(launch, "run", seen)
    compare(read, by_definition, given, dtype, tolerance)
    assert launched == ["read_hidden", "multiply_rows", "read_gradients", "multiply_rows"]


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_read_of_mixed_dtypes(tokens, weights):
    """Weights before their first update may have more precision than what products take."""
    x, w02, w1 = problem(2, 5, 2, 20, 24)
    given = [x.to(DEVICE, tokens), w02.to(DEVICE, weights), w1.to(DEVICE, weights)]
    leaves = [y.detach().requires_grad_() for y in given]
    (out,) = read(*leaves)
    exact = [y.detach().double().cpu().requires_grad_() for y in given]
    (expected,) = by_definition(*exact)
    assert out.dtype == tokens
    grad = randn(*out.shape)
    found = torch.autograd.grad(out, leaves, grad.to(DEVICE, tokens))
    wanted = torch.autograd.grad(expected, exact, grad)
    assert [g.dtype for g in found] == [tokens, weights, weights]
    tolerance = 1e-3 if tokens == torch.float16 else 6e-3
    assert_near([out, *found], [expected.detach(), *wanted], tolerance)


def test_read_of_views():
    """Rows of more streams, heads taken from wider rows, one stream's weights for all."""
    x, w02, w1 = problem(3, 4, 2, 24, 20)

    def of_views(x: Tensor, w02: Tensor, w1: Tensor) -> list[Tensor]:
        wide = torch.cat([x, x], 3)[:, :, :, 24:].transpose(1, 2).contiguous().transpose(1, 2)
        return read(
            wide, w02[:1].expand(3, -1, -1, -1), w1.mT.contiguous().mT[1:2].expand(3, -1, -1, -1)
        )

    def of_the_same(x: Tensor, w02: Tensor, w1: Tensor) -> list[Tensor]:
        return by_definition(x, w02[:1].expand(3, -1, -1, -1), w1[1:2].expand(3, -1, -1, -1))

    compare(of_views, of_the_same, [x, w02, w1], torch.float32, 2e-6)


def test_more_tokens_and_shared_weights_are_the_librarys():
    x, w02, w1 = (y.to(DEVICE, torch.float32) for y in problem(2, 65, 1, 16, 16))
    assert not triton_read.takes(FastWeights(w02, w1), x)
    assert not triton_read.takes(FastWeights(w02[:1], w1[:1]), x[:, :4])
    assert triton_read.takes(FastWeights(w02, w1), x[:, :64])
    assert_near(read(x, w02, w1), by_definition(x.double(), w02.double(), w1.double()), 2e-6)


@pytest.mark.parametrize("rows", [1, 37])
def test_read_of_rows_that_are_one(rows):
    """Weights of one row, seen as many, and of a single column."""
    x, w02, w1 = problem(2, 4, 2, 16, 16)

    def run(form: Any) -> Any:
        def of_one(x: Tensor, w02: Tensor, w1: Tensor) -> list[Tensor]:
            wide = w02[:, :, :1].expand(-1, -1, 2 * rows, -1)
            return form(x, wide, w1[:, :, :1, :1].expand(-1, -1, 16, rows))

        return of_one

    compare(run(read), run(by_definition), [x, w02, w1], torch.float32, 4e-6)


@pytest.mark.parametrize(("tokens", "rows", "others"), [(4, 16, 40), (40, 64, 4)])
@pytest.mark.parametrize("wrong", ["read_hidden", "multiply_rows", "read_gradients"])
def test_a_wrong_kernel_is_refused(monkeypatch, caplog, wrong, tokens, rows, others):
    """And the libraries' products run instead. Other numbers of rows are other code: each is
    checked for itself."""
    x, w02, w1 = (y.to(DEVICE, torch.float32) for y in problem(1, tokens, 1, 16, 16))
    run = launch.run

    def wrong_run(kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
        run(kernel, grid, *given, **constants)
        if kernel.fn.__name__ == wrong and constants["BT"] == rows:
            written = [y for y in given if isinstance(y, Tensor)][-1]
            written[..., 1].mul_(1.2)

    triton_forms._log_products.cache_clear()
    triton_read._disagreement.cache_clear()
    monkeypatch.setattr(launch, "run", wrong_run)
    assert_near(read(x, w02, w1), by_definition(x.double(), w02.double(), w1.double()), 2e-6)
    assert dispatch.ran()[f"apply_fast_weights on {DEVICE}"] == "triton"
    product, other = product_in(None, x.dtype, x.dtype), x[:, :1].expand(-1, others, -1, -1)
    assert triton_read.refusal(product, FastWeights(w02, w1), other) is None
    triton_read._disagreement.cache_clear()
    (said,) = {r.getMessage() for r in caplog.records if "few tokens" in r.getMessage()}
    assert "as on this machine the kernels' " in said
