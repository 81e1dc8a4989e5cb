"""The schedule of a ReFINE step on a pipeline over slices of the sequence, as data.

    python -m refine_mcore.pipeline.plan --stages 8 --microbatches 64 --slices 16 \\
        --rollout-tokens 5 [--draw timeline.svg] [--json]

`make_plan` turns the size of a step and the costs of its passes into what each stage executes, one
instruction after the other, and proves the result (`simulator`) before it hands it out. Terms are
those of `passes` and `instructions`. Time is in the unit of the costs; by default a micro-batch's
forward takes 1 on a stage. Needs neither torch nor Megatron.

`--json` prints one object:

    stages                         per stage the passes in order, each
                                   {"op": "F|D|S|W", "microbatch", "slice", "step"}
    step_time, ideal_time, ratio   simulated with waiting sends; all work / stages; their quotient
    bubble                         per stage the share of the step without work
    held                           per stage the most micro-batches whose activations it keeps
    shape, costs                   what was planned for
    receives_ahead                 per channel (see `instructions`) the receives posted ahead

To replay it: a stage runs its passes in order, each as soon as its inputs are there. Then, before
it goes on, it hands its output over and waits until the receiver is there: until that has reached
the pass that consumes the message `receives_ahead` places earlier on the same channel.
"""

import argparse
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from refine_mcore.errors import UserError, cli
from refine_mcore.files import written_whole
from refine_mcore.pipeline.drawing import draw
from refine_mcore.pipeline.instructions import Instruction, add_messages
from refine_mcore.pipeline.order import CHANNELS, order_passes, receives_ahead
from refine_mcore.pipeline.passes import Costs, Shape
from refine_mcore.pipeline.simulator import Timeline, check

_WORTHWHILE = 0.01  # share of the step time that twice the slices must save


@dataclass(frozen=True)
class Plan:
    """A proven schedule: `instructions` per stage, and the step they make at `costs`."""

    shape: Shape
    costs: Costs
    instructions: list[list[Instruction]]
    timeline: Timeline

    @property
    def ratio(self) -> float:
        """Simulated step time over all work / stages."""
        return self.timeline.step_time / self.timeline.ideal_time


def make_plan(shape: Shape, costs: Costs | None = None) -> Plan:
    """Plan a step and prove the plan.

    Raises:
        InvalidPlan: never, unless the planner is broken.
    """
    costs = costs or Costs()
    instructions = add_messages(shape, order_passes(shape, costs))
    return Plan(shape, costs, instructions, check(shape, costs, instructions))


def choose_slices(shape: Shape, costs: Costs | None = None, most: int = 64) -> Plan:
    """The plan with as many slices, a power of two up to `most`, as each doubling saves 1 % of the
    step.

    `shape.slices` is ignored. Without `costs.overhead` more slices are never dear, and the choice
    says only where they stop to help.
    """
    plan = make_plan(replace(shape, slices=1), costs)
    while 2 * plan.shape.slices <= most:
        doubled = make_plan(replace(shape, slices=2 * plan.shape.slices), costs)
        if doubled.timeline.step_time > plan.timeline.step_time * (1 - _WORTHWHILE):
            break
        plan = doubled
    return plan


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as the JSON object that the module's description lists."""
    shape = asdict(plan.shape) | {"ntp_only": sorted(plan.shape.ntp_only)}
    return {
        "shape": shape,
        "costs": asdict(plan.costs),
        "step_time": plan.timeline.step_time,
        "ideal_time": plan.timeline.ideal_time,
        "ratio": plan.ratio,
        "bubble": plan.timeline.bubble,
        "held": plan.timeline.held,
        "receives_ahead": {name: receives_ahead(plan.shape, name) for name in CHANNELS},
        "stages": [
            [item._asdict() for _, _, item in of_stage] for of_stage in plan.timeline.passes
        ],
    }


def describe(plan: Plan) -> str:
    """The figures of a plan in a few lines."""
    shape, timeline = plan.shape, plan.timeline
    bubbles = [f"{100 * bubble:.1f}" for bubble in timeline.bubble]
    return "\n".join(
        [
            _title(shape),
            f"step time {timeline.step_time:.4f}, where the forward of a micro-batch takes "
            f"{plan.costs.forward:g} on a stage",
            f"{plan.ratio:.4f} x ideal ({timeline.ideal_time:.4f}, all work / stages)",
            f"bubble per stage, %: {' '.join(bubbles)}",
            f"micro-batches held per stage: {' '.join(map(str, timeline.held))} "
            f"(limit {shape.in_flight})",
            "complete, dependencies respected, free of deadlock with sends that wait",
        ]
    )


def _title(shape: Shape) -> str:
    rollouts = sum(map(shape.rolls_out, range(shape.microbatches)))
    kind = "NTP only"
    if rollouts:
        stored = "stored " if shape.phase == "train" else ""
        kind = f"{shape.rollout_tokens} {stored}rollout tokens in {rollouts} of them"
        kind += ", no backward" if shape.phase == "rollout" else ""
    return (
        f"{shape.stages} stages, {shape.microbatches} micro-batches, {shape.slices} slices, {kind}"
    )


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other bad input, in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, required=True)
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--slices", default="auto", help="a number, or auto (the default)")
    parser.add_argument("--rollout-tokens", type=int, default=5, help="0: NTP only")
    parser.add_argument("--ntp-only", default="", help="micro-batches that do not roll out: 1,3")
    parser.add_argument("--phase", default="fused", help="fused (the default), rollout or train")
    parser.add_argument("--in-flight", type=int, help="most micro-batches held; stages + 2")
    for cost in fields(Costs):
        name = cost.name.replace("_", "-")
        parser.add_argument(f"--{name}-cost", type=float, default=cost.default)
    parser.add_argument("--draw", type=Path, metavar="FILE.svg", help="draw the timeline")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser.parse_args(argv)


def _numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{what} must be whole numbers, not {text!r}") from None


def _plan_of(arguments: argparse.Namespace) -> Plan:
    if arguments.in_flight is not None and arguments.in_flight < 1:
        raise UserError(f"--in-flight must be at least 1, not {arguments.in_flight}")
    automatic = arguments.slices == "auto"
    try:
        slices = 1 if automatic else int(arguments.slices)
    except ValueError:
        raise UserError(f"--slices must be a number or auto, not {arguments.slices!r}") from None
    shape = Shape(
        stages=arguments.stages,
        microbatches=arguments.microbatches,
        slices=slices,
        rollout_tokens=arguments.rollout_tokens,
        ntp_only=frozenset(_numbers(arguments.ntp_only, "--ntp-only")),
        in_flight=arguments.in_flight or 0,
        phase=arguments.phase,
    )
    costs = Costs(**{f.name: getattr(arguments, f"{f.name}_cost") for f in fields(Costs)})
    return choose_slices(shape, costs) if automatic else make_plan(shape, costs)


def main(argv: list[str]) -> None:
    """Plan the step that the command line describes, and print it."""
    arguments = _parse(argv)
    if arguments.draw and not arguments.draw.parent.is_dir():
        raise UserError(f"{arguments.draw.parent} is no directory to draw {arguments.draw.name} in")
    plan = _plan_of(arguments)
    if arguments.draw:
        title = f"{_title(plan.shape)}: {plan.ratio:.3f} x ideal"
        with written_whole(arguments.draw) as partial:
            partial.write_text(draw(plan.shape, plan.timeline, title), encoding="utf-8")
    print(json.dumps(to_json(plan)) if arguments.json else describe(plan))


if __name__ == "__main__":
    cli(main)
