"""The fast weights of LaCT as plain tuples of tensors, and the norms that bound them."""

from typing import NamedTuple

import torch
from torch import Tensor

ROW_NORM_EPS = 1e-5


class RowNorms(NamedTuple):
    """Row norms of the initial fast weights, [B or 1, n, rows, 1]; differentiable."""

    w02: Tensor
    w1: Tensor


class FastWeights(NamedTuple):
    """f(z) = w1 (silu(w0 z) * (w2 z)) of each stream and fast head, and the momentum buffers.

    w02 [B,n,2dh,d] holds the rows of w0, then those of w2, which read the same: one product for
    both; w1 [B,n,d,dh].  ``momentum`` [B,n,3,dh,d] is that of w0, w2 and w1^T; None stands for
    zeros.  ``operands`` are the weights that f reads, as products take them: rounded, and with
    prenorm brought to their rows' norms, which the others then are not.  None where f reads the
    others as they are.
    """

    w02: Tensor
    w1: Tensor
    momentum: Tensor | None = None
    operands: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(
        cls, w0: Tensor, w1: Tensor, w2: Tensor, momentum: Tensor | None = None
    ) -> "FastWeights":
        """w0, w2 [B,n,dh,d]; w1 [B,n,d,dh]."""
        return cls(torch.cat((w0, w2), -2), w1, momentum)

    @property
    def w0(self) -> Tensor:
        return self.w02.chunk(2, -2)[0]

    @property
    def w2(self) -> Tensor:
        return self.w02.chunk(2, -2)[1]

    def row_norms(self) -> RowNorms:
        """The norms nu_a, to be taken of the initial weights."""
        return RowNorms(*(torch.linalg.vector_norm(w, dim=-1, keepdim=True) for w in self[:2]))

    def read(self) -> tuple[Tensor, Tensor]:
        """w02 and w1 as f reads them."""
        return self.operands or (self.w02, self.w1)

    def read_in(self, dtype: torch.dtype) -> "FastWeights":
        """With operands in this dtype; weights that are in it need none."""
        w02, w1 = self.read()
        if w02.dtype == w1.dtype == dtype:
            return self
        return self._replace(operands=(w02.to(dtype), w1.to(dtype)))
