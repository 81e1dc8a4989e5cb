"""What autograd keeps for the backward of a function, counted by storage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ROOT = Path(__file__).parents[2]
_PROJECT = (str(_ROOT / "refine_mcore"), str(_ROOT / "kernels"))


class Saved(NamedTuple):
    """One storage kept, as first seen: a view of it, and the line of this project that kept it."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str


def saved_bytes(function: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> list[Saved]:
    """Every storage that autograd keeps for the backward of `function()`, the largest first;
    `parameters` are not counted.

    Counted is what goes through `saved_tensors_hooks`, which is all but tensors that a Function
    hangs on its context.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, Saved] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in found:
            saved = Saved(storage.nbytes(), tuple(x.shape), x.dtype, _line())
            found[storage.data_ptr()] = saved
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = function()
    del kept
    return sorted(found.values(), key=lambda saved: -saved.bytes)


def table(saved: list[Saved], tokens: int, rows: int = 20) -> str:
    """The largest tensors kept, in bytes per token: what a test says when there are too many."""
    total = sum(one.bytes for one in saved)
    lines = [f"{total / tokens:,.0f} bytes a token in {len(saved)} tensors, the largest:"]
    for one in saved[:rows]:
        dtype = str(one.dtype).removeprefix("torch.")
        lines.append(f"{one.bytes / tokens:10,.1f}  {dtype:9}{list(one.shape)}  {one.where}")
    return "\n".join(lines)


def _line() -> str:
    """The innermost line of this project on the stack."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PROJECT):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "outside the project"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
