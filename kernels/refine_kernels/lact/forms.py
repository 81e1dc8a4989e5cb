"""What LaCT computes beside its products of whole chunks, each in one form or another: between
those of its fast network f(x) = w1 (silu(w0 x) * (w2 x)), between those of an update's gradients
and after them, after Newton-Schulz, and in it.

Products come in as they were rounded and are computed with in at least float32; results go into
products, which round them to what they take.  Only `hidden` is differentiated by autograd; the
others stand in a function that has a backward of its own (updates.py), and so have they.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact import newton_schulz
from refine_kernels.lact.fast_weights import ROW_NORM_EPS


class Moved(NamedTuple):
    """A fast weight after a step, and the one that products take, None where that is the same."""

    weight: Tensor
    operand: Tensor | None


Hidden = Callable[[Tensor, torch.dtype], Tensor]


class Forms(NamedTuple):
    """All of them; a ``dtype`` is what the products round to."""

    hidden: Hidden
    factors: Callable[[Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    factors_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]
    accumulated: Callable[..., Tensor]
    accumulated_gradients: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]]
    moved: Callable[..., Moved]
    moved_gradients: Callable[..., tuple[Tensor, Tensor]]
    newton_schulz: newton_schulz.Operations


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


def factors_gradients(
    zh: Tensor, d_hidden: Tensor, lr: Tensor, grad02: Tensor, grad1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of zh, d and lr.  With s = silu(z), s' and s'' its derivatives, and a, b, c the
    gradients of the three factors:

    dz = a eta0 d h s'' + (b eta1 h + c eta2 d) s'
    dh = a eta0 d s' + b eta1 s        deta0 = sum a d h s'      deta1 = sum b s h
    dd = a eta0 h s' + c eta2 s        deta2 = sum c d s
    """
    kind = zh.dtype
    zh, d, grad02, b = (_widened(x) for x in (zh, d_hidden, grad02, grad1))
    (z, h), (a, c) = zh.chunk(2, -1), grad02.chunk(2, -1)
    eta0, eta1, eta2 = lr.transpose(1, 2).to(zh.dtype).split(1, -1)
    sigma = z.sigmoid()
    silu = z * sigma
    slope = sigma + silu * (1 - sigma)
    bend = sigma * (1 - sigma) * (2 + z * (1 - 2 * sigma))
    ad, ah, cd, bh = a * d, a * h, c * d, b * h
    d_z = eta0 * ad * h * bend + (eta1 * bh + eta2 * cd) * slope
    d_h = eta0 * ad * slope + eta1 * b * silu
    d_d = eta0 * ah * slope + eta2 * c * silu
    rates = [ah.mul_(d).mul_(slope), bh.mul_(silu), cd.mul_(silu)]
    d_lr = torch.cat([x.sum(-1, keepdim=True) for x in rates], -1).transpose(1, 2)
    return torch.cat((d_z, d_h), -1).to(kind), d_d.to(kind), d_lr.to(lr.dtype)


def accumulated(
    of_w02: Tensor,
    of_w1: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """M = G + decay M' [B,n,3,dh,d] of w0, w2 and w1^T, from the products of_w02 [B,n,2dh,d] and
    of_w1 [B,n,dh,d]; decay [B,n,1,1,1]; no momentum, only G."""
    total = torch.cat((of_w02, of_w1), 2).to(dtype).unflatten(2, (3, -1))
    if decay is None or momentum is None:
        return total
    return torch.addcmul(total, decay, momentum)


def accumulated_gradients(
    grad: Tensor,
    further: Tensor | None,
    decay: Tensor | None,
    momentum: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of the products, in ``dtype``, of M' and of the decay [B,n,parts], of which
    all parts are to be summed; ``further`` is what else M has."""
    total = plus(grad, further)
    assert total is not None
    of_w02, of_w1 = total[:, :, :2].flatten(2, 3).to(dtype), total[:, :, 2].to(dtype)
    if decay is None or momentum is None:
        return of_w02, of_w1, None, None
    return of_w02, of_w1, decay * total, (total * momentum).sum((-2, -1))


def moved(
    weight: Tensor, step: Tensor, norm: Tensor, dtype: torch.dtype, *, prenorm: bool
) -> Moved:
    """r = weight + step [B,n,rows,columns], each row brought to its ``norm`` [B or 1,n,rows,1];
    with prenorm r itself, and brought to its norms for the products alone."""
    r = weight + step
    scaled = r * (norm / (_lengths(r) + ROW_NORM_EPS))
    if prenorm:
        return Moved(r, scaled.to(dtype))
    return Moved(scaled, None if dtype == scaled.dtype else scaled.to(dtype))


def moved_gradients(
    weight: Tensor,
    step: Tensor,
    norm: Tensor,
    grad: Tensor | None,
    grad_operand: Tensor | None,
    of_step: Tensor,
    *,
    prenorm: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of weight and step, which is one, and that of the norms [B,n,rows,1]; that of
    the step also into ``of_step``, of any dtype and layout.

    With n = |r|, q = n + eps and t the gradient of r norm / q it is t norm / q - <t, r> norm / q^2
    r / n, with prenorm beside that of r itself, and <t, r> / q.  A row of zeros has no direction:
    its r / n is 0."""
    r = weight + step
    length = _lengths(r)
    inverse = 1 / (length + ROW_NORM_EPS)
    t = grad_operand if prenorm else plus(grad, grad_operand)
    t = torch.zeros_like(r) if t is None else t.to(r.dtype)
    along = (t * r).sum(-1, keepdim=True)
    direction = torch.where(length > 0, 1 / length, 0.0)
    found = t * (norm * inverse) - r * (along * norm * inverse * inverse * direction)
    if prenorm and grad is not None:
        found += grad
    of_step.copy_(found)
    return found, along * inverse


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is nothing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _lengths(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


BY_TORCH = Forms(
    hidden,
    factors,
    factors_gradients,
    accumulated,
    accumulated_gradients,
    moved,
    moved_gradients,
    newton_schulz.BY_LIBRARY,
)
