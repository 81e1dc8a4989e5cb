"""Approximate orthogonalisation of a matrix by five Newton-Schulz steps (Muon).

Each step uses its own coefficients, as LaCT does; they push the singular values towards one
without converging exactly.  The reference casts to bfloat16 here; the dtype is the caller's.
"""

import torch
from torch import Tensor

COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """X = G / (|G|_F + 1e-7), then X <- a X + (b A + c A^2) X with A = X X^T, five times.

    matrix [..., rows, cols], one or more; computed in ``dtype`` (None: its own), returned in its
    own dtype.  Differentiable.
    """
    x = matrix.to(dtype or matrix.dtype).flatten(0, -3)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        # A is square in the shorter side.
        x = x.transpose(-1, -2)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.transpose(-1, -2)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.transpose(-1, -2)
    return x.to(matrix.dtype).view(matrix.shape)
