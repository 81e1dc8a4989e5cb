"""Approximate orthogonalisation of a matrix by five Newton-Schulz steps (Muon).

Each step uses its own coefficients, as LaCT does; they push the singular values towards one
without converging exactly.  The reference casts to bfloat16 here; the dtype is the caller's.

Both ways are made of two kinds of products, which can be had in more than one form: symmetric
ones, and sums of products with rectangular matrices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

_EPS = 1e-7


class Products(NamedTuple):
    """Of batches of matrices; see the functions below."""

    symmetric: Callable[..., Tensor]
    combined: Callable[..., Tensor]


def symmetric(
    a: Tensor,
    b: Tensor | None = None,
    *,
    base: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """alpha a a^T, or with b alpha (a b^T + b a^T), [N,i,i] of [N,i,j]; with a symmetric ``base``
    [N,i,i] and beta times it."""
    if b is None:
        if base is None:
            return _scaled(a @ a.mT, alpha)
        return torch.baddbmm(base, a, a.mT, beta=beta, alpha=alpha)
    if base is None:
        half = _scaled(a @ b.mT, alpha)
    else:
        half = torch.baddbmm(base, a, b.mT, beta=beta / 2, alpha=alpha)
    return half + half.mT


def combined(
    x: Tensor, p: Tensor, *, beta: float, s: Tensor | None = None, y: Tensor | None = None
) -> Tensor:
    """beta x + p x, with s and y also + s y: [N,i,j] of p, s [N,i,i] and x, y [N,i,j]."""
    out = torch.baddbmm(x, p, x, beta=beta)
    return out if s is None or y is None else torch.baddbmm(out, s, y)


def _scaled(x: Tensor, alpha: float) -> Tensor:
    return x if alpha == 1 else x * alpha


BY_LIBRARY = Products(symmetric, combined)


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """X = G / (|G|_F + 1e-7), then X <- a X + (b A + c A^2) X with A = X X^T, five times.

    matrix [..., rows, cols], one or more; computed in ``dtype`` (None: its own), returned in its
    own dtype.  Differentiable once.
    """
    x = wide(matrix.to(dtype or matrix.dtype).flatten(0, -3))
    x = _NewtonSchulz.apply(x)
    return unwidened(x, matrix.shape).to(matrix.dtype)


def wide(matrices: Tensor) -> Tensor:
    """[N, rows, cols] transposed if they are tall: A is square in the shorter side."""
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def unwidened(matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """What `wide` made of matrices of this shape, as they were."""
    tall = shape[-2] > shape[-1]
    return (matrices.mT if tall else matrices).reshape(shape)


class _NewtonSchulz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x, kept = steps(x)
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return steps_backward(ctx.saved_tensors, grad)


def steps(x: Tensor, products: Products = BY_LIBRARY) -> tuple[Tensor, list[Tensor]]:
    """Norm and the five steps of [N, rows, cols], no taller than wide, and what the backward
    needs."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    length = norm + _EPS
    x = x / length
    kept = [norm, length]
    for a, b, c in COEFFICIENTS:
        gram = products.symmetric(x)
        polynomial = products.symmetric(gram, base=gram, beta=b, alpha=c)
        kept += [x, gram, polynomial]
        x = products.combined(x, polynomial, beta=a)
    return x, kept


def steps_backward(kept: Sequence[Tensor], grad: Tensor, products: Products = BY_LIBRARY) -> Tensor:
    """Of a step with P = b A + c A^2 and G the gradient of its result, that of P is G X^T.  A and P
    are symmetric, so with Q = G X^T + X G^T what comes to X through A is S X with
    S = b Q + c (Q A + A Q), and dX = a G + P G + S X: four products, autograd has six."""
    norm, length, *kept = kept
    for i in reversed(range(len(COEFFICIENTS))):
        (a, b, c), (x, gram, polynomial) = COEFFICIENTS[i], kept[3 * i : 3 * i + 3]
        q = products.symmetric(grad, x)
        s = products.symmetric(q, gram, base=q, beta=b, alpha=c)
        grad = products.combined(grad, polynomial, beta=a, s=s, y=x)
    # of Y = G / q with q = |G| + eps: (dY - <dY, Y> q / |G| Y) / q, of zeros dY / q
    y, smallest = kept[0], torch.finfo(norm.dtype).tiny
    along = torch.linalg.vecdot(grad.flatten(1), y.flatten(1))[:, None, None]
    along = along * length / norm.clamp_min(smallest)
    return torch.addcmul(grad, along, y, value=-1) / length
