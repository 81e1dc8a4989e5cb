"""The proof refuses plans that are wrong: every kind of damage to a good plan is found."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_mcore.pipeline.instructions import Action, Instruction, add_messages
from refine_mcore.pipeline.passes import Costs, Pass, Shape
from refine_mcore.pipeline.plan import make_plan
from refine_mcore.pipeline.simulator import InvalidPlan, check, simulate

SHAPE = Shape(3, 4, 3, rollout_tokens=2, ntp_only=frozenset({1}))
GOOD = make_plan(SHAPE)


def _refused(instructions: list[list[Instruction]], shape: Shape = SHAPE) -> str:
    with pytest.raises(InvalidPlan) as error:
        check(shape, Costs(), instructions)
    return str(error.value)


def _damaged(stage: int, of_stage: list[Instruction]) -> list[list[Instruction]]:
    return [of_stage if s == stage else list(o) for s, o in enumerate(GOOD.instructions)]


def _place(data: st.DataObject) -> tuple[int, int]:
    stage = data.draw(st.integers(0, SHAPE.stages - 1))
    return stage, data.draw(st.integers(0, len(GOOD.instructions[stage]) - 1))


def test_a_good_plan_is_accepted() -> None:
    assert check(SHAPE, Costs(), GOOD.instructions).step_time == GOOD.timeline.step_time


@settings(max_examples=60)
@given(st.data())
def test_a_dropped_instruction_is_found(data: st.DataObject) -> None:
    stage, index = _place(data)
    of_stage = GOOD.instructions[stage]
    _refused(_damaged(stage, of_stage[:index] + of_stage[index + 1 :]))


@settings(max_examples=60)
@given(st.data())
def test_a_repeated_instruction_is_found(data: st.DataObject) -> None:
    stage, index = _place(data)
    of_stage = GOOD.instructions[stage]
    _refused(_damaged(stage, of_stage[: index + 1] + of_stage[index:]))


def _swaps(*, messages: bool) -> list[tuple[int, int, int]]:
    """(stage, index, index) of two passes of a micro-batch, or two messages of a channel."""
    return [
        (stage, i, j)
        for stage, of_stage in enumerate(GOOD.instructions)
        for i, a in enumerate(of_stage)
        for j, b in enumerate(of_stage[:i])
        if a.action is b.action
        and (a.action is not Action.RUN) == messages
        and (a.channel == b.channel if messages else a.item.microbatch == b.item.microbatch)
    ]


@settings(max_examples=60)
@given(st.sampled_from(_swaps(messages=False) + _swaps(messages=True)))
def test_a_swap_is_found(swap: tuple[int, int, int]) -> None:
    stage, i, j = swap
    of_stage = list(GOOD.instructions[stage])
    of_stage[i], of_stage[j] = of_stage[j], of_stage[i]
    _refused(_damaged(stage, of_stage))


@settings(max_examples=30)
@given(st.data())
def test_a_message_to_the_wrong_stage_is_found(data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, SHAPE.stages - 1))
    of_stage = list(GOOD.instructions[stage])
    messages = [i for i, x in enumerate(of_stage) if x.action is not Action.RUN]
    index = data.draw(st.sampled_from(messages))
    instruction = of_stage[index]
    wrong = data.draw(st.sampled_from([s for s in range(SHAPE.stages) if s != instruction.peer]))
    of_stage[index] = instruction._replace(peer=wrong)
    _refused(_damaged(stage, of_stage))


def test_a_receive_after_its_pass_is_found() -> None:
    of_stage = list(GOOD.instructions[1])
    index = next(i for i, x in enumerate(of_stage) if x.action is Action.RECV)
    receive = of_stage.pop(index)
    of_stage.insert(of_stage.index(Instruction(Action.RUN, receive.item, "", -1)) + 1, receive)
    assert "without a receive before it" in _refused(_damaged(1, of_stage))


def test_stages_that_order_a_channel_differently_are_found() -> None:
    """Each stage alone is right here: only the two together are not."""
    shape = Shape(2, 2)
    forward = [Pass("F", m, 0, 0) for m in range(2)]
    backward = [Pass("W", m, 0, 0) for m in range(2)]
    orders = [forward + backward, forward[::-1] + backward]
    assert "not the same in the same order" in _refused(add_messages(shape, orders), shape)


def test_sends_that_cross_are_found() -> None:
    """Megatron's order with each receive only just before its pass: neighbours send to each other
    and neither receives. Buffers would hide it."""
    shape = Shape(4, 8)
    crossing = []
    for of_stage in make_plan(shape).instructions:
        receives = {x.item: x for x in of_stage if x.action is Action.RECV}
        late: list[Instruction] = []
        for instruction in of_stage:
            if instruction.action is Action.RUN and instruction.item in receives:
                late.append(receives[instruction.item])
            if instruction.action is not Action.RECV:
                late.append(instruction)
        crossing.append(late)
    assert "deadlock" in _refused(crossing, shape)
    with pytest.raises(InvalidPlan, match="deadlock: 4 of 4 stages wait for ever"):
        simulate(shape, Costs(), crossing)


def test_too_many_microbatches_in_flight_are_found() -> None:
    instructions = make_plan(Shape(2, 6, 2, rollout_tokens=3, in_flight=4)).instructions
    less = Shape(2, 6, 2, rollout_tokens=3, in_flight=2)
    assert "holds" in _refused(instructions, less)


def test_a_plan_for_another_size_is_refused() -> None:
    assert "for 3 stages, not 4" in _refused(GOOD.instructions, Shape(4, 4, 3, rollout_tokens=2))
    assert "no micro-batch" in _refused(GOOD.instructions, Shape(3, 3, 3, rollout_tokens=2))
    assert "missing" in _refused(GOOD.instructions, Shape(3, 5, 3, 2, frozenset({1})))
    assert "is due" in _refused(GOOD.instructions, Shape(3, 4, 3, rollout_tokens=2))


def test_a_send_that_comes_after_another_pass_is_found() -> None:
    """A stage hands on what its last pass made."""
    of_stage = list(GOOD.instructions[0])
    actions = [x.action for x in of_stage]
    index = actions.index(Action.SEND)
    following = actions.index(Action.RUN, index)
    of_stage.insert(following, of_stage.pop(index))
    assert "its last pass did not make" in _refused(_damaged(0, of_stage))


def test_receives_in_another_order_than_their_passes_are_found() -> None:
    """Both ends of the channel agree, and every pass has its receive: but the first message that
    comes is not the one that the first pass takes."""
    shape = Shape(2, 2)
    first, second = ([Pass(op, m, 0, 0) for op in "FW"] for m in range(2))
    orders = [[first[0], second[0], second[1], first[1]], [*second, *first]]
    instructions = add_messages(shape, orders)
    of_last = [x for x in instructions[1] if x.action is not Action.RECV]
    receives = {x.item: x for x in instructions[1] if x.action is Action.RECV}
    instructions[1] = [receives[first[0]], receives[second[0]], *of_last]
    assert "without a receive before it" in _refused(instructions, shape)
