"""Messages between pipeline stages: each channel of the plan is a communicator of its own.

Megatron's `P2PCommunicator` has one communicator for everything and, at two stages, lends itself
the world's: the kinds of message that overtake each other in a sliced pipeline would cross there
and, where sends wait for their receivers, block for ever. Here every channel has a process group
over the stages, so a pair of ranks uses each in one direction only and messages meet by their
order, as the plan's proof assumes.

On a GPU a posted receive is a kernel that waits. Whatever waits for it in turn - a stream in the
same hardware queue, a kernel that is loaded, a communicator that is set up - would hold back the
very passes that its message depends on: `platform.let_messages_overlap`, `_connect` and the
engine's rehearsal see to that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refine_mcore.pipeline.order import CHANNELS, RECEIVES_AHEAD, routes
from refine_mcore.pipeline.passes import Pass
from refine_mcore.platform import device


class Channels:
    """This rank's end of all channels of its pipeline. Every rank of the job makes one.

    `working_groups`: of the collectives within the passes that messages wait for.
    """

    def __init__(
        self,
        pp_group: dist.ProcessGroup,
        working_groups: Sequence[dist.ProcessGroup],
        timeout_s: float,
    ) -> None:
        self._ranks: list[int] = []
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._posted: dict[Pass, tuple[list[Any], list[Tensor]]] = {}
        self._sent: dict[str, deque[tuple[list[Any], list[Tensor]]]] = {
            channel: deque() for channel in CHANNELS
        }
        if pp_group.size() > 1:
            self._ranks = dist.get_process_group_ranks(pp_group)
            self._groups = _groups_of_all_pipelines(self._ranks, timeout_s)
            self._connect(dist.get_rank(pp_group), working_groups)

    def _connect(self, stage: int, working_groups: Sequence[dist.ProcessGroup]) -> None:
        """Let every pair of stages meet once on each channel, and every working group.

        NCCL connects ranks when they first exchange something, and all wait for that: in the order
        of a plan, where receives are posted long before their sends, for ever.
        """
        greeting = torch.zeros(1, device=device())
        for group in working_groups:
            dist.all_reduce(greeting, group=group)
        for channel, group in self._groups.items():
            for sender, receiver in routes(channel, len(self._ranks)):
                if stage == receiver:
                    dist.recv(greeting, self._ranks[sender], group=group)
                if stage == sender:
                    dist.send(greeting, self._ranks[receiver], group=group)

    def post_receive(
        self,
        channel: str,
        item: Pass,
        stage: int,
        like: Sequence[Tensor],
    ) -> None:
        """Make room for the input of `item`, which `stage` will send: tensors of the shapes and
        dtypes of `like`."""
        buffers = [torch.empty_like(x, device=device()) for x in like]
        source, group = self._ranks[stage], self._groups[channel]
        self._posted[item] = [dist.irecv(x, source, group=group) for x in buffers], buffers

    def take(self, item: Pass) -> list[Tensor]:
        """The input of `item`, once it is there; nothing if it comes from this stage."""
        works, buffers = self._posted.pop(item, ([], []))
        for work in works:
            work.wait()
        return buffers

    def send(self, channel: str, stage: int, tensors: Sequence[Tensor]) -> None:
        """Hand `tensors` to `stage`, without waiting for it.

        They are kept alive until it has them, which is sure for those before the last few: for them
        the receives that `stage` posts ahead have been taken.
        """
        kept = [x.contiguous() for x in tensors]
        target, group = self._ranks[stage], self._groups[channel]
        sent = self._sent[channel]
        if channel != "token" and len(sent) >= RECEIVES_AHEAD:
            _wait(sent.popleft())
        sent.append(([dist.isend(x, target, group=group) for x in kept], kept))

    def drain(self) -> None:
        """Wait until everything sent has been received."""
        for sent in self._sent.values():
            while sent:
                _wait(sent.popleft())


def _wait(sent: tuple[list[Any], list[Tensor]]) -> None:
    for work in sent[0]:
        work.wait()


def _groups_of_all_pipelines(ranks: list[int], timeout_s: float) -> dict[str, dist.ProcessGroup]:
    """One group per channel over these ranks; the job's other pipelines make theirs in the same
    call."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ranks)
    pipelines = sorted({tuple(of_rank) for of_rank in everyone})
    groups = {}
    for channel in CHANNELS:
        group, _ = dist.new_subgroups_by_enumeration(
            [list(pipeline) for pipeline in pipelines], timeout=timedelta(seconds=timeout_s)
        )
        assert group is not None
        groups[channel] = group
    return groups
