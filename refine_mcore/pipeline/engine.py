"""Runs the plan of an optimizer step, or of its rollouts: this stage's instructions, one after the
other.

The plan (`plan.py`) says what to run and which messages to exchange in which order, `stage.py` what
a pass does, `channels.py` how a message travels. Gradients gather in Megatron's
DistributedDataParallel: only the stage's very last backward runs outside `no_sync`, and
`finalize_model_grads` follows it, as in Megatron's own schedules. One stage and one slice is the
plain case: the same passes, without messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor
from torch.profiler import record_function

from refine_mcore import platform
from refine_mcore.config import RefineConfig
from refine_mcore.pipeline.channels import Channels
from refine_mcore.pipeline.head import Head, Objective
from refine_mcore.pipeline.instructions import Action
from refine_mcore.pipeline.micro_batch import MicroBatch, StoredRollouts
from refine_mcore.pipeline.passes import Costs, Pass, Phase, Shape
from refine_mcore.pipeline.plan import Plan, make_plan
from refine_mcore.pipeline.slices import default_slices, slice_spans
from refine_mcore.pipeline.stage import StageWork, made_up_positions
from refine_mcore.rollout.decode_passes import Decoder
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch

PASS_NAMES = {"F": "forward", "D": "decode", "S": "score", "W": "backward"}

_cached_plan = functools.lru_cache(maxsize=8)(make_plan)


def _annotate(item: Pass) -> AbstractContextManager[object]:
    """Names a pass in profiles."""
    return record_function(f"refine/{PASS_NAMES[item.op]}")


class PipelineEngine:
    """Rollouts, forward and backward over slices of the sequence, on this stage.

    Args:
        wrapped: this stage's part of the model.
        slices: of every text; None for as many as the plan gains from, which on one stage is one.
        recompute: keep no activations between a slice's forward and its backward.
        decode_graphs: replay decode passes as CUDA graphs where that is possible.
        timeout_s: how long to wait for another stage.
    """

    def __init__(
        self,
        wrapped: DistributedDataParallel,
        pg_collection: Any,
        *,
        slices: int | None = None,
        recompute: bool = False,
        decode_graphs: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        self._wrapped, self._slices, self._recompute = wrapped, slices, recompute
        self._stage, self._stages = pg_collection.pp.rank(), pg_collection.pp.size()
        # wraps every pass: names it in profiles; a benchmark times it
        self.observe: Callable[[Pass], AbstractContextManager[object]] = _annotate
        # a graph holds the states of one micro-batch: in a pipeline those of several take turns
        alone = self._stages == 1 and pg_collection.tp.size() == 1
        capture = platform.graph_capture() if alone and decode_graphs else None
        self.decoder = Decoder(wrapped.module, capture)
        self._rehearsed: set[Any] = set()
        self._rehearses = self._stages > 1 and platform.loading_waits()
        # layers sum over tp; the first forward gathers parameters over intra_dp_cp
        working = (pg_collection.tp, pg_collection.intra_dp_cp)
        self._channels = Channels(pg_collection.pp, working, timeout_s)

    @torch.no_grad()
    def roll_out(
        self, context: StepContext, batches: Sequence[TextBatch], metrics: StepAccumulator
    ) -> list[StoredRollouts]:
        """Rollouts and rewards of all micro-batches, without gradients, to train on later: what
        this stage stores of each. `metrics` fills on the last stage."""
        work = [MicroBatch(batch, rolls_out=True) for batch in batches]
        return [item.take_rollouts() for item in self._run(context, work, "rollout", None, metrics)]

    def forward_backward(
        self,
        context: StepContext,
        work: Sequence[MicroBatch],
        metrics: StepAccumulator,
    ) -> None:
        """Losses and gradients of an optimizer step. `metrics` fills on the last stage."""
        rolling = [item.texts for item in work if item.rolls_out]
        objective = Objective(
            context.config.ntp_weight if rolling else 1.0,
            context.global_targets([item.texts for item in work]),
            context.policy_denominator(rolling),
        )
        phase: Phase = "train" if any(item.stored for item in work) else "fused"
        self._run(context, work, phase, objective, metrics)
        with record_function("refine/reduce gradients"):
            finalize_model_grads([self._wrapped])

    def plan(
        self,
        config: RefineConfig,
        length: int,
        rolls_out: Sequence[bool],
        phase: Phase = "fused",
    ) -> Plan:
        """The plan for texts of `length` tokens, with an entry of `rolls_out` for each
        micro-batch."""
        k = config.rollout_tokens if any(rolls_out) else 0
        shape = Shape(
            self._stages,
            len(rolls_out),
            len(self._spans(length, len(rolls_out))),
            rollout_tokens=k,
            ntp_only=frozenset(m for m, rolls in enumerate(rolls_out) if not rolls),
            decode_passes=max(0, k - 1),
            phase=phase,
        )
        # recomputing runs every forward once more
        costs = Costs(backward=Costs.backward + Costs.forward) if self._recompute else Costs()
        return _cached_plan(shape, costs)

    def _spans(self, length: int, micro_batches: int) -> Sequence[tuple[int, int]]:
        """[start, stop) of the slices of every text."""
        architecture, slices = self._wrapped.module.config.arch, self._slices
        if slices is None:
            slices = default_slices(
                length, architecture, self._stages, micro_batches, self._recompute
            )
        return slice_spans(length, slices, architecture)

    def _run(
        self,
        context: StepContext,
        work: Sequence[MicroBatch],
        phase: Phase,
        objective: Objective | None,
        metrics: StepAccumulator,
    ) -> list[StageWork]:
        """All passes of a phase on this stage."""
        config, length = context.config, work[0].texts.tokens.shape[1]
        spans = self._spans(length, len(work))
        keeps_graph = phase != "rollout" and not self._recompute

        def on_this_stage(
            item: MicroBatch, metrics: StepAccumulator, positions: Sequence[int] | None = None
        ) -> StageWork:
            head = None
            if self._stage == self._stages - 1:
                head = Head(context, item, objective, metrics, positions)
            return StageWork(self._wrapped, self.decoder, item, spans, config, head, keeps_graph)

        plan = self.plan(config, length, [item.rolls_out for item in work], phase)
        for index, item in enumerate(work if self._rehearses else ()):
            kind = phase, item.texts.tokens.shape, item.rolls_out, len(spans)
            if kind not in self._rehearsed:
                self._rehearsed.add(kind)
                sets = made_up_positions(self._wrapped.module.config.arch, config, length)
                for positions in sets if item.rolls_out else sets[:1]:
                    rehearsed = on_this_stage(item.at(positions), StepAccumulator(), positions)
                    self._rehearse(plan, index, rehearsed, positions)
        on_stage = [on_this_stage(item, metrics) for item in work]
        self._follow(plan, on_stage)
        return on_stage

    def _rehearse(self, plan: Plan, index: int, work: StageWork, positions: Sequence[int]) -> None:
        """The passes of a micro-batch of a new kind on made-up messages, with none sent; gradients,
        which must be zero before, are so again.

        The first launch of a kernel compiles, checks and loads it, and loading may wait for the
        whole device: behind a receive that waits for this stage, for ever. So rollouts at any
        positions must run no kernel that those made up here have not.
        """
        with record_function("refine/rehearse"):
            for item in plan.shape.passes(index):
                known = plan.shape.input_channel(self._stage, item) is None
                message = [] if known else work.made_up_message(item, positions)
                work.run(item, message, last_backward=False)
        if plan.shape.phase != "rollout":
            self._wrapped.zero_grad_buffer()

    def _follow(self, plan: Plan, works: Sequence[StageWork]) -> None:
        """Execute this stage's instructions."""
        instructions = plan.instructions[self._stage]
        last = next(i.item for i in reversed(instructions) if i.action is Action.RUN)
        handed_on: list[Tensor] = []
        for action, item, channel, peer in instructions:
            work = works[item.microbatch]
            if action is Action.RUN:
                message = self._channels.take(item)
                with self.observe(item):
                    handed_on = work.run(item, message, last_backward=item == last)
            elif action is Action.SEND:
                self._channels.send(channel, peer, handed_on)
            else:
                self._channels.post_receive(channel, item, peer, work.input_like(item))
        self._channels.drain()
