"""LaCT's chunk form against the autograd definition, for every combination of options."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.dispatch import (
    FastWeights,
    apply_fast_weights,
    chunk_lact,
    update_fast_weights,
)
from refine_kernels.lact import products
from refine_kernels.lact.naive import naive_lact
from refine_kernels.lact.newton_schulz import newton_schulz
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from refine_mcore.benchmark.memory import describe, saved_tensors

Tokens = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]

variants = pytest.mark.parametrize(
    "muon,momentum,prenorm",
    [
        (muon, momentum, prenorm)
        for muon in (False, True)
        for momentum in (False, True)
        for prenorm in (False, True)
    ],
)


def fast_weights(tensors: Iterable[Tensor]) -> FastWeights:
    w02, w1 = tensors
    return FastWeights(w02, w1)


def each(tokens: Tokens, f: Callable[[Tensor], Tensor]) -> Tokens:
    """f of every token input that is there."""
    fq, fk, fv, lr, momentum = tokens
    return f(fq), f(fk), f(fv), f(lr), None if momentum is None else f(momentum)


def make_inputs(
    seed: int, b: int, t: int, n: int, d: int, dh: int, momentum: bool
) -> tuple[Tokens, FastWeights]:
    """Token inputs (fq, fk, fv, lr, momentum or None) and fast weights, float64 leaves."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=gen)

    fq, fk, fv = (randn(b, t, n, d) for _ in range(3))
    lr = 0.3 * randn(b, t, n, 3).sigmoid()
    tokens = (fq, fk, fv, lr, randn(b, t, n).sigmoid() if momentum else None)
    weights = [randn(b, n, 2 * dh, d), randn(b, n, d, dh)]
    return each(tokens, Tensor.requires_grad_), fast_weights(w.requires_grad_() for w in weights)


