"""Attention of one token of every branch, over a text whose place is data: what a decode pass needs
that is replayed for other texts than the one it was captured with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_kernels.host import without_waiting


@dataclass(frozen=True)
class TextPlaces:
    """Where the keys and values lie of the text that each stream has left.

    table [R, 3], int64: the addresses of the first token's key and value, and how many tokens the
    stream has behind it.  ``strides``: of keys a token and a head, then of values, in elements;
    ``alignment``: bytes that all addresses of keys divide by, at most 16, and of values.  Whoever
    has the table keeps the text.
    """

    table: Tensor
    strides: tuple[int, int, int, int]
    alignment: tuple[int, int]

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, rows: Sequence[int], limit: Sequence[int]
    ) -> TextPlaces:
        """Stream r has left row rows[r] of the text [B,S,kv_heads,dim] after limit[r] tokens; each
        head's numbers are side by side."""
        assert keys.stride(-1) == values.stride(-1) == 1
        places = [[_address(x, row) for row in rows] for x in (keys, values)]
        table = torch.tensor([*places, limit], dtype=torch.long).T.contiguous()
        steps = [x.stride(1) * x.element_size() for x in (keys, values)]
        alignment = [
            math.gcd(16, step, *of_rows) for step, of_rows in zip(steps, places, strict=True)
        ]
        return cls(
            without_waiting(table, keys.device),
            (keys.stride(1), keys.stride(2), values.stride(1), values.stride(2)),
            (alignment[0], alignment[1]),
        )


def decode_attention(
    q: Tensor, own: tuple[Tensor, ...], count: Tensor, text: TextPlaces, *, window: int | None
) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v of one token of every stream, over what it has behind it of its
    text and the ``count`` [1] first of its ``own`` keys and values [R,N,kv_heads,dim], the last of
    which are the token's; the ``window`` last of them all, None: all.

    q [R,1,heads,dim].  Returns the same.  There are kernels alone: torch reads no addresses.
    """
    raise NotImplementedError


def _address(x: Tensor, row: int) -> int:
    return x.data_ptr() + row * x.stride(0) * x.element_size()
