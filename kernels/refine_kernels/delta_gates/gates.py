"""How strongly a token of a delta rule writes, and how much it lets decay, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def delta_gates(
    b: Tensor,
    a: Tensor | None = None,
    bias: Tensor | None = None,
    log_rate: Tensor | None = None,
    *,
    doubled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """beta = sigmoid(b), twice that if ``doubled``, and g = -exp(log_rate) softplus(a + bias), None
    without a.

    b, a [..., H]; bias and log_rate [H].  Computed and returned in at least float32.
    """
    dtype = torch.promote_types(b.dtype, torch.float32)
    beta = torch.sigmoid(b.to(dtype))
    beta = beta * 2 if doubled else beta
    if a is None:
        return beta, None
    assert bias is not None and log_rate is not None
    return beta, -log_rate.to(dtype).exp() * F.softplus(a.to(dtype) + bias.to(dtype))
