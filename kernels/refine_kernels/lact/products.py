"""Matrix products of whole chunks, in the precision a run asks for.

The published code runs them under autocast, in the dtype of the tokens; what it keeps in float32
(states, rates, norms, sums over updates) is float32 here whatever the products are.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Product:
    """a [..., i, j], b [..., j, k] -> a b [..., i, k]: all three in ``operands``, to which it
    rounds; what adds up over chunks is in ``states``.  Gradients are written out by those who
    multiply: autograd's own products would run after the setting of TF32 has gone back."""

    operands: torch.dtype
    states: torch.dtype
    tf32: bool = False

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        with self._setting(a.device):
            return a.to(self.operands) @ b.to(self.operands)

    def added(self, base: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """base + a b, of batches [B,n,...]; no base is zeros."""
        if base is None:
            return self(a, b)
        with self._setting(a.device):
            out = torch.baddbmm(*(x.to(self.operands).flatten(0, 1) for x in (base, a, b)))
        return out.view(base.shape)

    def _setting(self, device: torch.device) -> AbstractContextManager[None]:
        if not self.tf32:
            return nullcontext()
        if device.type != "cuda" or self.operands != torch.float32:
            _log_no_tf32(device.type, self.operands)
        return _tf32()  # of which others take no notice


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