def gradients(outputs, inputs):
    gen = torch.Generator().manual_seed(0)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=gen)).sum() for x in outputs)
    return torch.autograd.grad(
        total, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def assert_close(actual, expected, tolerance=1e-8):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def flat(boundary_weights):
    """All tensors of a list of FastWeights, without the buffers (None or zeros at the start)."""
    return [w for weights in boundary_weights for w in weights[:2]]


@variants
@given(
    seed=st.integers(0, 2**31),
    b=st.integers(1, 2),
    t=st.integers(1, 13),
    n=st.integers(1, 2),
    d=st.integers(2, 4),
    dh=st.integers(2, 5),
    chunk_size=st.integers(1, 6),
)
def test_chunks_equal_the_definition(muon, momentum, prenorm, seed, b, t, n, d, dh, chunk_size):
    tokens, weights = make_inputs(seed, b, t, n, d, dh, momentum)
    norms = weights.row_norms()
    options: dict[str, Any] = {"chunk_size": chunk_size, "muon": muon, "prenorm": prenorm}
    o, boundaries = chunk_lact(*tokens, weights, norms, **options)
    o_n, boundaries_n = naive_lact(*tokens, weights, norms, **options)
    assert len(boundaries) == len(boundaries_n) == -(-t // chunk_size)
    assert_close(o, o_n)
    assert_close(flat(boundaries), flat(boundaries_n))
    if momentum:
        for ours, theirs in zip([*boundaries][1:], boundaries_n[1:], strict=True):
            assert_close(ours.momentum, theirs.momentum)
    full = t // chunk_size
    assert boundaries.reading([(full, 0)]) is None
    if full > 1:
        places = [(i, stream) for i in reversed(range(full)) for stream in range(b)]
        of_w02, of_w1 = zip(*(boundaries[i].read() for i in reversed(range(full))), strict=True)
        reading = boundaries.reading(places)
        assert reading is not None
        assert_close(reading[:2], [torch.cat(of_w02), torch.cat(of_w1)])
    leaves = [x for x in (*tokens, *weights[:2]) if x is not None]
    ours = gradients([o, *flat(boundaries)], leaves)
    theirs = gradients([o_n, *flat(boundaries_n)], leaves)
    scale = max(x.abs().max().item() for x in theirs)
    assert_close([x / scale for x in ours], [x / scale for x in theirs])


@variants
def test_resuming_from_weights_with_momentum_equals_one_pass(muon, momentum, prenorm):
    tokens, weights = make_inputs(1, 2, 12, 2, 3, 4, momentum)
    norms = weights.row_norms()
    options: dict[str, Any] = {"muon": muon, "prenorm": prenorm}
    o, boundaries = chunk_lact(*tokens, weights, norms, chunk_size=3, **options)
    head = each(tokens, lambda x: x[:, 3:6])
    tail = each(tokens, lambda x: x[:, 6:])
    after = update_fast_weights(boundaries[1], norms, *head[1:], **options)
    o_tail, _ = chunk_lact(*tail, after, norms, chunk_size=3, **options)
    assert_close(o_tail, o[:, 6:])
    assert_close(apply_fast_weights(after, tail[0][:, :3]), o[:, 6:9])


@pytest.mark.parametrize("t,updates", [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_chunk_full_or_not_makes_no_update(t, updates):
    tokens, weights = make_inputs(2, 1, t, 1, 3, 4, True)
    _, boundaries = chunk_lact(*tokens, weights, weights.row_norms(), chunk_size=4, muon=False)
    assert len(boundaries) == updates + 1
    assert boundaries[0] is weights


def test_rows_keep_their_initial_norms():
    tokens, weights = make_inputs(3, 1, 9, 2, 3, 4, False)
    norms = weights.row_norms()
    _, boundaries = chunk_lact(*tokens, weights, norms, chunk_size=2, muon=True)
    assert_close(boundaries[-1].row_norms(), norms, 1e-4)
    assert not torch.allclose(boundaries[-1].w0, weights.w0, rtol=1e-2)


def test_weights_shared_by_all_streams_need_no_copy():
    tokens, weights = make_inputs(4, 2, 7, 2, 3, 4, True)
    shared = fast_weights(w[:1].detach() for w in weights[:2])
    repeated = fast_weights(w.expand(2, -1, -1, -1).contiguous() for w in shared[:2])
    o, _ = chunk_lact(*tokens, shared, shared.row_norms(), chunk_size=3, muon=True)
    expected, _ = chunk_lact(*tokens, repeated, repeated.row_norms(), chunk_size=3, muon=True)
    assert_close(o, expected)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_flattens_the_spectrum(shape):
    gen = torch.Generator().manual_seed(0)
    g = torch.randn(2, *shape, dtype=torch.float64, generator=gen)
    x = newton_schulz(g)
    assert ((torch.linalg.svdvals(x) - 1).abs() < 0.35).all()
    # the singular vectors stay: x^T g is symmetric
    product = x.transpose(-1, -2) @ g
    assert_close(product, product.transpose(-1, -2), 1e-10)
    assert_close(newton_schulz(7.0 * g), x, 1e-5)


@pytest.mark.parametrize("size", [1.0, 3e-8])
@pytest.mark.parametrize("shape", [(2, 3, 5), (5, 3), (2, 1, 4, 4)])
def test_newton_schulz_passes_gradcheck(shape, size):
    """Also of matrices that are small beside what is added to their norm."""
    gen = torch.Generator().manual_seed(0)
    g = size * torch.randn(1, *shape, dtype=torch.float64, generator=gen)
    step = 1e-6 * size
    assert torch.autograd.gradcheck(
        lambda x: size * newton_schulz(x), (g.requires_grad_(),), eps=step, atol=1e-5, rtol=1e-4
    )


def test_newton_schulz_keeps_zeros_and_their_gradient_finite():
    g = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    newton_schulz(g).sum().backward()
    assert g.grad is not None and g.grad.isfinite().all()


def test_newton_schulz_precision_is_the_callers():
    gen = torch.Generator().manual_seed(1)
    g = torch.randn(2, 6, 4, generator=gen)
    full, half = newton_schulz(g), newton_schulz(g, torch.bfloat16)
    assert half.dtype == torch.float32
    difference = (full - half).abs().max()
    assert 1e-4 < difference < 0.1
    assert torch.equal(half, half.bfloat16().float())


def test_low_precision_tokens_with_float32_weights():
    tokens, weights = make_inputs(5, 1, 9, 2, 4, 4, True)
    single = fast_weights(w.detach().float() for w in weights[:2])
    half = each(tokens, lambda x: x.detach().bfloat16())
    o, boundaries = chunk_lact(*half, single, single.row_norms(), chunk_size=4, muon=False)
    assert o.dtype == torch.bfloat16
    buffers = boundaries[-1].momentum
    assert buffers is not None
    assert boundaries[-1].w0.dtype == buffers.dtype == torch.float32


def realistic(dtype: torch.dtype, chunks: int = 4) -> tuple[Tokens, FastWeights]:
    """Chunks of 256 tokens for two heads of 96, with momentum: tokens in dtype, weights float32 or
    wider."""
    tokens, weights = make_inputs(6, 1, 256 * chunks, 2, 96, 96, True)
    wide = torch.promote_types(dtype, torch.float32)
    fq, fk, fv, lr, momentum = each(tokens, Tensor.detach)
    assert momentum is not None
    fq, fk, fv = (F.normalize(x, dim=-1).to(dtype) for x in (fq, fk, fv))
    leaves = each((fq, fk, fv, lr.to(wide), momentum.to(wide)), Tensor.requires_grad_)
    return leaves, fast_weights((0.1 * w.detach()).to(wide).requires_grad_() for w in weights[:2])


def run_realistic(dtype: torch.dtype, precision: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The output and the last chunk's weights; the gradients of all inputs."""
    tokens, weights = realistic(dtype, chunks=3)
    options: dict[str, Any] = {"chunk_size": 256, "muon": False, "precision": precision}
    o, boundaries = chunk_lact(*tokens, weights, weights.row_norms(), **options)
    outputs = [o, *boundaries[-1][:2]]
    inputs = [x for x in (*tokens, *weights[:2]) if x is not None]
    return outputs, list(gradients([x.double() for x in outputs], inputs))


class _ChunkProducts(TorchDispatchMode):
    """Keeps the dtypes of the operands of every product that has the tokens of a chunk in it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.dtypes = tokens, set[torch.dtype]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        product = func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm)
        if product and any(self.tokens in x.shape[-2:] for x in args):
            self.dtypes |= {x.dtype for x in args}
        return func(*args, **(kwargs or {}))


def product_dtypes(function: Callable[[], Any], of_tokens: int) -> set[torch.dtype]:
    """The operand dtypes of the products that `function` makes over chunks of that many tokens."""
    with _ChunkProducts(of_tokens) as seen:
        function()
    return seen.dtypes


@pytest.mark.parametrize(
    "dtype,precision,operands,tolerance",
    [
        (torch.bfloat16, None, torch.bfloat16, 4e-2),
        (torch.float32, None, torch.float32, 1e-5),
        (torch.float64, None, torch.float64, 1e-12),
        (torch.bfloat16, "float32", torch.float32, 2e-2),
        (torch.float64, "float32", torch.float64, 1e-12),
        (torch.float32, "bfloat16", torch.bfloat16, 4e-2),
        (torch.float32, "tf32", torch.float32, 1e-5),
    ],
)
def test_products_run_in_the_precision_asked_for(dtype, precision, operands, tolerance):
    results: list[Any] = []
    found = product_dtypes(lambda: results.extend(run_realistic(dtype, precision)), 256)
    assert found == {operands}
    outputs, grads = results
    assert outputs[0].dtype == dtype
    assert {w.dtype for w in outputs[1:]} == {torch.promote_types(dtype, torch.float32)}
    expected_outputs, expected_grads = run_realistic(torch.float64, None)
    for actual, expected in zip(
        [*outputs, *grads], [*expected_outputs, *expected_grads], strict=True
    ):
        assert (actual.double() - expected).norm() < tolerance * expected.norm()


def test_tf32_is_on_around_products_of_both_passes_and_off_elsewhere():
    """What a GPU would be told, seen on any machine."""
    settings: dict[str, set[str]] = {}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = settings.setdefault(func.overloadpacket.__name__, set())
            found.add(torch.backends.cuda.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    before = torch.backends.cuda.matmul.fp32_precision
    assert before != "tf32"
    with Seen():
        run_realistic(torch.float32, "tf32")
    # what adds to a gradient is of the backward alone
    assert settings["bmm"] == settings["baddbmm"] == {"tf32"}
    assert settings["silu"] == settings["silu_backward"] == settings["mul"] == {before}
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_where_there_is_no_tf32_the_log_says_so_once(caplog):
    products._log_no_tf32.cache_clear()
    run_realistic(torch.float32, "tf32")
    run_realistic(torch.float32, "tf32")
    (record,) = [r for r in caplog.records if "tf32" in r.getMessage()]
    assert record.getMessage().startswith("no tf32 products of float32 on cpu")


@pytest.mark.parametrize("prenorm", [False, True])
def test_the_backward_keeps_inputs_weights_and_newton_schulz(prenorm):
    tokens, weights = realistic(torch.bfloat16)
    options: dict[str, Any] = {"chunk_size": 256, "muon": True, "prenorm": prenorm}

    def forward():
        return chunk_lact(*tokens, weights, weights.row_norms(), **options)

    saved = saved_tensors(forward)
    token_inputs = 3 * 2 * 96 * 2 + 4 * 2 * 4
    size = 3 * 2 * 96 * 96 * 4
    # of four chunks each weights and momentum; of three updates the steps of Newton-Schulz, what
    # goes into their first and what comes out of their last
    allowed = 1024 * token_inputs + 4 * 2 * size + 3 * (5 * 3 + 2) * size + 65_536  # norms
    assert sum(one.bytes for one in saved) <= allowed, describe(saved)


def test_the_backward_asks_once_for_what_was_kept():
    """Which checkpointing hands out once, and selective recomputation makes again each time."""
    tokens, weights = make_inputs(7, 2, 9, 2, 3, 4, True)
    leaves = [x for x in (*tokens, *weights[:2]) if x is not None]

    def run(*given: Tensor) -> Tensor:
        fq, fk, fv, lr, momentum, w02, w1 = given
        initial = FastWeights(w02, w1)
        norms = initial.row_norms()
        o, _ = chunk_lact(fq, fk, fv, lr, momentum, initial, norms, chunk_size=4, muon=True)
        return o

    found = [run(*leaves), checkpoint(run, *leaves, use_reentrant=False)]
    assert_close(gradients(found[1:], leaves), gradients(found[:1], leaves))
