"""The next-token step by Megatron's own pipeline schedule, whole sequences in 1F1B order: kept as
the reference that tests and benchmarks compare the engine with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch, ntp_loss, predict


def megatron_1f1b(
    wrapped: DistributedDataParallel,
    context: StepContext,
    batches: Sequence[TextBatch],
    metrics: StepAccumulator,
) -> None:
    """Losses and gradients of all micro-batches on this stage; `metrics` fills on the last one."""
    targets = context.global_targets(batches)

    def forward_step(data: Iterator[TextBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(data)
        out = model(batch.tokens)
        if not context.model.post_process:
            return out.hidden, None
        text = predict(context.model, out, batch, with_entropy=False)
        loss = ntp_loss(text, batch, targets)
        metrics.add({"loss_ntp": loss.detach()})
        no_tokens = torch.zeros((), dtype=torch.int, device=loss.device)
        return loss, lambda loss: (loss, no_tokens, {})

    wrapped.config.no_sync_func = wrapped.no_sync
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[wrapped],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.numel(),
        micro_batch_size=1,
    )
    finalize_model_grads([wrapped])
