"""Short texts packed whole into rows of one length, each with a state of its own in the model
(models/packing.py).

Best-fit decreasing (Ding et al. 2024, arXiv 2404.10830): longest first, each into the fullest row
that still holds it. No text is cut for it, and hardly a token of a row is left empty.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which texts go into each row of `size` tokens, by their numbers; a function of the lengths
    alone. None may be longer than a row."""
    rows: list[list[int]] = []
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # so many tokens left
    left: list[int] = []  # the numbers of tokens that rows have left, in order
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        length = lengths[text]
        assert 0 < length <= size
        place = bisect_left(left, length)
        if place == len(left):
            room, row = size, len(rows)
            rows.append([])
        else:
            room = left[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del left[place]
        rows[row].append(text)
        room -= length
        if not rows_with[room]:
            insort(left, room)
        rows_with[room].append(row)
    return rows


def packed(rows: Sequence[Sequence[npt.ArrayLike]], length: int) -> dict[str, Tensor]:
    """The texts of each row one behind the other: `tokens` [b, length] with zeros behind, `mask` of
    those that are a text's, `documents` the number of each token's text; of the zeros that of the
    last one."""
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    documents = torch.zeros_like(tokens)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, texts in enumerate(rows):
        parts = [np.asarray(text, dtype=np.int64) for text in texts]
        ids = np.concatenate(parts)
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        mask[row, : len(ids)] = True
        numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        documents[row, : len(ids)] = torch.from_numpy(numbers)
        documents[row, len(ids) :] = len(texts) - 1
    return {"tokens": tokens, "mask": mask, "documents": documents}
