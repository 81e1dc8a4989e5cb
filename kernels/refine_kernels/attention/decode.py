"""Attention of one token of every branch, over a text whose place is data: what a decode pass needs
that is replayed for other texts than the one it was captured with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_kernels import launch
from refine_kernels.host import without_waiting


@dataclass(frozen=True)
class TextPlaces:
    """Where the keys and values lie of the text that each stream has left.

    table [R, 3], int64: the addresses of the first token's key and value, and how many tokens the
    stream has behind it.  ``strides``: of keys a token and a head, then of values, in elements;
    ``alignment``: of keys and of values (launch.alignment).  Whoever has the table keeps the text.
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
        assert (keys.dtype, keys.shape, keys.device) == (values.dtype, values.shape, values.device)
        of_keys, of_values = _addresses(keys, rows), _addresses(values, rows)
        table = torch.tensor([of_keys, of_values, limit], dtype=torch.long).T.contiguous()
        return cls(
            without_waiting(table, keys.device),
            (keys.stride(1), keys.stride(2), values.stride(1), values.stride(2)),
            (launch.alignment(keys), launch.alignment(values)),
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


def _addresses(x: Tensor, rows: Sequence[int]) -> list[int]:
    first, step = x.data_ptr(), x.stride(0) * x.element_size()
    return [first + row * step for row in rows]
