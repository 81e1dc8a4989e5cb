"""Packed projections: the backward of their parts, also where some are not used."""

import torch
from torch import Tensor

from refine_mcore.models.parallel_layers import _Split, _zeros

WIDTHS = [3, 2, 4, 1]


def gradient(split, packed: Tensor, used: list[int]) -> Tensor:
    """Of a sum over the parts in use, the first of which is read twice."""
    packed = packed.detach().requires_grad_()
    parts = split(packed)
    loss = parts[used[0]].square().sum() + sum(parts[i].exp().sum() for i in used)
    (found,) = torch.autograd.grad(loss, packed)
    return found


def test_the_gradient_of_parts_is_that_of_torchs_split():
    packed = torch.randn(2, 5, sum(WIDTHS), generator=torch.Generator().manual_seed(0))
    for used in ([0, 1, 2, 3], [1], [2, 0], [3]):
        expected = gradient(lambda x: torch.split(x, WIDTHS, dim=-1), packed, used)
        assert torch.equal(gradient(lambda x: _Split.apply(x, WIDTHS), packed, used), expected)


def test_the_zeros_of_unused_parts_are_made_once_and_stay_zero():
    _zeros.cache_clear()
    packed = torch.randn(2, 5, sum(WIDTHS))
    first = gradient(lambda x: _Split.apply(x, WIDTHS), packed, [0])
    first.fill_(7)  # whoever has the gradient may write to it
    again = gradient(lambda x: _Split.apply(x, WIDTHS), packed, [0])
    assert not again[..., 3:].any() and again[..., :3].all()
    assert _zeros.cache_info().misses == 3
    with torch.inference_mode():
        _zeros.cache_clear()
        made = _zeros(torch.Size((2,)), torch.float32, torch.device("cpu"))
    assert not made.is_inference()
