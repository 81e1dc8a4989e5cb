"""Advantages relative to a group of rollouts, as in GRPO.

Which rollouts share a baseline (c positions per sequence, n rollouts per position):
  * `sequence`: the c positions of one sequence, each of the n rollouts per position in a group of
    its own, so n groups of c per sequence. With n = 1 this is the authors' setting, and the
    paper's "rewards from the same sequence are standardized". The spread between easy and hard
    positions stays in the advantage;
  * `position`: the n rollouts of one prefix. The authors' code switches to it as soon as n > 1.
    With n = 1 every group has one member and there is no baseline;
  * `joint`: all c n rollouts of one sequence, which the authors' code never uses. With n = 1 it
    is `sequence`.

Deviation from the authors' code: an all-equal group has advantage exactly 0, where a float32 mean
there leaves up to 0.06. As there, the standard deviation is unbiased and a group of one keeps its
reward (mean 0, deviation 1, so r / (1 + eps)).
"""

import torch
from torch import Tensor

GROUPINGS = ("sequence", "position", "joint")


def group_ids(
    grouping: str,
    batch_size: int,
    num_positions: int,
    rollouts_per_position: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Group of each rollout; rows run over sequences, then positions, then rollouts.

    Args:
        grouping: one of `GROUPINGS`; see the head of the file.
        batch_size: sequences B.
        num_positions: c.
        rollouts_per_position: n.
        device: of the result.

    Returns:
        [B * c * n], int64, numbered from 0.

    Raises:
        ValueError: an unknown grouping.
    """
    shape = (batch_size, num_positions, rollouts_per_position)
    sequence = torch.arange(batch_size, device=device)[:, None, None]
    position = torch.arange(num_positions, device=device)[:, None]
    rollout = torch.arange(rollouts_per_position, device=device)
    if grouping == "sequence":
        ids = sequence * rollouts_per_position + rollout
    elif grouping == "position":
        ids = sequence * num_positions + position
    elif grouping == "joint":
        ids = sequence
    else:
        raise ValueError(f"unknown grouping {grouping!r}; use one of {GROUPINGS}")
    return ids.expand(shape).reshape(-1)


@torch.no_grad()
def group_relative_advantages(
    rewards: Tensor, group_ids: Tensor, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """A = (r - mean of its group) / (unbiased std of its group + eps), without gradient.

    Args:
        rewards: [R], float.
        group_ids: [R], integers in [0, R), in any order. (A bound known without looking at the
            data spares the device a sync.)
        normalize_std: divide by the deviation; else A = r - mean.
        eps: added to the deviation.

    Returns:
        [R], in the dtype of the rewards but at least fp32; exactly 0 in an all-equal group of
        two or more, and r / (1 + eps) in a group of one (r without `normalize_std`).
    """
    # fp64: the order in which a GPU adds the members of a group must not show in the result.
    values = rewards.double()
    groups = group_ids.long()
    zeros = torch.zeros_like(values)

    def group_sum(addends: Tensor) -> Tensor:
        return zeros.scatter_add(0, groups, addends)[groups]

    size = group_sum(torch.ones_like(values))
    alone = size == 1
    highest = zeros.scatter_reduce(0, groups, values, "amax", include_self=False)[groups]
    lowest = zeros.scatter_reduce(0, groups, values, "amin", include_self=False)[groups]
    deviation = (values - group_sum(values) / size).masked_fill(highest == lowest, 0.0)
    if normalize_std:
        variance = group_sum(deviation.square()) / (size - 1).clamp(min=1)
        deviation = deviation / (variance.sqrt() + eps)
        values = values / (1 + eps)
    advantages = torch.where(alone, values, deviation)
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))
