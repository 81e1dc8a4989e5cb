"""How long a plan takes when every send waits until its receiver has posted the receive.

The run is deterministic: each stage follows its list, and the k-th send on a channel meets the
k-th receive posted for it. Whether it gets stuck does not depend on the costs, so one run that
ends proves that none can deadlock. Transfers themselves take no time.
"""

from dataclasses import dataclass

from refine_mcore.pipeline.instructions import Action, Instruction
from refine_mcore.pipeline.order import CHANNELS
from refine_mcore.pipeline.passes import Costs, Pass, Shape


class InvalidPlan(Exception):
    """A plan that would deadlock, or that `checker.check` refuses. The message says where."""


@dataclass(frozen=True)
class Timeline:
    """A simulated step: per stage (start, end, pass) in order, and the figures.

    `busy` is per stage the time spent in passes, `held` the most micro-batches whose activations
    the stage keeps at a time, from the start of their first F to the end of their last pass.
    """

    passes: list[list[tuple[float, float, Pass]]]
    step_time: float
    busy: list[float]
    held: list[int]

    @property
    def ideal_time(self) -> float:
        """All work, rollouts included, divided evenly over the stages."""
        return sum(self.busy) / len(self.busy)

    @property
    def bubble(self) -> list[float]:
        """Per stage the share of the step in which it runs no pass."""
        return [1 - busy / self.step_time for busy in self.busy]


def simulate(shape: Shape, costs: Costs, instructions: list[list[Instruction]]) -> Timeline:
    """Run the instructions of all stages with waiting sends.

    Raises:
        InvalidPlan: the stages wait for each other for ever.
    """
    run = _Execution(shape, costs.table(shape), instructions)
    passes = run.to_the_end()
    table = run.costs
    return Timeline(
        passes=passes,
        step_time=max(run.clock),
        busy=[sum(table[item] for _, _, item in of_stage) for of_stage in passes],
        held=[_most_held(shape, [item for _, _, item in of_stage]) for of_stage in passes],
    )


def _most_held(shape: Shape, order: list[Pass]) -> int:
    held = most = 0
    for item in order:
        if item.op == "F" and item.slice == 0:
            held += 1
            most = max(most, held)
        elif shape.ends(item):
            held -= 1
    return most


class _Channel:
    """Messages into one stage: times of posted receives and of completed sends, in order."""

    __slots__ = ("consumed", "posted", "sent")

    def __init__(self) -> None:
        self.posted: list[float] = []
        self.sent: list[float] = []
        self.consumed = 0


class _Execution:
    def __init__(
        self, shape: Shape, costs: dict[Pass, float], instructions: list[list[Instruction]]
    ) -> None:
        self.shape, self.costs, self.instructions = shape, costs, instructions
        self.clock = [0.0] * shape.stages
        self.next = [0] * shape.stages
        self.passes: list[list[tuple[float, float, Pass]]] = [[] for _ in range(shape.stages)]
        self.into: list[dict[str, _Channel]] = [
            {name: _Channel() for name in CHANNELS} for _ in range(shape.stages)
        ]

    def to_the_end(self) -> list[list[tuple[float, float, Pass]]]:
        # The times do not depend on the order in which stages are advanced.
        awake = list(range(self.shape.stages))
        while awake:
            self._advance(awake.pop(), awake)
        stuck = [s for s, done in enumerate(self.next) if done < len(self.instructions[s])]
        if stuck:
            stage = stuck[0]
            waiting = self.instructions[stage][self.next[stage]]
            raise InvalidPlan(
                f"deadlock: {len(stuck)} of {self.shape.stages} stages wait for ever, stage "
                f"{stage} in {waiting.action.value} of {waiting.item}"
            )
        return self.passes

    def _advance(self, stage: int, awake: list[int]) -> None:
        """Execute the stage's instructions until one has to wait."""
        clock, own, passes = self.clock[stage], self.into[stage], self.passes[stage]
        instructions, index = self.instructions[stage], self.next[stage]
        while index < len(instructions):
            action, item, name, peer = instructions[index]
            if action is Action.RUN:
                if source := self.shape.input_channel(stage, item):
                    channel = own[source]
                    if len(channel.sent) <= channel.consumed:
                        break
                    clock = max(clock, channel.sent[channel.consumed])
                    channel.consumed += 1
                end = clock + self.costs[item]
                passes.append((clock, end, item))
                clock = end
            elif action is Action.RECV:
                own[name].posted.append(clock)
                awake.append(peer)
            else:
                channel = self.into[peer][name]
                if len(channel.posted) <= len(channel.sent):
                    break
                clock = max(clock, channel.posted[len(channel.sent)])
                channel.sent.append(clock)
                awake.append(peer)
            index += 1
        self.clock[stage], self.next[stage] = clock, index
