"""How long a plan takes when every send waits until its receiver has posted the receive, and proof
that it is complete, respects every dependency and cannot deadlock.

The run is deterministic: each stage follows its list, and the k-th send on a channel meets the
k-th receive posted for it. Whether it gets stuck does not depend on the costs, so one run that
ends proves that none can deadlock. Transfers themselves take no time. It looks only at the
instructions and the size of the step, not at how they were made.
"""

from dataclasses import dataclass

from refine_mcore.pipeline.instructions import Action, Instruction
from refine_mcore.pipeline.order import CHANNELS
from refine_mcore.pipeline.passes import Costs, Message, Pass, Shape


class InvalidPlan(Exception):
    """A plan that would deadlock, or that `check` refuses. The message says where."""


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


def check(shape: Shape, costs: Costs, instructions: list[list[Instruction]]) -> Timeline:
    """Prove a plan, and return its simulated step.

    On every stage each pass runs exactly once and those of a micro-batch in their only order; all
    that `simulate` refuses is right; no stage holds more micro-batches than `shape.in_flight`.

    Raises:
        InvalidPlan: naming the stage and the pass that break one of these.
    """
    if len(instructions) != shape.stages:
        raise InvalidPlan(f"the plan is for {len(instructions)} stages, not {shape.stages}")
    for stage, of_stage in enumerate(instructions):
        _check_passes(shape, stage, [i.item for i in of_stage if i.action is Action.RUN])
    timeline = simulate(shape, costs, instructions)
    for stage, held in enumerate(timeline.held):
        if held > shape.in_flight:
            raise InvalidPlan(
                f"stage {stage} holds {held} micro-batches, more than {shape.in_flight}"
            )
    return timeline


def _check_passes(shape: Shape, stage: int, order: list[Pass]) -> None:
    expected = [iter(shape.passes(m)) for m in range(shape.microbatches)]
    for item in order:
        if not 0 <= item.microbatch < shape.microbatches:
            raise InvalidPlan(f"stage {stage}: {item} is of no micro-batch of this step")
        due = next(expected[item.microbatch], None)
        if item != due:
            raise InvalidPlan(f"stage {stage}: {item} comes where {due or 'nothing'} is due")
    for rest in expected:
        if (missing := next(rest, None)) is not None:
            raise InvalidPlan(f"stage {stage}: {missing} is missing")


def simulate(shape: Shape, costs: Costs, instructions: list[list[Instruction]]) -> Timeline:
    """Run the instructions of all stages with waiting sends.

    Each message between stages is sent once, right after the pass that makes it, and its receive is
    posted before the pass that consumes it; per channel, sends, receives and the passes that
    consume them have the same order.

    Raises:
        InvalidPlan: one of these does not hold, or the stages wait for each other for ever.
    """
    return _Execution(shape, costs.table(shape), instructions).to_the_end()


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
    """Messages into one stage: posted receives, each of (time, sender, pass), and the times of
    completed sends, in order."""

    __slots__ = ("consumed", "posted", "sent")

    def __init__(self) -> None:
        self.posted: list[tuple[float, int, Pass]] = []
        self.sent: list[float] = []
        self.consumed = 0


class _Execution:
    def __init__(
        self, shape: Shape, costs: dict[Pass, float], instructions: list[list[Instruction]]
    ) -> None:
        self.shape, self.costs, self.instructions = shape, costs, instructions
        self.clock = [0.0] * shape.stages
        self.next = [0] * shape.stages
        self.made: list[Message | None] = [None] * shape.stages  # by the last pass, not yet sent
        self.passes: list[list[tuple[float, float, Pass]]] = [[] for _ in range(shape.stages)]
        self.into: list[dict[str, _Channel]] = [
            {name: _Channel() for name in CHANNELS} for _ in range(shape.stages)
        ]

    def to_the_end(self) -> Timeline:
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
        for stage, channels in enumerate(self.into):
            for name, channel in channels.items():
                if len(channel.posted) > channel.consumed:
                    raise InvalidPlan(f"stage {stage} posts a receive on {name} that nothing meets")
        orders = [[item for _, _, item in of_stage] for of_stage in self.passes]
        return Timeline(
            passes=self.passes,
            step_time=max(self.clock),
            busy=[sum(self.costs[item] for item in order) for order in orders],
            held=[_most_held(self.shape, order) for order in orders],
        )

    def _advance(self, stage: int, awake: list[int]) -> None:
        """Execute the stage's instructions until one has to wait."""
        clock, own, passes = self.clock[stage], self.into[stage], self.passes[stage]
        instructions, index = self.instructions[stage], self.next[stage]
        while index < len(instructions):
            action, item, name, peer = instructions[index]
            if action is Action.RUN:
                if source := self.shape.input_channel(stage, item):
                    channel = own[source]
                    place = channel.consumed
                    if len(channel.posted) <= place or channel.posted[place][2] != item:
                        raise InvalidPlan(f"stage {stage} runs {item} without a receive before it")
                    if len(channel.sent) <= place:
                        break
                    clock = max(clock, channel.sent[place])
                    channel.consumed += 1
                end = clock + self.costs[item]
                passes.append((clock, end, item))
                clock = end
                self.made[stage] = self.shape.message(stage, item)
            elif action is Action.RECV:
                own[name].posted.append((clock, peer, item))
                awake.append(peer)
            else:
                if self.made[stage] != Message(name, peer, item):
                    raise InvalidPlan(
                        f"stage {stage} sends the input of {item} to stage {peer} by {name}, which "
                        "its last pass did not make or which it has sent already"
                    )
                channel = self.into[peer][name]
                if len(channel.posted) <= len(channel.sent):
                    break
                posted, sender, awaited = channel.posted[len(channel.sent)]
                if (sender, awaited) != (stage, item):
                    raise InvalidPlan(
                        f"channel {name} from stage {stage} to {peer}: "
                        "sends and receives are not the same in the same order"
                    )
                clock = max(clock, posted)
                channel.sent.append(clock)
                self.made[stage] = None
                awake.append(peer)
            index += 1
        self.clock[stage], self.next[stage] = clock, index
