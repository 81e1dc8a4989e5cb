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

    hidden: Callable[[Tensor, torch.dtype], Tensor]
    factors: Callable[..., tuple[Tensor, Tensor]]
    moved: Callable[..., Moved]


def hidden(zh: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(z) h, of z = w0 x and h = w2 x side by side."""
    z, h = _widened(zh).chunk(2, -1)
    return F.silu(z) * h


def factors(zh: Tensor, d_hidden: Tensor, lr: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One factor of the gradients of w0 and w2, side by side [B,n,T,2dh], and of that of w1:

    eta0 d h silu'(z) and eta2 d silu(z); eta1 silu(z) h,

    of z and h [B,n,T,2dh], d = w1^T v [B,n,T,dh] and the rates lr [B,T,n,3]."""
    zh, d_hidden = _widened(zh), _widened(d_hidden)
    z, h = zh.chunk(2, -1)
    eta0, eta1, eta2 = lr.transpose(1, 2).to(zh.dtype).split(1, -1)
    sigma = z.sigmoid()
    silu = z * sigma
    d_z = eta0 * d_hidden * h * (sigma + silu * (1 - sigma))
    return torch.cat((d_z, eta2 * d_hidden * silu), -1), eta1 * silu * h


def moved(
    weight: Tensor, step: Tensor, norm: Tensor, dtype: torch.dtype, *, prenorm: bool
) -> Moved:
    """weight + step [B,n,rows,columns], each row brought to its ``norm`` [B or 1,n,rows,1]; with
    prenorm as it is, and beside it the factors that would, [B,n,rows,1]."""
    weight = weight + step
    scale = scale_to_norm(weight, norm)
    return Moved(weight, scale, None) if prenorm else Moved(weight * scale, None, None)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


BY_TORCH = Forms(hidden, factors, moved)
