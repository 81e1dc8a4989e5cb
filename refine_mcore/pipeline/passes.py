"""What a step consists of: its passes, what each costs, which messages they exchange.

A fast-weight layer needs of the earlier text only its state, so a step runs over slices of the
sequence; one stage and one slice is the plain case. On every stage a micro-batch is, in this order,

    F(0) .. F(n-1)   forward of each slice, the state carried on within the stage
    D(0) .. D(d-1)   decode passes, all branches of the micro-batch together    (rollouts only)
    S                scoring forward of the branches                            (rollouts only)
    W(n-1) .. W(0)   backward of each slice; W(n-1) begins with the branches' backward

in the phase `fused`. The paper's regime has two: `rollout`, without gradients, ends with S, whose
rewards are stored; `train` on stored rollouts has no D.

F, D and S travel down the stages, W travels up. From the last stage to the first goes a *token*
message: after F(n-1) the sampled positions and first tokens, which D(0) consumes, and after each
D(j) its tokens, which D(j+1), at the end S, consumes (without any D, S consumes the first; in
`train` every stage knows positions and tokens, and there is none). No W starts before S has left
the last stage, because advantages need the rewards of all branches. The paper has no pipeline.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from refine_mcore.errors import UserError

Phase = Literal["fused", "rollout", "train"]


class Pass(NamedTuple):
    """One pass of one micro-batch through one stage.

    `slice` is that of F and W, for D and S the last one, after which they come; `step` counts D.
    """

    op: str
    microbatch: int
    slice: int
    step: int

    def __str__(self) -> str:
        return f"{self.op}(microbatch {self.microbatch}, slice {self.slice}, step {self.step})"


class Message(NamedTuple):
    """What a pass hands to another stage: `item` is the pass there that consumes it."""

    channel: str
    receiver: int
    item: Pass


@dataclass(frozen=True)
class Shape:
    """The size of a step.

    Attributes:
        stages, microbatches, slices: at least 1.
        rollout_tokens: k of a micro-batch's rollouts; 0 for next-token prediction only.
        ntp_only: micro-batches that do not roll out though `rollout_tokens` is not 0.
        in_flight: most micro-batches whose activations a stage may hold; 0 means stages + 2.
        decode_passes: of a micro-batch that rolls out; None means k. A run needs k - 1: the
            first token comes from the text's own logits.
        phase: what becomes of the rollouts, see the head of the file. In `rollout` every
            micro-batch rolls out.

    Raises:
        UserError: a size is out of range.
    """

    stages: int
    microbatches: int
    slices: int = 1
    rollout_tokens: int = 0
    ntp_only: frozenset[int] = field(default_factory=frozenset)
    in_flight: int = 0
    decode_passes: int | None = None
    phase: Phase = "fused"

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise UserError(f"phase must be one of {', '.join(get_args(Phase))}, not {self.phase}")
        for name in ("stages", "microbatches", "slices"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rollout_tokens", "in_flight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative: {getattr(self, name)}")
        for microbatch in self.ntp_only:
            if not 0 <= microbatch < self.microbatches:
                raise UserError(
                    f"ntp_only names micro-batch {microbatch}, but there are only "
                    f"0 to {self.microbatches - 1}"
                )
        if self.decode_passes is None:
            object.__setattr__(self, "decode_passes", self.rollout_tokens)
        elif not 0 <= self.decode_passes <= self.rollout_tokens:
            raise UserError(
                f"decode_passes must be from 0 to the {self.rollout_tokens} rollout tokens, "
                f"not {self.decode_passes}"
            )
        if self.phase == "rollout" and not all(map(self.rolls_out, range(self.microbatches))):
            raise UserError("in the phase rollout every micro-batch rolls out")
        if self.in_flight == 0:
            object.__setattr__(self, "in_flight", self.stages + 2)

    def rolls_out(self, microbatch: int) -> bool:
        return self.rollout_tokens > 0 and microbatch not in self.ntp_only

    def passes(self, microbatch: int) -> list[Pass]:
        """The passes of one micro-batch on any stage, in the only order they can run."""
        last = self.slices - 1
        forward = [Pass("F", microbatch, i, 0) for i in range(self.slices)]
        backward = [Pass("W", microbatch, i, 0) for i in reversed(range(self.slices))]
        if not self.rolls_out(microbatch):
            return forward + backward
        decodes = 0 if self.phase == "train" else self.decode_passes or 0
        decode = [Pass("D", microbatch, last, j) for j in range(decodes)]
        branches = [*decode, Pass("S", microbatch, last, 0)]
        return forward + branches + (backward if self.phase != "rollout" else [])

    def ends(self, item: Pass) -> bool:
        """Whether `item` is the last pass of its micro-batch on a stage, which then keeps nothing
        of it."""
        return item.op == "S" if self.phase == "rollout" else item.op == "W" and item.slice == 0

    def follows(self, stage: int, item: Pass) -> tuple[int, Pass] | None:
        """(stage, pass) that `item`, run on `stage`, makes possible, beside the same pass on the
        neighbouring stage: the first W on the last stage, D and S on the first. None: none.
        """
        op, microbatch, position, step = item
        last = self.slices - 1
        if op == "W" or (op == "F" and position < last):
            return None
        of_text = op == "F" and self.rolls_out(microbatch)
        if of_text and self.phase == "train":
            return (0, Pass("S", microbatch, last, 0)) if stage == 0 else None
        if stage < self.stages - 1:
            return None
        if of_text or op == "D":
            done = 0 if op == "F" else step + 1
            if done < (self.decode_passes or 0):
                return 0, Pass("D", microbatch, last, done)
            return 0, Pass("S", microbatch, last, 0)
        if self.phase == "rollout":
            return None
        return stage, Pass("W", microbatch, last, 0)

    def message(self, stage: int, item: Pass) -> Message | None:
        """What `item`, run on `stage`, sends to another stage. None: nothing."""
        if item.op == "W":
            return Message("backward", stage - 1, item) if stage > 0 else None
        if stage < self.stages - 1:
            return Message("forward" if item.op == "F" else "branches", stage + 1, item)
        following = self.follows(stage, item)
        if following is None or following[0] == stage:
            return None
        return Message("token", *following)

    def input_channel(self, stage: int, item: Pass) -> str | None:
        """The channel by which `item` on `stage` gets its input. None: from its own stage."""
        if item.op == "W":
            return "backward" if stage < self.stages - 1 else None
        if stage > 0:
            return "forward" if item.op == "F" else "branches"
        if item.op == "F" or self.phase == "train" or self.stages == 1:
            return None
        return "token"


@dataclass(frozen=True)
class Costs:
    """Time of passes on a stage, in any one unit.

    Attributes:
        forward, backward: of a whole micro-batch, divided evenly over its slices.
        decode: one decode pass. scoring: the scoring forward of the branches.
        scoring_backward: their backward, part of the last slice's W.
        overhead: added to every F and W, what a slice costs however short it is.

    Raises:
        UserError: a cost is negative or not a number, or forward and backward are both 0.
    """

    forward: float = 1.0
    backward: float = 2.0
    decode: float = 0.01
    scoring: float = 0.02
    scoring_backward: float = 0.04
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise UserError(f"the cost {name} must be a number of at least 0, not {value}")
        if self.forward + self.backward == 0:
            raise UserError("the costs forward and backward are both 0")

    def of(self, shape: Shape, item: Pass) -> float:
        if item.op == "F":
            return self.forward / shape.slices + self.overhead
        if item.op == "D":
            return self.decode
        if item.op == "S":
            return self.scoring
        cost = self.backward / shape.slices + self.overhead
        with_branches = item.slice == shape.slices - 1 and shape.rolls_out(item.microbatch)
        return cost + self.scoring_backward if with_branches else cost

    def table(self, shape: Shape) -> dict[Pass, float]:
        """The cost of every pass of the step, the same on every stage."""
        return {
            item: self.of(shape, item)
            for m in range(shape.microbatches)
            for item in shape.passes(m)
        }
