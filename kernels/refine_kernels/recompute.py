"""Keeping less for the backward: two ways to make tensors again there.

`recomputed` is for a function whose intermediates are large: it runs again, as a whole, when its
backward begins.  `remade` is for a function that is cheap and whose *output* is large and kept by
whatever reads it, a product or a split: inside `remaking` it is made again when a reader's
backward asks for it, and let go when the last reader has had it.  Products are not run again,
but by those who ask `is_remaking`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

Made = TypeVar("Made", Tensor, tuple[Tensor, ...])


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of whose intermediates autograd keeps nothing.

    Only tensors that stand in ``args`` themselves count as inputs: autograd's hooks see those.  The
    function must draw no random numbers and must not depend on state that changes before the
    backward.
    """
    if not (torch.is_grad_enabled() and any(_needs_gradient(arg) for arg in args)):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def is_remaking() -> bool:
    """Whether this is inside `remaking`: for what makes its own intermediates again there."""
    return _ACTIVE.region is not None


def readable_later(x: Tensor) -> Callable[[], Tensor]:
    """What gives the contents of x once more: x itself, but for an output of `remade` inside the
    innermost `remaking`, which is made again for each call."""
    region = _ACTIVE.region
    return partial(Tensor.detach, x) if region is None else region.later(x.detach())


def _needs_gradient(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.requires_grad


@contextmanager
def remaking() -> Iterator[None]:
    """Where autograd keeps no outputs of `remade`, but what they are made of.

    All else that it keeps goes to the hooks on saved tensors that are in force outside.
    """
    outside = _ACTIVE.region
    region = _ACTIVE.region = _Region()
    try:
        with saved_tensors_hooks(region.pack, region.unpack):
            yield
    finally:
        _ACTIVE.region = outside
        region.recipes.clear()  # whoever reads one holds it


def remade(function: Callable[..., Made], *args: Any) -> Made:
    """``function(*args)``, made again for the backward of what reads it inside the innermost
    `remaking`; kept like any other tensor where there is none.

    The function returns a tensor or a tuple of tensors, which are made again together and let go
    one by one, and gives the same bits again, without communication between ranks.  Its own
    backward is not touched: it should not keep the output.  An output that shares memory with an
    argument is that argument, and kept.
    """
    out = function(*args)
    if _ACTIVE.region is not None and torch.is_grad_enabled():
        _ACTIVE.region.remember((out,) if isinstance(out, Tensor) else out, function, args)
    return out


class _Active(threading.local):
    region: _Region | None = None


_ACTIVE = _Active()


class _Recipe:
    """How tensors are made together, and each of them while some of its readers wait for it."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]], outputs: int) -> None:
        self._make = make
        self._made: dict[int, Tensor] = {}
        self._waiting = [0] * outputs
        self.readers = [0] * outputs

    def made(self) -> tuple[Tensor, ...]:
        """Made again for one who does not count as a reader."""
        with torch.no_grad():
            return self._make()

    def read(self, output: int) -> Tensor:
        if output not in self._made:
            self._made = {i: x for i, x in enumerate(self.made()) if self.readers[i]}
            self._waiting = list(self.readers)
        made = self._made[output]
        self._waiting[output] -= 1
        if self._waiting[output] == 0:
            del self._made[output]
        return made


class _View(NamedTuple):
    """What a reader keeps: a view of one of the tensors that `recipe` makes."""

    recipe: _Recipe
    output: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def tensor(self) -> Tensor:
        return self.recipe.read(self.output).as_strided(self.size, self.stride, self.offset)


class _Region:
    """The recipes of one `remaking`, by the memory of what they make."""

    def __init__(self) -> None:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._pack, self._unpack = hooks or (Tensor.detach, lambda x: x)
        # a weak reference keeps the key from being given out again, and not the memory alive
        self.recipes: dict[int, tuple[StorageWeakRef, _Recipe, int]] = {}

    def remember(
        self, outputs: tuple[Tensor, ...], function: Callable[..., Any], args: tuple[Any, ...]
    ) -> None:
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        is_tensor = [isinstance(arg, Tensor) for arg in args]
        kept = [self.pack(a.detach()) if t else a for a, t in zip(args, is_tensor, strict=True)]

        def make() -> tuple[Tensor, ...]:
            found = function(
                *(self.unpack(k) if t else k for k, t in zip(kept, is_tensor, strict=True))
            )
            return (found,) if isinstance(found, Tensor) else found

        recipe = _Recipe(make, len(outputs))
        for index, out in enumerate(outputs):
            storage = out.untyped_storage()
            if storage._cdata not in given:
                self.recipes[storage._cdata] = StorageWeakRef(storage), recipe, index

    def later(self, x: Tensor) -> Callable[[], Tensor]:
        _, recipe, index = self._recipe_of(x)
        if recipe is None:
            return lambda: x
        size, stride, offset = x.size(), x.stride(), x.storage_offset()
        return lambda: recipe.made()[index].as_strided(size, stride, offset)

    def pack(self, x: Tensor) -> Any:
        _, recipe, index = self._recipe_of(x)
        if recipe is None:
            return self._pack(x)
        recipe.readers[index] += 1
        return _View(recipe, index, x.size(), x.stride(), x.storage_offset())

    def _recipe_of(self, x: Tensor) -> tuple[StorageWeakRef | None, _Recipe | None, int]:
        return self.recipes.get(x.untyped_storage()._cdata, (None, None, 0))

    def unpack(self, kept: Any) -> Tensor:
        return kept.tensor() if isinstance(kept, _View) else self._unpack(kept)
