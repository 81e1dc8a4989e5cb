"""RMS norm against its definition, values and gradients, with and without a gate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.dispatch import rms_norm
from refine_kernels.rms_norm.naive import naive_rms_norm
from torch import Tensor


def make_inputs(
    seed: int, shape: tuple[int, ...], gate: int | None, added: bool = False
) -> list[Tensor]:
    """x, weight[, gate[, base]] in float64; the last dimension of the gate is `gate`."""
    gen = torch.Generator().manual_seed(seed)
    shapes = [shape, shape[-1:], *([] if gate is None else [(*shape[:-1], gate)])]
    shapes += [shape] * added
    return [torch.randn(s, dtype=torch.float64, generator=gen).requires_grad_() for s in shapes]


def run(function, inputs: list[Tensor], eps: float) -> list[Tensor]:
    """The output and the gradients of a random projection of it."""
    x, weight, *gate = inputs
    y = function(x, weight, eps, *gate)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad((y * seen).sum(), inputs)]


@given(
    seed=st.integers(0, 2**31),
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dim=st.integers(1, 7),
    gate=st.sampled_from(["none", "whole", "one", "one, added"]),
)
def test_equals_the_definition(seed, lead, dim, gate):
    width = {"none": None, "whole": dim}.get(gate, 1)
    inputs = make_inputs(seed, (*lead, dim), width, gate == "one, added")
    expected = run(naive_rms_norm, inputs, 0.1)
    torch.testing.assert_close(run(rms_norm, inputs, 0.1), expected, rtol=1e-10, atol=1e-10)


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    _, grad_x, grad_weight = run(rms_norm, [x, weight], 1e-6)
    assert grad_x.isfinite().all() and not grad_weight.any()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_computed_in_float32(weight_dtype):
    """Within half a unit in the last place of the exact result, gains in any precision."""
    x, weight, gate = (x.detach() for x in make_inputs(0, (64, 32), 32))
    half = [x.bfloat16(), weight.to(weight_dtype), gate.bfloat16()]
    exact = naive_rms_norm(half[0].double(), half[1].double(), 1e-6, half[2].double())
    leaves = [x.requires_grad_() for x in half]
    y, *grads = run(rms_norm, leaves, 1e-6)
    assert [g.dtype for g in (y, *grads)] == [torch.bfloat16, *(x.dtype for x in leaves)]
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_inputs_are_left_as_they_are():
    inputs = [x.float().detach().requires_grad_() for x in make_inputs(0, (3, 4), 4)]
    before = [x.detach().clone() for x in inputs]
    run(rms_norm, inputs, 1e-6)
    assert all(torch.equal(x, b) for x, b in zip(inputs, before, strict=True))
