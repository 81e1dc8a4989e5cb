"""Products that are added to a sum which may be wider than their factors, such as a gradient that
gathers in float32."""

import functools
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [i, k] += a [i, j] b [j, k]: in one product where torch has it, otherwise the product
    is rounded to the dtype of a and b and then added."""
    if multiplies_into(a.dtype, total.dtype, total.device):
        _add_product_(total, a, b)
    else:
        total += a @ b


@functools.cache
def multiplies_into(dtype: torch.dtype, total: torch.dtype, device: torch.device) -> bool:
    """Whether torch adds products of one dtype to sums of another here, as a small one shows."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    sums = torch.ones(16, 16, dtype=total, device=device)
    try:
        _add_product_(sums, ones, ones)
    except (RuntimeError, TypeError):  # not here, or not yet in this torch
        logger.info("torch has no product of %s added to %s on %s", dtype, total, device)
        return False
    return bool((sums == 17).all())


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
