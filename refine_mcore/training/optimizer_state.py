"""How the optimizer's state lies in checkpoints: each rank's own share, under the names and in the
coordinates of the model's tensors.

Megatron's sharded optimizer holds on each data-parallel rank a flat range of every parameter. Its
own formats either gather all of it on every rank first (`fully_reshardable`), or load at the same
layout only (`dp_reshardable`). Here a flat range is cut into boxes of the tensor it is a part of,
which `torch_dist` stores and reads at any layout: nothing is gathered, nothing is copied, and a
rank that resumes where it saved reads back exactly what it wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from refine_mcore import compat

_SHARES = "param_state"


def sharded_optimizer_state(
    optimizer: Any, weights: ShardedStateDict, *, is_loading: bool
) -> dict[str, Any]:
    """What a checkpoint keeps of a Megatron optimizer, of the model whose `sharded_state_dict` is
    `weights`. Tensors of a sharded optimizer are its own: loading writes them."""
    compat.prime_optimizer(optimizer)  # before its first step it has no state to list
    sharded = _as_sharded(optimizer)
    if sharded is None:
        return optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=compat.checkpoint_metadata()
        )
    return {**sharded.state_dict(), _SHARES: list(_shares(sharded, weights))}


def load_optimizer_state(optimizer: Any, template: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Take over the state that was loaded for `template`, which `sharded_optimizer_state` made."""
    if _as_sharded(optimizer) is not None:
        for own, value in zip(template.pop(_SHARES), loaded.pop(_SHARES), strict=True):
            own.data.copy_(value)  # itself, unless another rank read it
    optimizer.load_state_dict(loaded)


def fill_main_weights(optimizer: Any, values: Mapping[Tensor, Tensor]) -> None:
    """Copy exact values of whole parameters into the optimizer's fp32 main weights, where it keeps
    such beside the parameters themselves."""
    sharded = _as_sharded(optimizer)
    for parameter, value in values.items():
        main = getattr(parameter, "main_param", None)
        if main is None:  # is its own, or other ranks have all of it
            continue
        flat = value.view(-1)
        if sharded is not None:
            own = sharded._get_model_param_range_map(parameter)["param"]
            flat = flat[own.start : own.end]
        main.data.view(-1).copy_(flat)


def _as_sharded(optimizer: Any) -> DistributedOptimizer | None:
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return part if isinstance(part, DistributedOptimizer) else None


def _shares(optimizer: DistributedOptimizer, weights: ShardedStateDict) -> Iterator[ShardedTensor]:
    """All boxes of this rank's ranges of master weights and moments."""
    entries = {entry.data: entry for entry in nested_values(weights) if hasattr(entry, "data")}
    for buckets in optimizer.gbuf_ranges:
        for bucket in (bucket for of_dtype in buckets.values() for bucket in of_dtype):
            for parameter, ranges in bucket["param_map"].items():
                start, stop = ranges["param"].start, ranges["param"].end
                state = optimizer._get_main_param_and_optimizer_states(parameter)
                state.pop("step", None)  # one for all parameters, kept with the groups
                for tensor, first in _tensors(entries[parameter], parameter):
                    low, high = max(start, first), min(stop, first + tensor.data.numel())
                    if low >= high:
                        continue
                    for name, flat in state.items():
                        share = flat.detach()[low - start : high - start]
                        yield from _boxes_of(tensor, f"optimizer.state.{name}.", share, low - first)


def _tensors(
    entry: ShardedTensor | ShardedTensorFactory, parameter: Tensor
) -> Iterator[tuple[ShardedTensor, int]]:
    """The tensors that a checkpoint makes of a parameter, and where each begins in it."""
    parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
    for tensor in nested_values({"": parts}):
        assert tensor.data.is_contiguous() and tensor.prepend_axis_num == 0
        yield tensor, tensor.data.storage_offset() - parameter.storage_offset()


def _boxes_of(
    tensor: ShardedTensor, prefix: str, flat: Tensor, start: int
) -> Iterator[ShardedTensor]:
    """`flat`, which begins at entry `start` of `tensor`, as boxes of it."""
    done = 0
    for box in boxes(tensor.local_shape, start, start + len(flat)):
        size = math.prod(box.shape)
        data = flat[done : done + size].view(box.shape)
        done += size
        offset = tuple(a + b for a, b in zip(tensor.global_offset, box.offset, strict=True))
        yield replace(
            tensor,
            key=prefix + tensor.key,
            data=data,
            dtype=data.dtype,
            local_shape=box.shape,
            global_offset=offset,
            axis_fragmentations=None,
            # of the data-parallel ranks none but this one has it
            replica_id=(*tensor.replica_id[:2], 0),
        )


class Box(NamedTuple):
    """Entries [offset, offset + shape) of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Entries [start, stop) of a tensor, counted row by row, as boxes in that order: the end of a
    row, whole rows, the beginning of a row, and so on inwards."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    size = math.prod(shape[1:])
    row, first = divmod(start, size)
    rows = 0 if first else (stop - start) // size
    end = (row + (rows or 1)) * size
    if rows:
        yield Box((row, *(0 for _ in shape[1:])), (rows, *shape[1:]))
    else:
        for offset, inner in boxes(shape[1:], first, min(stop, end) - row * size):
            yield Box((row, *offset), (1, *inner))
    yield from boxes(shape, end, stop)
