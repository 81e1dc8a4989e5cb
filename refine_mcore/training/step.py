"""One training step: the parts of its mode, one after the other, each through the engine, and
Megatron's optimizer after those that train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch.profiler import record_function

from refine_mcore.config import RefineConfig
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.micro_batch import MicroBatch, StoredRollouts
from refine_mcore.pipeline.modes import parts_of_step
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import ReducedMetrics, StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.prefix_copy import prefix_copy


class TrainStep:
    """Runs steps of any mode on one wrapped model and its optimizer."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Any,
        config: RefineConfig,
        seed: int,
        pg_collection: Any,
        engine: PipelineEngine,
    ) -> None:
        self._model, self._optimizer, self.engine = model, optimizer, engine
        self._config, self._seed, self._groups = config, seed, pg_collection
        # Optimizer steps skipped since the last one that was taken.
        self.skipped_in_a_row = 0

    def __call__(
        self, batches: Sequence[TextBatch], step: int, mode: str | None = None
    ) -> tuple[ReducedMetrics, float]:
        """Train on this rank's micro-batches of batch `step`; `mode` overrides the configured one.

        Returns the step's metrics over all ranks and the gradient norm before clipping, of the last
        optimizer step or of the first that was skipped.
        """
        context, metrics, grad_norm, steps = self.context(step), StepAccumulator(), 0.0, 0
        for run in self.optimizer_steps(mode or self._config.mode, context, batches, metrics):
            self._model.zero_grad_buffer()
            self._optimizer.zero_grad()
            run()
            with record_function("refine/optimizer"):
                norm = step_if_finite(self._optimizer)
            if math.isfinite(norm):
                self.skipped_in_a_row = 0
            else:
                self.skipped_in_a_row += 1
                metrics.skipped_steps += 1
            grad_norm, steps = norm if math.isfinite(grad_norm) else grad_norm, steps + 1
        return metrics.reduce(self._groups, steps), grad_norm

    def context(self, step: int) -> StepContext:
        """What the parts of batch `step` know of it."""
        randomness = Randomness(self._seed, step)
        return StepContext(self._model.module, self._config, randomness, self._groups.dp)

    def optimizer_steps(
        self,
        mode: str,
        context: StepContext,
        batches: Sequence[TextBatch],
        metrics: StepAccumulator,
    ) -> Iterator[Callable[[], None]]:
        """The forward and backward of each optimizer step that the batch is trained with."""
        if mode == "prefix_copy":
            yield partial(prefix_copy, self._model, context, batches, metrics)
            return
        sequences = batches[0].tokens.shape[0] * self._groups.dp.size()
        stored: dict[int, StoredRollouts] = {}
        for part in parts_of_step(mode, context.config, len(batches), sequences):
            if part.phase == "rollout":
                texts = [batches[index] for index in part.micro_batches]
                rollouts = self.engine.roll_out(context, texts, metrics)
                stored = dict(zip(part.micro_batches, rollouts, strict=True))
                continue
            work = [
                MicroBatch(batches[index], rolls_out, stored.pop(index, None))
                for index, rolls_out in zip(part.micro_batches, part.rolls_out, strict=True)
            ]
            yield partial(self.engine.forward_backward, context, work, metrics)


def step_if_finite(optimizer: Any) -> float:
    """Megatron's optimizer step, unless the gradient's norm over all ranks, which is returned, is
    not finite: then weights, moments and Adam's count of steps stay as they are."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if math.isfinite(norm):
        for part in optimizer.chained_optimizers:
            if part.config.clip_grad > 0.0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
        optimizer.step_with_ready_grads()
    return norm
