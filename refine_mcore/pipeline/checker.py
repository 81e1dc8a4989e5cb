"""Proof that a plan is complete, respects every dependency and cannot deadlock.

It looks only at the instructions and the size of the step, not at how they were made.
"""

from refine_mcore.pipeline.instructions import Action, Instruction
from refine_mcore.pipeline.passes import Costs, Message, Pass, Shape
from refine_mcore.pipeline.simulator import InvalidPlan, Timeline, simulate


def check(shape: Shape, costs: Costs, instructions: list[list[Instruction]]) -> Timeline:
    """Prove the plan, and return its simulated step.

    On every stage each pass runs exactly once and those of a micro-batch in their only order; each
    message between stages is sent once, right after the pass that makes it, and its receive is
    posted before the pass that consumes it; per channel, sends and receives have the same order;
    with sends that wait for their receivers all stages reach their end; none holds more
    micro-batches than `shape.in_flight`.

    Raises:
        InvalidPlan: naming the stage and the pass that break one of these.
    """
    if len(instructions) != shape.stages:
        raise InvalidPlan(f"the plan is for {len(instructions)} stages, not {shape.stages}")
    for stage, of_stage in enumerate(instructions):
        _check_passes(shape, stage, [i.item for i in of_stage if i.action is Action.RUN])
        _check_messages(shape, stage, of_stage)
    _check_channels(instructions)
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


def _check_messages(shape: Shape, stage: int, instructions: list[Instruction]) -> None:
    """Each pass has its receive before it, and a send comes directly after the pass that feeds it.

    What is left over or not sent at all, `_check_channels` finds at the other end.
    """
    posted: set[tuple[str, Pass]] = set()
    to_send: Message | None = None  # what the last pass hands on
    for action, item, channel, peer in instructions:
        if action is Action.RECV:
            if (channel, item) in posted:
                raise InvalidPlan(f"stage {stage} receives the input of {item} twice")
            posted.add((channel, item))
        elif action is Action.RUN:
            source = shape.input_channel(stage, item)
            if source is not None:
                if (source, item) not in posted:
                    raise InvalidPlan(f"stage {stage} runs {item} without a receive before it")
                posted.remove((source, item))
            to_send = shape.message(stage, item)
        else:
            if Message(channel, peer, item) != to_send:
                raise InvalidPlan(
                    f"stage {stage} sends the input of {item} to stage {peer} by {channel}, "
                    "which its last pass did not make or which it has sent already"
                )
            to_send = None


def _check_channels(instructions: list[list[Instruction]]) -> None:
    """Messages of a channel meet by their order alone, so both ends must have the same one."""
    received: dict[tuple[str, int, int], list[Pass]] = {}
    sent: dict[tuple[str, int, int], list[Pass]] = {}
    for stage, of_stage in enumerate(instructions):
        for action, item, channel, peer in of_stage:
            if action is Action.RECV:
                received.setdefault((channel, peer, stage), []).append(item)
            elif action is Action.SEND:
                sent.setdefault((channel, stage, peer), []).append(item)
    for key in sorted(received.keys() | sent.keys()):
        channel, source, target = key
        if received.get(key) != sent.get(key):
            raise InvalidPlan(
                f"channel {channel} from stage {source} to {target}: "
                "sends and receives are not the same in the same order"
            )
