"""What a stage executes: its passes with the receives and sends around them.

    recv   posts a receive and goes on at once
    run    waits for the pass's message, if it comes from another stage, and runs it
    send   hands the output over, and waits until the receiver has posted its receive (so the
           proof; the engine's sends do not wait, which can only be faster)

A channel is one kind of message in one direction: `forward` (F), `branches` (D and S), `backward`
(W) and `token` (last stage to first). Each needs a communicator of its own, because kinds overtake
each other; within a channel messages arrive in the order sent, so a receive needs no tag. A stage
posts the receives of a channel in the order of its passes, `receives_ahead` of them at the start
and one more before each pass that consumes one.
"""

from enum import Enum
from typing import NamedTuple

from refine_mcore.pipeline.order import CHANNELS, receives_ahead, routes
from refine_mcore.pipeline.passes import Pass, Shape


class Action(Enum):
    RECV = "recv"
    RUN = "run"
    SEND = "send"


class Instruction(NamedTuple):
    """One instruction of a stage; `peer` is the other stage of a recv or send, -1 of a run.

    `item` is the pass to run, and of a message the pass that consumes it.
    """

    action: Action
    item: Pass
    channel: str
    peer: int


def add_messages(shape: Shape, orders: list[list[Pass]]) -> list[list[Instruction]]:
    """Per stage its passes in the given order, with the receives and sends that they need."""
    return [_of_stage(shape, stage, order) for stage, order in enumerate(orders)]


def _of_stage(shape: Shape, stage: int, order: list[Pass]) -> list[Instruction]:
    receives: dict[str, list[Instruction]] = {}
    senders = {
        channel: sender
        for channel in CHANNELS
        for sender, receiver in routes(channel, shape.stages)
        if receiver == stage
    }
    inputs = [shape.input_channel(stage, item) for item in order]
    for item, channel in zip(order, inputs, strict=True):
        if channel:
            receives.setdefault(channel, []).append(
                Instruction(Action.RECV, item, channel, senders[channel])
            )
    result, pending = [], {}
    for channel, of_channel in receives.items():
        ahead = receives_ahead(shape, channel)
        result += of_channel[:ahead]
        pending[channel] = iter(of_channel[ahead:])
    for item, channel in zip(order, inputs, strict=True):
        if channel and (receive := next(pending[channel], None)):
            result.append(receive)
        result.append(Instruction(Action.RUN, item, "", -1))
        if message := shape.message(stage, item):
            result.append(Instruction(Action.SEND, message.item, message.channel, message.receiver))
    return result
