"""What stands between LaCT's matrix products, each in one form or another: between those of its
fast network f(x) = w1 (silu(w0 x) * (w2 x)), between those of an update's gradients, and after
Newton-Schulz.

Products come in as they were rounded and are computed with in at least float32; results go into
products, which round them to what they take.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact.fast_weights import scale_to_norm


class Moved(NamedTuple):
    """A fast weight after a step, with prenorm the factors of its rows, and, where a form makes
    that too, the weight as products take it."""

    weight: Tensor
    scale: Tensor | None
    operand: Tensor | None


class Forms(NamedTuple):
    """All of them; ``dtype`` is what the products round to."""

    hidden: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    factors: Callable[..., tuple[Tensor, Tensor, Tensor]]
    moved: Callable[..., Moved]


def hidden(z: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(z) h, of z = w0 x and h = w2 x."""
    z, h = _widened(z, h)
    return F.silu(z) * h


def factors(
    z: Tensor, h: Tensor, d_hidden: Tensor, lr: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """eta0 d h silu'(z), eta1 silu(z) h and eta2 d silu(z), of z, h and d = w1^T v [B,n,T,dh] and
    the rates lr [B,T,n,3]: each is one factor of the gradient of w0, w1 and w2."""
    z, h, d_hidden = _widened(z, h, d_hidden)
    eta0, eta1, eta2 = lr.transpose(1, 2).to(z.dtype).split(1, -1)
    sigma = z.sigmoid()
    silu = z * sigma
    d_z = eta0 * d_hidden * h * (sigma + silu * (1 - sigma))
    return d_z, eta1 * silu * h, eta2 * d_hidden * silu


def moved(
    weight: Tensor, step: Tensor, norm: Tensor, dtype: torch.dtype, *, prenorm: bool
) -> Moved:
    """weight + step [B,n,rows,columns], each row brought to its ``norm`` [B or 1,n,rows,1]; with
    prenorm as it is, and beside it the factors that would, [B,n,rows,1]."""
    weight = weight + step
    scale = scale_to_norm(weight, norm)
    return Moved(weight, scale, None) if prenorm else Moved(weight * scale, None, None)


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(x.to(wide) for x in tensors)


BY_TORCH = Forms(hidden, factors, moved)
