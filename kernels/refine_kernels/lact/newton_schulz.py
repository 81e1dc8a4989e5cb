"""Approximate orthogonalisation of a matrix by five Newton-Schulz steps (Muon).

Each step uses its own coefficients, as LaCT does; they push the singular values towards one
without converging exactly.  The reference casts to bfloat16 here; the dtype is the caller's.

Both ways are made of few operations, which can be had in more than one form: the norm, symmetric
products, and sums of products with the matrices themselves.
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

EPS = 1e-7  # added to the norm


class Operations(NamedTuple):
    """Of batches of matrices; see the functions below."""

    normalised: Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
    normalised_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    symmetric: Callable[..., Tensor]
    combined: Callable[..., Tensor]


def normalised(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / (|x|_F + 1e-7) in ``dtype`` and |x|_F [N,1,1], of x [N,i,j]."""
    x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / (norm + EPS), norm


def normalised_gradient(grad: Tensor, y: Tensor, norm: Tensor) -> Tensor:
    """That of x: of y = x / q with q = |x| + eps it is (dy - <dy, y> q / |x| y) / q, of zeros
    dy / q."""
    length = norm + EPS
    along = torch.linalg.vecdot(grad.flatten(1), y.flatten(1))[:, None, None]
    along = along * length / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.addcmul(grad, along, y, value=-1) / length


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


BY_LIBRARY = Operations(normalised, normalised_gradient, symmetric, combined)


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """X = G / (|G|_F + 1e-7), then X <- a X + (b A + c A^2) X with A = X X^T, five times.

    matrix [..., rows, cols], one or more; computed in ``dtype`` (None: its own), returned in its
    own dtype.  Differentiable once.
    """
    x = _NewtonSchulz.apply(matrix.flatten(0, -3), dtype or matrix.dtype)
    return x.to(matrix.dtype).reshape(matrix.shape)


class _NewtonSchulz(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        found, kept = steps(x, dtype)
        ctx.save_for_backward(*kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return steps_backward(ctx.saved_tensors, grad), None


def steps(
    x: Tensor, dtype: torch.dtype, operations: Operations = BY_LIBRARY
) -> tuple[Tensor, list[Tensor]]:
    """The norm and the five steps of x [N, rows, cols] in ``dtype``, and what the backward
    needs."""
    y, norm = operations.normalised(x, dtype)
    x = _wide(y)
    kept = [y, norm]
    for a, b, c in COEFFICIENTS:
        gram = operations.symmetric(x)
        polynomial = operations.symmetric(gram, base=gram, beta=b, alpha=c)
        kept += [x, gram, polynomial]
        x = operations.combined(x, polynomial, beta=a)
    return _as(y, x), kept


def steps_backward(
    kept: Sequence[Tensor], grad: Tensor, operations: Operations = BY_LIBRARY
) -> Tensor:
    """The gradient of x, in the dtype of the steps.  Of a step with P = b A + c A^2 and G the
    gradient of its result, that of P is G X^T.  A and P are symmetric, so with
    Q = G X^T + X G^T what comes to X through A is S X with S = b Q + c (Q A + A Q), and
    dX = a G + P G + S X: four products, autograd has six."""
    y, norm, *kept = kept
    grad = _wide(grad.to(y.dtype))
    for i in reversed(range(len(COEFFICIENTS))):
        (a, b, c), (x, gram, polynomial) = COEFFICIENTS[i], kept[3 * i : 3 * i + 3]
        q = operations.symmetric(grad, x)
        s = operations.symmetric(q, gram, base=q, beta=b, alpha=c)
        grad = operations.combined(grad, polynomial, beta=a, s=s, y=x)
    return operations.normalised_gradient(_as(y, grad), y, norm)


def _wide(x: Tensor) -> Tensor:
    """[N, rows, cols] transposed if they are tall: A is square in the shorter side."""
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _as(y: Tensor, x: Tensor) -> Tensor:
    """x, which `_wide` may have transposed, as y."""
    return x if x.shape == y.shape else x.mT
