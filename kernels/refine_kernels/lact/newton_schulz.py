"""Approximate orthogonalisation of a matrix by five Newton-Schulz steps (Muon).

Each step uses its own coefficients, as LaCT does; they push the singular values towards one
without converging exactly.  The reference casts to bfloat16 here; the dtype is the caller's.
"""

from typing import Any

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


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """X = G / (|G|_F + 1e-7), then X <- a X + (b A + c A^2) X with A = X X^T, five times.

    matrix [..., rows, cols], one or more; computed in ``dtype`` (None: its own), returned in its
    own dtype.  Differentiable once.
    """
    x = matrix.to(dtype or matrix.dtype).flatten(0, -3)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        # A is square in the shorter side.
        x = x.transpose(-1, -2)
    x = _Iterations.apply(x)
    if tall:
        x = x.transpose(-1, -2)
    return x.to(matrix.dtype).view(matrix.shape)


class _Iterations(torch.autograd.Function):
    """Norm and the five steps of [N, rows, cols]; the backward has four products a step, autograd's
    six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        length = norm + _EPS
        x = x / length
        kept = [norm, length]
        for a, b, c in COEFFICIENTS:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            kept += [x, gram, polynomial]
            x = torch.baddbmm(x, polynomial, x, beta=a)
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """With P = b A + c A^2 and G the gradient of a step's result, that of P is G X^T.  A and P
        are symmetric, so with Q = G X^T + (G X^T)^T what comes to X through A is S X with
        S = N + N^T, N = b/2 Q + c Q A, and dX = a G + P G + S X."""
        norm, length, *kept = ctx.saved_tensors
        for i in reversed(range(len(COEFFICIENTS))):
            (a, b, c), (x, gram, polynomial) = COEFFICIENTS[i], kept[3 * i : 3 * i + 3]
            q = grad @ x.mT
            q = q + q.mT
            n = torch.baddbmm(q, q, gram, beta=b / 2, alpha=c)
            grad = torch.baddbmm(grad, polynomial, grad, beta=a)
            grad = torch.baddbmm(grad, n + n.mT, x)
        # of Y = G / q with q = |G| + eps: (dY - <dY, Y> q / |G| Y) / q, of zeros dY / q
        y, smallest = kept[0], torch.finfo(norm.dtype).tiny
        along = (grad * y).sum((-2, -1), keepdim=True) * length / norm.clamp_min(smallest)
        return torch.addcmul(grad, along, y, value=-1) / length
