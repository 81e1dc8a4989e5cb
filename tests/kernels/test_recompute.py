"""What is made again for the backward: not kept, made once for all its readers, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from refine_kernels.recompute import readable_later, recomputed, remade, remaking
from refine_kernels.rms_norm.rms_norm import rms_norm
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from refine_mcore.benchmark.memory import saved_tensors


class Counted:
    """A function and how often it ran."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.function(*args)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return rms_norm(x, gain, 1e-5)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (4,), (4, 4))
    x, gain, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return x.requires_grad_(), gain.requires_grad_(), weight.requires_grad_()


def readers(x: Tensor, gain: Tensor, weight: Tensor, function: Any = norm) -> Tensor:
    """Two products with a norm's output, one of a view of it; and a tensor that is kept."""
    y = remade(function, x, gain)
    kept = (y @ weight).exp()
    return (kept + (y.view(3, 2, 4)[1:].transpose(1, 2) ** 2).sum()).sum()


def test_contents_read_later_are_made_again_and_keep_nothing_alive() -> None:
    """Of an output of `remade`; what nothing makes again is itself kept."""
    x, gain, weight = inputs()
    made = Counted(norm)
    with remaking():
        y = remade(made, x, gain)
        of_view, of_input = readable_later(y[2:]), readable_later(x)
        loss = (y @ weight).sum()
    expected, alive = y[2:].detach().clone(), StorageWeakRef(y.untyped_storage())
    del y
    assert alive.expired()
    for calls in (2, 3):
        assert torch.equal(of_view(), expected) and not of_view().requires_grad
        assert made.calls == 2 * calls - 1
    assert of_input().data_ptr() == x.data_ptr()
    loss.backward()  # its own readers are counted without these
    assert made.calls == 6
    assert readable_later(x)().data_ptr() == x.data_ptr()


def test_a_remade_tensor_is_made_once_for_all_its_readers_and_changes_no_bit() -> None:
    arguments, made = inputs(), Counted(norm)
    expected = torch.autograd.grad(readers(*arguments), arguments)
    with remaking():
        loss = readers(*arguments, made)
    assert made.calls == 1
    found = torch.autograd.grad(loss, arguments, retain_graph=True)
    assert made.calls == 2
    again = torch.autograd.grad(loss, arguments)
    assert made.calls == 3
    for one, two, three in zip(expected, found, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_outputs_are_made_together_and_let_go_one_by_one() -> None:
    """The second is read only when the first is gone, as with a long backward between them."""
    x, _, weight = inputs()
    made: list[list[StorageWeakRef]] = []
    alive: list[bool] = []

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        found = x.cos(), x.sin(), x.tan()
        made.append([StorageWeakRef(y.untyped_storage()) for y in found])
        return found

    class Between(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            alive.extend(not y.expired() for y in made[-1])
            return grad

    with remaking():
        first, second, _ = remade(outputs, x)
        inner = Between.apply(second @ weight)
        loss = (first @ inner.mT).sum()
    del first, second, inner, _
    found = torch.autograd.grad(loss, [x, weight])
    assert len(made) == 2
    assert alive == [False, True, False]  # nobody reads the third
    expected = torch.autograd.grad((x.cos() @ (x.sin() @ weight).mT).sum(), [x, weight])
    torch.testing.assert_close(found, expected)


def test_hooks_outside_see_what_it_is_made_of_and_all_else_that_is_kept() -> None:
    x, gain, weight = inputs()

    def run() -> Tensor:
        with remaking():
            return readers(x, gain, weight)

    plain, less = (saved_tensors(f, [gain, weight]) for f in (lambda: readers(*inputs()), run))
    assert sorted(one.shape for one in less) == [(6, 4), (6, 4)]  # x and the exponential
    assert len(plain) > len(less) + 1


def test_inside_a_recomputed_function_nothing_more_is_kept() -> None:
    x, gain, weight = inputs()

    def inner(*arguments: Tensor) -> Tensor:
        with remaking():
            return readers(*arguments)

    def run() -> Tensor:
        return recomputed(inner, x, gain, weight)

    assert [one.shape for one in saved_tensors(run, [gain, weight])] == [(6, 4)]
    expected = torch.autograd.grad(readers(x, gain, weight), (x, gain, weight))
    for one, two in zip(torch.autograd.grad(run(), (x, gain, weight)), expected, strict=True):
        assert torch.equal(one, two)


def test_what_is_made_of_something_remade_keeps_only_the_first() -> None:
    x, gain, weight = inputs()

    def chain() -> Tensor:
        y = remade(norm, x, gain)
        return (remade(norm, y, gain) @ weight).sum()

    def run() -> Tensor:
        with remaking():
            return chain()

    assert [one.shape for one in saved_tensors(run, [gain, weight])] == [(6, 4)]
    expected = torch.autograd.grad(chain(), (x, gain, weight))
    for one, two in zip(torch.autograd.grad(run(), (x, gain, weight)), expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("region", [remaking, nullcontext])
def test_an_argument_handed_through_and_a_call_outside_are_kept(region: Any) -> None:
    x, _, weight = inputs()
    handed, outside = Counted(lambda x: x.view(4, 6)), Counted(lambda x: x + 1)
    with region():
        loss = (weight @ remade(handed, x)).sum()
    loss = loss + (remade(outside, x) @ weight).sum()
    loss.backward()
    assert handed.calls == outside.calls == 1


def test_a_region_goes_on_behind_one_inside_it() -> None:
    x, gain, weight = inputs()
    made = Counted(norm)
    with remaking():
        with pytest.raises(ZeroDivisionError), remaking():
            raise ZeroDivisionError
        loss = readers(x, gain, weight, made)
    loss.backward()
    assert made.calls == 2
