"""LaCT's chunk form against the autograd definition, for every combination of options."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.dispatch import (
    FastWeights,
    apply_fast_weights,
    chunk_lact,
    update_fast_weights,
)
from refine_kernels.lact.naive import naive_lact
from refine_kernels.lact.newton_schulz import newton_schulz
from torch import Tensor

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
    w0, w1, w2 = tensors
    return FastWeights(w0, w1, w2)


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
    weights = [randn(b, n, dh, d), randn(b, n, d, dh), randn(b, n, dh, d)]
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
    return [w for weights in boundary_weights for w in weights[:3]]


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
        for ours, theirs in zip(boundaries[1:], boundaries_n[1:], strict=True):
            assert_close(ours.momentum, theirs.momentum)
    leaves = [x for x in (*tokens, *weights[:3]) if x is not None]
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
    assert_close(apply_fast_weights(after, norms, tail[0][:, :3], prenorm=prenorm), o[:, 6:9])


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
    shared = fast_weights(w[:1].detach() for w in weights[:3])
    repeated = fast_weights(w.expand(2, -1, -1, -1).contiguous() for w in shared[:3])
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
    single = fast_weights(w.detach().float() for w in weights[:3])
    half = each(tokens, lambda x: x.detach().bfloat16())
    o, boundaries = chunk_lact(*half, single, single.row_norms(), chunk_size=4, muon=False)
    assert o.dtype == torch.bfloat16
    buffers = boundaries[-1].momentum
    assert buffers is not None
    assert boundaries[-1].w0.dtype == buffers[0].dtype == torch.float32
