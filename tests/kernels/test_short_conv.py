"""The short convolution against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.dispatch import causal_conv1d
from refine_kernels.short_conv.naive import naive_causal_conv1d


def make_inputs(seed, b, t, d, width):
    gen = torch.Generator().manual_seed(seed)
    shapes = ((b, t, d), (d, 1, width), (b, width - 1, d))
    return [torch.randn(s, dtype=torch.float64, generator=gen).requires_grad_() for s in shapes]


def gradients(outputs, inputs):
    gen = torch.Generator().manual_seed(0)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=gen)).sum() for x in outputs)
    return torch.autograd.grad(total, inputs)


cases = {
    "seed": st.integers(0, 2**31),
    "b": st.integers(1, 2),
    "t": st.integers(1, 9),
    "d": st.integers(1, 4),
    "width": st.integers(1, 5),
    "activation": st.sampled_from(["silu", None]),
}


@given(**cases)
def test_equals_the_definition(seed, b, t, d, width, activation):
    x, weight, state = make_inputs(seed, b, t, d, width)
    actual = causal_conv1d(x, weight, state, activation)
    expected = naive_causal_conv1d(x, weight, state, activation)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, weight, state]
    torch.testing.assert_close(
        gradients(actual, leaves), gradients(expected, leaves), rtol=1e-12, atol=1e-12
    )


@given(cut=st.integers(0, 9), **cases)
def test_pieces_equal_the_whole(seed, b, t, d, width, activation, cut):
    x, weight, state = make_inputs(seed, b, t + 1, d, width)
    cut = 1 + cut % t
    y, final = causal_conv1d(x, weight, state, activation)
    y_1, middle = causal_conv1d(x[:, :cut], weight, state, activation)
    y_2, final_2 = causal_conv1d(x[:, cut:], weight, middle, activation)
    pieces = (torch.cat((y_1, y_2), 1), final_2)
    torch.testing.assert_close(pieces, (y, final), rtol=1e-12, atol=1e-12)
    leaves = [x, weight, state]
    torch.testing.assert_close(
        gradients(pieces, leaves), gradients((y, final), leaves), rtol=1e-12, atol=1e-12
    )


def test_no_state_is_zeros_and_the_last_tap_is_the_current_token():
    x, weight, state = make_inputs(0, 1, 3, 2, 4)
    y, final = causal_conv1d(x, weight)
    torch.testing.assert_close(y, causal_conv1d(x, weight, torch.zeros_like(state))[0])
    torch.testing.assert_close(y[:, 0], x[:, 0] * weight[:, 0, 3])
    torch.testing.assert_close(final, x)


def test_low_precision_keeps_its_dtype():
    x, weight, _ = (z.detach().bfloat16() for z in make_inputs(1, 1, 50, 3, 4))
    y, final = causal_conv1d(x, weight, None, "silu")
    exact = naive_causal_conv1d(x.double(), weight.double(), None, "silu")[0]
    assert y.dtype == final.dtype == torch.bfloat16
    assert torch.equal(y, exact.to(torch.float32).bfloat16())


def test_other_activations_are_refused():
    x, weight, _ = make_inputs(2, 1, 3, 2, 4)
    with pytest.raises(AssertionError):
        causal_conv1d(x, weight, None, "relu")
