"""One training step: a batch through its mode, each optimizer step through Megatron's schedule or,
in slices, the pipeline engine, and Megatron's optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.profiler import record_function

from refine_mcore.config import RefineConfig
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import ReducedMetrics, StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.prefix_copy import prefix_copy
from refine_mcore.training.step_modes import StepMode, Work, fused, ntp, two_phase

STEP_MODES: dict[str, StepMode] = {
    "ntp": ntp,
    "fused": fused,
    "two_phase": two_phase,
    "prefix_copy": prefix_copy,
}
# Those that the pipeline engine runs, and whether their micro-batches roll out.
SLICED_MODES = {"ntp": False, "fused": True}


class TrainStep:
    """Runs steps of any mode on one wrapped model and its optimizer."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Any,
        config: RefineConfig,
        seed: int,
        pg_collection: Any,
        engine: PipelineEngine | None = None,
    ) -> None:
        self._model, self._optimizer, self._engine = model, optimizer, engine
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
        module: FastWeightModel = self._model.module
        context = StepContext(module, self._config, Randomness(self._seed, step), self._groups.dp)
        metrics, grad_norm, steps = StepAccumulator(), 0.0, 0
        for run in self._optimizer_steps(mode or self._config.mode, context, batches, metrics):
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

    def _optimizer_steps(
        self,
        mode: str,
        context: StepContext,
        batches: Sequence[TextBatch],
        metrics: StepAccumulator,
    ) -> Iterator[Callable[[], None]]:
        """The forward and backward of each optimizer step that the batch is trained with."""
        if self._engine is None:
            for work in STEP_MODES[mode](context, batches):
                yield partial(forward_backward, self._model, work, metrics)
        else:
            rolls_out = [SLICED_MODES[mode]] * len(batches)
            yield partial(self._engine.forward_backward, context, batches, rolls_out, metrics)


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


def forward_backward(
    model: DistributedDataParallel, work: list[Work], metrics: StepAccumulator
) -> None:
    """Forward and backward of all work items by Megatron's schedule; gradients are summed over
    ranks and items."""

    def forward_step(items: Iterator[Work], model: Any) -> tuple[Tensor, Any]:
        loss, reported = next(items)()
        metrics.add(reported)
        no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)
        return loss, lambda loss: (loss, no_tokens, {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(work),
        model=[model],
        num_microbatches=len(work),
        seq_length=1,
        micro_batch_size=1,
    )
