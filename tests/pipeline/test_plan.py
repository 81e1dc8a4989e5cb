"""Plans: complete, free of deadlock, within their limits, and as fast as promised."""

import json
import time
from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_mcore.errors import UserError
from refine_mcore.pipeline.passes import Costs, Phase, Shape
from refine_mcore.pipeline.plan import choose_slices, make_plan, to_json
from tests.pipeline.replay import replay


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    phase = draw(st.sampled_from(get_args(Phase)))
    all_roll_out = phase == "rollout"
    microbatches, rollout_tokens = draw(st.integers(1, 12)), draw(st.integers(all_roll_out, 6))
    ntp_only = st.frozensets(st.integers(0, microbatches - 1))
    return Shape(
        stages=draw(st.integers(1, 9)),
        microbatches=microbatches,
        slices=draw(st.integers(1, 9)),
        rollout_tokens=rollout_tokens,
        ntp_only=frozenset() if all_roll_out else draw(ntp_only),
        in_flight=draw(st.integers(0, 12)),
        decode_passes=draw(st.none() | st.integers(0, rollout_tokens)),
        phase=phase,
    )


_cost = st.floats(0, 3, allow_subnormal=False)
_costs = st.builds(Costs, st.floats(0.1, 3), _cost, _cost, _cost, _cost, _cost)


@settings(max_examples=150)
@given(shapes(), st.one_of(st.just(Costs()), _costs))
def test_every_plan_holds_and_replays(shape: Shape, costs: Costs) -> None:
    plan = make_plan(shape, costs)  # refuses what it cannot prove
    written = json.loads(json.dumps(to_json(plan)))
    for of_stage in written["stages"]:
        count = Counter((p["op"], p["microbatch"], p["slice"], p["step"]) for p in of_stage)
        assert set(count.values()) == {1}
        ops = Counter(p["op"] for p in of_stage)
        rolling = sum(map(shape.rolls_out, range(shape.microbatches)))
        assert ops["F"] == shape.microbatches * shape.slices
        assert ops["W"] == (0 if shape.phase == "rollout" else ops["F"])
        decodes = 0 if shape.phase == "train" else shape.decode_passes or 0
        assert (ops["D"], ops["S"]) == (rolling * decodes, rolling)
    step_time, held = replay(written)
    assert step_time == pytest.approx(written["step_time"], rel=1e-9)
    assert held == written["held"]
    assert max(held) <= shape.in_flight
    assert written["ratio"] >= 1 - 1e-9


@pytest.mark.parametrize(
    ("stages", "microbatches", "slices", "limit"),
    [(4, 8, 16, 1.03), (8, 8, 32, 1.05), (16, 32, 32, 1.04)],
)
def test_a_refine_step_costs_little_more_than_its_work(
    stages: int, microbatches: int, slices: int, limit: float
) -> None:
    plan = make_plan(Shape(stages, microbatches, slices, rollout_tokens=5))
    assert plan.ratio <= limit
    assert max(plan.timeline.held) <= stages / 2 + 2
    megatron = make_plan(Shape(stages, microbatches))
    assert megatron.ratio == pytest.approx((microbatches + stages - 1) / microbatches)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 16))
def test_one_slice_without_rollouts_is_megatrons_order(stages: int, microbatches: int) -> None:
    plan = make_plan(Shape(stages, microbatches))
    for stage, passes in enumerate(plan.timeline.passes):
        warmup = min(stages - stage - 1, microbatches)
        steady = microbatches - warmup
        expected = [("F", m) for m in range(warmup)]
        for i in range(steady):
            expected += [("F", warmup + i), ("W", i)]
        expected += [("W", m) for m in range(steady, microbatches)]
        assert [(item.op, item.microbatch) for _, _, item in passes] == expected


@given(shapes().filter(lambda shape: shape.slices > 1))
def test_no_send_waits_at_the_planned_costs(shape: Shape) -> None:
    """With endless receives the same order takes as long."""
    written = to_json(make_plan(shape))
    written["receives_ahead"] = dict.fromkeys(written["receives_ahead"], 10**6)
    assert replay(written)[0] == pytest.approx(written["step_time"], rel=1e-9)


def test_a_mix_stays_near_the_time_to_fill_and_drain() -> None:
    for ntp_only in ({0, 3, 5}, {1, 3, 5, 7}, {0, 1, 2, 3}, {7}):
        plan = make_plan(Shape(4, 8, 8, rollout_tokens=5, ntp_only=frozenset(ntp_only)))
        fill_and_drain = 3 * (1 + 2) / 8
        assert plan.timeline.step_time <= 1.03 * (plan.timeline.ideal_time + fill_and_drain)


def test_a_cluster_is_planned_in_seconds() -> None:
    started = time.process_time()
    plan = make_plan(Shape(64, 256, 4, rollout_tokens=5))
    assert time.process_time() - started < 30  # takes a few, the rest is for slow machines
    assert max(plan.timeline.held) <= 66


def test_slices_are_chosen_by_what_they_save() -> None:
    shape = Shape(8, 8, rollout_tokens=5)
    cheap = choose_slices(shape, Costs(overhead=0.001))
    dear = choose_slices(shape, Costs(overhead=0.1))
    assert 1 < dear.shape.slices < cheap.shape.slices
    for plan, costs in ((cheap, Costs(overhead=0.001)), (dear, Costs(overhead=0.1))):
        for count in (1, 2, 4, 8, 16, 32, 64):
            other = make_plan(Shape(8, 8, count, rollout_tokens=5), costs)
            assert plan.timeline.step_time <= 1.01 * other.timeline.step_time
    assert choose_slices(Shape(1, 4, rollout_tokens=5)).shape.slices == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": 0}, "stages must be at least 1, not 0"),
        ({"microbatches": -1}, "microbatches must be at least 1"),
        ({"slices": 0}, "slices must be at least 1"),
        ({"rollout_tokens": -1}, "rollout_tokens must not be negative"),
        ({"in_flight": -1}, "in_flight must not be negative"),
        ({"rollout_tokens": 2, "decode_passes": 3}, "from 0 to the 2 rollout tokens, not 3"),
        ({"ntp_only": frozenset({4})}, "names micro-batch 4, but there are only 0 to 3"),
    ],
)
def test_sizes_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Shape(**({"stages": 2, "microbatches": 4} | arguments))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_costs_out_of_range_are_named(value: float) -> None:
    with pytest.raises(UserError, match="cost decode must be"):
        Costs(decode=value)
    with pytest.raises(UserError, match="both 0"):
        Costs(forward=0, backward=0)
