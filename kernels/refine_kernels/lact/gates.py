"""What stands between the products of LaCT's fast network, f(x) = w1 (silu(w0 x) * (w2 x)), and
between those of the gradients of an update.

The results go into products, which round them to what they take.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GateForms(NamedTuple):
    """Both, in one form or another; ``dtype`` is what the products round to."""

    hidden: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    factors: Callable[..., tuple[Tensor, Tensor, Tensor]]


def hidden(z: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(z) h, of z = w0 x and h = w2 x."""
    return F.silu(z) * h


def factors(
    z: Tensor, h: Tensor, d_hidden: Tensor, lr: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """eta0 d h silu'(z), eta1 silu(z) h and eta2 d silu(z), of z, h and d = w1^T v [B,n,T,dh] and
    the rates lr [B,T,n,3]: each is one factor of the gradient of w0, w1 and w2."""
    eta0, eta1, eta2 = lr.transpose(1, 2).to(z.dtype).split(1, -1)
    sigma = z.sigmoid()
    silu = z * sigma
    d_z = eta0 * d_hidden * h * (sigma + silu * (1 - sigma))
    return d_z, eta1 * silu * h, eta2 * d_hidden * silu


BY_TORCH = GateForms(hidden, factors)
