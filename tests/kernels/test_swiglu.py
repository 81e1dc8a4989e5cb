"""SwiGLU against its definition, values and gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.dispatch import swiglu
from refine_kernels.swiglu.naive import naive_swiglu


@given(
    seed=st.integers(0, 2**31),
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(1, 7),
)
def test_equals_the_definition(seed, lead, width):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, 2 * width, dtype=torch.float64, generator=gen).requires_grad_()
    seen = torch.randn(*lead, width, dtype=torch.float64, generator=gen)
    y, expected = swiglu(x), naive_swiglu(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad((z * seen).sum(), x)[0] for z in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_bfloat16_gives_what_the_definition_gives():
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    y, expected = swiglu(x), naive_swiglu(x)
    assert torch.equal(y, expected)
    assert torch.equal(
        *(
            torch.autograd.grad(z, x, torch.ones_like(z), retain_graph=True)[0]
            for z in (y, expected)
        )
    )
