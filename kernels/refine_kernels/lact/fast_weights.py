"""The fast weights of LaCT as plain tuples of tensors, and the norms that bound them."""

from typing import NamedTuple

import torch
from torch import Tensor

ROW_NORM_EPS = 1e-5


class RowNorms(NamedTuple):
    """Row norms of the initial fast weights, [B or 1, n, rows, 1]; differentiable."""

    w0: Tensor
    w1: Tensor
    w2: Tensor


class FastWeights(NamedTuple):
    """f(z) = w1 (silu(w0 z) * (w2 z)) of each stream and fast head, and the momentum buffers.

    w0, w2 [B,n,dh,d]; w1 [B,n,d,dh].  ``momentum`` [B,3,n,dh,d] is that of w0, w1^T and w2; None
    stands for zeros.  With prenorm these are the un-normalised weights, and f has each row times
    its factor in ``scales`` [B,n,rows,1]; None stands for ones: the published code reads the
    initial weights as they are.  ``operands`` are the weights of f once more, as products take
    them; None where those round the others.
    """

    w0: Tensor
    w1: Tensor
    w2: Tensor
    momentum: Tensor | None = None
    scales: tuple[Tensor, Tensor, Tensor] | None = None
    operands: tuple[Tensor, Tensor, Tensor] | None = None

    def row_norms(self) -> RowNorms:
        """The norms nu_a, to be taken of the initial weights."""
        return RowNorms(*(torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in self[:3]))

    def read(self) -> tuple[Tensor, ...]:
        """The tensors that f is made of, for `weights_of`."""
        return self.operands or (*self[:3], *(self.scales or ()))


def weights_of(read: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights w0, w1, w2 that f uses."""
    weights, scales = read[:3], read[3:]
    if not scales:
        return weights
    return tuple(w * scale for w, scale in zip(weights, scales, strict=True))


def scale_to_norm(w: Tensor, norm: Tensor) -> Tensor:
    """What brings each row of w to the given norm, [..., rows, 1]."""
    return norm / (torch.linalg.vector_norm(w, dim=-1, keepdim=True) + ROW_NORM_EPS)
