"""Matrix products of whole chunks, in the precision a run asks for.

The published code runs them under autocast, in the dtype of the tokens; what it keeps in float32
(states, rates, norms, sums over updates) is float32 here whatever the products are.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """a [..., i, j], b [..., j, k] -> a b [..., i, k]: all three in ``operands``, to which it
    rounds; what adds up over chunks is in ``states``."""

    operands: torch.dtype
    states: torch.dtype
    tf32: bool = False

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.to(self.operands), b.to(self.operands)
        if self.tf32:
            if a.is_cuda and self.operands == torch.float32:
                return _TF32Product.apply(a, b)
            _log_no_tf32(a.device.type, self.operands)
        return a @ b

    def added(self, base: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """base + a b, of batches [B,n,...]; no base is zeros.  Without gradients of its own."""
        if base is None:
            return self(a, b)
        a, b = a.to(self.operands), b.to(self.operands)
        with _tf32() if self.tf32 else nullcontext():
            out = torch.baddbmm(*(x.flatten(0, 1) for x in (base.to(self.operands), a, b)))
        return out.view(base.shape)


def product_in(precision: Precision | None, tokens: torch.dtype, states: torch.dtype) -> Product:
    """The product of operands in the dtype of ``precision``: bfloat16, float32 (that of the states
    if wider), tf32 (on CUDA; elsewhere float32), or None for that of the tokens."""
    compute = torch.promote_types(torch.promote_types(tokens, states), torch.float32)
    if precision in (None, "bfloat16"):
        return Product(tokens if precision is None else torch.bfloat16, compute)
    return Product(compute, compute, tf32=precision == "tf32")


@functools.cache
def _log_no_tf32(device_type: str, dtype: torch.dtype) -> None:
    logger.warning(
        "no tf32 products of %s on %s: LaCT's chunk products run in full precision",
        str(dtype).removeprefix("torch."),
        device_type,
    )


@contextmanager
def _tf32() -> Iterator[None]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _TF32Product(torch.autograd.Function):
    """a b, and both gradients, in tf32: autograd's own products would run after the setting has
    gone back."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with _tf32():
            return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        with _tf32():
            grad_a, grad_b = grad @ b.transpose(-1, -2), a.transpose(-1, -2) @ grad
        return grad_a.sum_to_size(a.shape), grad_b.sum_to_size(b.shape)
