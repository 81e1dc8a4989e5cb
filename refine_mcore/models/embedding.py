"""The embedding: rows of Megatron's vocabulary-parallel matrix, one for each token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_mcore.models.transformer_config import FastWeightConfig


class Embedding(MegatronModule):
    """tokens [1, s] -> [s, 1, h], of which under sequence parallelism each rank has s / tp.

    Megatron's `LanguageModelEmbedding` without positions, token types and dropout.
    """

    def __init__(
        self,
        config: FastWeightConfig,
        vocab_size: int,
        tp_group: torch.distributed.ProcessGroup,
        *,
        is_output_weight: bool,
    ) -> None:
        super().__init__(config)
        self.word_embeddings = WordEmbeddings(
            vocab_size,
            config.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tp_group,
        )
        self.word_embeddings.is_output_weight = is_output_weight

    def forward(self, tokens: Tensor) -> Tensor:
        rows: Tensor = self.word_embeddings(tokens)
        return rows if self.config.sequence_parallel else rows.transpose(0, 1)


class WordEmbeddings(VocabParallelEmbedding):
    """Megatron's, whose gradient can go to the buffer where it gathers row by row: without a tensor
    of the vocabulary's size for every slice of a text and for its branches, and without rounding
    the sum over a token's places to the weight's dtype.

    `compat.fuse_weight_gradients` says whether.
    """

    gradient_accumulation_fusion = False
    is_output_weight = False  # whether the output layer has no weight but this one

    def forward(self, tokens: Tensor) -> Tensor:
        if not (self.gradient_accumulation_fusion and torch.is_grad_enabled()):
            return super().forward(tokens)
        first, stop = self.vocab_start_index, self.vocab_end_index
        own = None
        if self.tp_group.size() > 1:
            own = (tokens >= first) & (tokens < stop)
            tokens = (tokens - first).where(own, 0)
        rows = _Rows.apply(self.weight, tokens, own, self.is_output_weight)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Rows(torch.autograd.Function):
    """weight[index], zeros where a row is not `own`; the gradient is added to `weight.main_grad`.

    Autograd is handed the weight in its place, for DDP's hook, which reads nothing of it; nothing
    where the output layer, in the same backward pass, does so.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, index: Tensor, own: Tensor | None, is_output_weight: bool
    ) -> Tensor:
        ctx.save_for_backward(index, own)
        ctx.weight, ctx.is_output_weight = weight, is_output_weight
        return _only(own, F.embedding(index, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, own = ctx.saved_tensors
        weight, sums = ctx.weight, ctx.weight.main_grad
        rows = _only(own, grad).flatten(0, -2).to(sums.dtype)
        # not index_add_, whose order of summation on a GPU is another every time
        sums.index_put_((index.flatten(),), rows, accumulate=True)
        weight.grad_added_to_main_grad = True
        return None if ctx.is_output_weight else weight.detach(), None, None, None


def _only(own: Tensor | None, rows: Tensor) -> Tensor:
    return rows if own is None else rows.masked_fill(~own[..., None], 0.0)
