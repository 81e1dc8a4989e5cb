"""How every Triton kernel is run and gets its memory: the one place to watch them from."""

import math
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


def alignment(x: Tensor) -> int:
    """Bytes, at most 16, that the address of every x[..., 0] divides by: what a program may load at
    once.  Triton itself sees whether arguments divide by 16, and nothing of those that do not."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    return math.gcd(16, x.data_ptr(), *steps)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where not everything but its last dimension begins at multiples of 16 bytes, as
    the libraries' kernels load it: a projection among others may lie anywhere."""
    if x.stride(-1) == 1 and alignment(x) == 16:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def dense_rows(x: Tensor) -> Tensor:
    """x with its last dimension's numbers side by side, which is how kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()
