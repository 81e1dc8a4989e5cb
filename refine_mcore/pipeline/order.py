"""In which order a stage runs its passes.

Plain next-token prediction on whole sequences takes Megatron's 1F1B order. Everything else is a
simulated run in which each free stage chooses by three rules:

  * D and S first: they are short, and a micro-batch waits for its whole chain of them;
  * F and W take turns while both are possible. W first, the usual choice, starves the stages below
    of F: with few receives posted ahead, 16 stages then take 1.17 x ideal instead of 1.02 x;
  * a pass starts only when the channel it feeds has a free receive. So at the planned costs no
    send ever waits. The run itself cannot get stuck: token messages have room for all, and F, S
    and W end where nothing is sent on, so along each channel some stage can always go on.

With other costs than planned for sends may wait, but what deadlocks is decided by the lists alone:
a list that one run can follow to its end, every run can. `simulator` proves it for each plan.

Time is counted in integer ticks, so that ties are ties on every machine.
"""

import heapq
from collections import deque

from refine_mcore.pipeline.passes import Costs, Pass, Shape

# Receives that a stage keeps posted ahead on a channel. With one, a stage stops whenever its
# neighbour's turns do not match its own: at 16 stages 1.20 x ideal against 1.02 x.
RECEIVES_AHEAD = 2

CHANNELS = ("forward", "branches", "backward", "token")

_TICKS = 10**9  # of the dearest pass


def routes(channel: str, stages: int) -> list[tuple[int, int]]:
    """(sender, receiver) of every pair of stages that a channel connects."""
    if channel == "token":
        return [(stages - 1, 0)] if stages > 1 else []
    step = -1 if channel == "backward" else 1
    return [(stage, stage + step) for stage in range(stages) if 0 <= stage + step < stages]


def order_passes(shape: Shape, costs: Costs) -> list[list[Pass]]:
    """Per stage, the passes in the order in which it runs them."""
    if shape.slices == 1 and not any(map(shape.rolls_out, range(shape.microbatches))):
        return [_one_forward_one_backward(shape, stage) for stage in range(shape.stages)]
    return _Run(shape, costs).orders()


def receives_ahead(shape: Shape, channel: str) -> int:
    """How many receives the receiver of a channel keeps posted ahead of its passes.

    A token message is small and a micro-batch in flight has one at most, so all find room.
    """
    return shape.in_flight if channel == "token" else RECEIVES_AHEAD


def _one_forward_one_backward(shape: Shape, stage: int) -> list[Pass]:
    forward = [Pass("F", m, 0, 0) for m in range(shape.microbatches)]
    backward = [Pass("W", m, 0, 0) for m in range(shape.microbatches)]
    ahead = min(shape.stages - stage, shape.in_flight, shape.microbatches) - 1
    order = forward[:ahead]
    for done, item in enumerate(forward[ahead:]):
        order += [item, backward[done]]
    return order + backward[shape.microbatches - ahead :]


class _Lane:
    """Passes that one stage can run next, in order, and the room left for more."""

    __slots__ = ("room", "waiting")

    def __init__(self, room: int) -> None:
        self.waiting: deque[Pass] = deque()
        self.room = room


class _Run:
    """A simulated run. `down`, `branches` and `up` hold per stage what F, D and S, and W wait for.

    Where a direction begins (F and tokens at the first stage, W at the last), the lane is never
    full: those passes are not fed by a neighbour.
    """

    def __init__(self, shape: Shape, costs: Costs) -> None:
        self.shape = shape
        table = costs.table(shape)
        dearest = max(table.values())
        self.ticks = {item: round(cost / dearest * _TICKS) for item, cost in table.items()}
        stages, endless = range(shape.stages), len(self.ticks) + 1
        self.down = [_Lane(RECEIVES_AHEAD if stage else endless) for stage in stages]
        self.branches = [_Lane(RECEIVES_AHEAD if stage else endless) for stage in stages]
        self.up = [_Lane(RECEIVES_AHEAD) for _ in stages]
        self.up[-1].room = endless
        self.down[0].waiting.extend(item for item in self.ticks if item.op == "F")
        self.held = 0  # at the first stage, which holds a micro-batch longest
        # per stage the micro-batches whose texts have been read to their end
        self.read: list[set[int]] = [set() for _ in stages]
        self.running: list[Pass | None] = [None for _ in stages]
        self.forward_is_next = [True for _ in stages]
        self.result: list[list[Pass]] = [[] for _ in stages]

    def orders(self) -> list[list[Pass]]:
        events: list[tuple[int, int]] = []  # (tick, stage) at which a pass ends
        now, awake = 0, deque(range(self.shape.stages))
        while True:
            while awake:
                stage = awake.popleft()
                if self.running[stage] is None and (item := self._start(stage, awake)):
                    heapq.heappush(events, (now + self.ticks[item], stage))
            if not events:
                break
            now = events[0][0]
            while events and events[0][0] == now:
                self._finish(heapq.heappop(events)[1], awake)
        assert sum(map(len, self.result)) == self.shape.stages * len(self.ticks)
        return self.result

    def _start(self, stage: int, awake: deque[int]) -> Pass | None:
        """Start the pass that the rules choose; None where none is possible."""
        last = self.shape.stages - 1
        branches, down, up = self.branches[stage], self.down[stage], self.up[stage]
        if self._may_branch(stage) and (stage == last or self.branches[stage + 1].room):
            lane, following, source = branches, self.branches, stage - 1
        else:
            forward = bool(down.waiting) and (stage == last or self.down[stage + 1].room > 0)
            if stage == 0 and forward and down.waiting[0].slice == 0:
                forward = self.held < self.shape.in_flight
            backward = bool(up.waiting) and (stage == 0 or self.up[stage - 1].room > 0)
            if not (forward or backward):
                return None
            if forward and (self.forward_is_next[stage] or not backward):
                lane, following, source = down, self.down, stage - 1
            else:
                lane, following, source = up, self.up, stage + 1
            self.forward_is_next[stage] = lane is up
        item = lane.waiting.popleft()
        lane.room += 1
        target = stage - 1 if lane is up else stage + 1
        if 0 <= target <= last:
            following[target].room -= 1
        if 0 <= source <= last:
            awake.append(source)
        if item.op == "F" and item.slice == self.shape.slices - 1:
            self.read[stage].add(item.microbatch)
        if stage == 0 and item.op == "F" and item.slice == 0:
            self.held += 1
        self.running[stage] = item
        self.result[stage].append(item)
        return item

    def _may_branch(self, stage: int) -> bool:
        """Whether a D or S waits here, and the text has been read that it leaves: an S on stored
        rollouts comes down the stages by itself and may overtake the text."""
        waiting = self.branches[stage].waiting
        return bool(waiting) and waiting[0].microbatch in self.read[stage]

    def _finish(self, stage: int, awake: deque[int]) -> None:
        """Hand on what the stage's pass produced and wake whom that may let start."""
        item = self.running[stage]
        assert item is not None
        self.running[stage] = None
        awake.append(stage)
        if stage == 0 and self.shape.ends(item):
            self.held -= 1
        lanes = {"F": self.down, "D": self.branches, "S": self.branches, "W": self.up}
        if message := self.shape.message(stage, item):
            lanes[message.item.op][message.receiver].waiting.append(message.item)
            awake.append(message.receiver)
        if (following := self.shape.follows(stage, item)) and following[0] == stage:
            first = following[1]
            backward = self.shape.passes(item.microbatch)[-self.shape.slices :]
            lanes[first.op][stage].waiting += backward if first.op == "W" else [first]
