"""The output layer: Megatron's column-parallel product of hidden states and vocabulary, which can
also give log-probs and entropies alone, without keeping logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from refine_kernels.dispatch import linear_log_probs_and_entropy
from torch import Tensor


class OutputLayer(ColumnParallelLinear):
    """hidden [R, T, h] -> (logits [R, T, V / tp], None); with `targets` [R, T] the pair that
    `FastWeightModel.log_probs_and_entropy` describes.

    Both are the forward of this module: whatever is hooked to that, such as the gather of its
    weight after an optimizer step, comes before either. Either adds the weight's gradient to
    Megatron's buffer by itself where compat.fuse_weight_gradients says so; otherwise it gets there
    through autograd, whole and once for each call.
    """

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        targets: Tensor | None = None,
        with_entropy: bool = False,
        temperature: float = 1.0,
    ) -> Any:
        if targets is None:
            return super().forward(input_, weight, runtime_gather_output)
        own: Any = self.weight if weight is None else weight
        sums = None
        if self.gradient_accumulation_fusion and torch.is_grad_enabled():
            sums = own.main_grad
            own.grad_added_to_main_grad = True  # until DDP's buffers are zero again
        return linear_log_probs_and_entropy(
            input_,
            own,
            targets,
            with_entropy=with_entropy,
            temperature=temperature,
            vocab_size=self.config.arch.vocab_size,
            group=self.tp_group,
            weight_sums=sums,
        )
