"""Streams that share rows of a tensor: branches their text, or fast weights."""

from collections.abc import Sequence

from torch import Tensor

from refine_kernels.host import to_device


def take_streams(x: Tensor, indices: Sequence[int]) -> Tensor:
    """x [R, ...] at the given streams; x itself if that is all of them in order."""
    if list(indices) == list(range(x.shape[0])):
        return x
    return x.index_select(0, to_device(indices, x.device))


class StreamGroups:
    """Lays R streams out by the shared row each belongs to, so that a row's streams meet its
    tensors in one product.

    `gather` turns [R, T, ...] into [rows, M * T, ...] (M: most streams of one row, short rows
    padded with a repeat), `scatter` undoes it.
    """

    def __init__(self, rows: Sequence[int], num_rows: int) -> None:
        members: list[list[int]] = [[] for _ in range(num_rows)]
        slot = []
        for stream, row in enumerate(rows):
            slot.append(len(members[row]))
            members[row].append(stream)
        self.num_rows = num_rows
        self.per_row = max(map(len, members))
        padded = [m + [m[0] if m else 0] * (self.per_row - len(m)) for m in members]
        order = [stream for row in padded for stream in row]
        self._order = order
        self._places = [row * self.per_row + place for row, place in zip(rows, slot, strict=True)]

    def gather(self, x: Tensor) -> Tensor:
        x = take_streams(x, self._order)
        return x.reshape(self.num_rows, self.per_row * x.shape[1], *x.shape[2:])

    def scatter(self, y: Tensor) -> Tensor:
        y = y.reshape(self.num_rows * self.per_row, y.shape[1] // self.per_row, *y.shape[2:])
        return take_streams(y, self._places)
