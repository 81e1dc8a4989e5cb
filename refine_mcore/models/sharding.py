"""A model's parameters, or anything of their shape such as gradients, under their checkpoint
keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from torch import Tensor

from refine_mcore import compat
from refine_mcore.models.fast_weight_model import FastWeightModel


def main_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient that has gathered in Megatron's buffer."""
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def sharded_tensors(
    model: FastWeightModel, of: Callable[[torch.nn.Parameter], Tensor] = lambda p: p.data
) -> list[ShardedTensor]:
    """This rank's shards of `of(parameter)` for all parameters; writing to a shard's `.data` writes
    its source."""
    sharded = model.sharded_state_dict(metadata=compat.checkpoint_metadata())
    for entry in nested_values(sharded):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            entry.data = of(entry.data)
    apply_factories(sharded)
    return [entry for entry in nested_values(sharded) if isinstance(entry, ShardedTensor)]


def full_tensors(
    model: FastWeightModel, of: Callable[[torch.nn.Parameter], Tensor] = lambda p: p.data
) -> dict[str, Tensor]:
    """Whole tensors by checkpoint key on rank 0 (empty elsewhere), joined from the shards of all
    ranks.

    Every rank calls it. Meant for inspection: rank 0 holds everything at once.
    """
    local = [
        (shard.key, shard.global_shape, shard.global_slice(), shard.data.cpu())
        for shard in sharded_tensors(model, of)
    ]
    first = dist.get_rank() == 0
    gathered: list = [None] * dist.get_world_size() if first else []
    if dist.get_world_size() == 1:
        gathered = [local]
    else:
        dist.gather_object(local, gathered if first else None)
    full: dict[str, Tensor] = {}
    for shards in gathered:
        for key, shape, where, data in shards:
            full.setdefault(key, data.new_empty(shape))[where] = data
    return full
