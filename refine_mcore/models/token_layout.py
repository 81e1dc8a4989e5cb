"""How T tokens of R streams lie on Megatron's sequence axis.

Every hidden state between layers is [s, 1, h] with the streams end to end: texts in a training
forward, branches in a rollout. So sequence parallelism, which cuts that axis into equal parts,
needs no case of its own for either: tokens are padded behind the last one (which nothing reads, all
layers being causal) to a multiple of the tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from refine_mcore.models.packing import Packing


@dataclass(frozen=True)
class TokenLayout:
    """`length` tokens of each of `streams` streams; `parts` is the number of ranks that the
    sequence axis is cut over, 1 without sequence parallelism. Streams that are texts may hold
    documents, each for itself: then `packing` says how they go through a mixer."""

    streams: int
    length: int
    parts: int = 1
    packing: Packing | None = None

    @property
    def local_tokens(self) -> int:
        """Tokens that one rank holds between tensor-parallel blocks, padding included."""
        return -(-self.streams * self.length // self.parts)

    def join(self, x: Tensor) -> Tensor:
        """[R, T, ...] -> [R * T (padded), 1, ...]: the streams end to end."""
        x = x.reshape(self.streams * self.length, 1, *x.shape[2:])
        missing = self.local_tokens * self.parts - x.shape[0]
        return F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) if missing else x

    def split(self, x: Tensor) -> Tensor:
        """The inverse of `join`."""
        tokens = self.streams * self.length
        if x.shape[0] > tokens:  # else the backward of the slice would copy the gradient
            x = x[:tokens]
        return x.reshape(self.streams, self.length, *x.shape[2:])
