"""How every Triton kernel is run and gets its memory: the one place to watch them from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel; ``constants`` are its compile-time arguments, warps and stages."""
    kernel[grid](*arguments, **constants)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory whose every element a kernel writes before it is read."""
    return torch.empty(shape, dtype=dtype, device=device)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where not everything but its last dimension begins at multiples of 16 bytes, as
    the libraries' kernels load it: a projection among others may lie anywhere."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    if x.stride(-1) == 1 and all(place % 16 == 0 for place in (*steps, x.data_ptr())):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension's numbers side by side, which is how kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()
