"""The optimizer's state in checkpoints: flat ranges as boxes."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from refine_mcore.training.optimizer_state import boxes


@given(st.data(), st.lists(st.integers(1, 5), min_size=0, max_size=4))
def test_boxes_are_the_range_in_order(data: st.DataObject, shape: list[int]) -> None:
    """Read one after the other they give the entries of the range, and they are few."""
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    entries = torch.arange(size).reshape(shape)
    found = []
    for offset, extent in boxes(tuple(shape), start, stop):
        assert math.prod(extent) > 0
        where = tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))
        found += entries[where].flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(boxes(tuple(shape), start, stop))) <= max(1, 2 * len(shape) - 1)
