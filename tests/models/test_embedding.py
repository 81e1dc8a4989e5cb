"""Rows of the embedding, whose gradient goes straight to the buffer where it gathers.

Tensor-parallel shards of it are tested with the layouts (tests/distributed).
"""

from __future__ import annotations

from typing import Any

import torch

from refine_mcore.models.embedding import Embedding
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import transformer_config


def test_gradients_of_a_token_are_summed_in_the_buffers_precision(single_rank: Any) -> None:
    """A token's 250 places in bfloat16: their sum is exact in float32, added to what the buffer
    holds; and the places read the same rows as without."""
    config = transformer_config(preset("tiny-deltanet"), dtype=torch.bfloat16)
    embedding, vocab = Embedding(config, 12, single_rank.tp, is_output_weight=False), 12
    layer, generator = embedding.word_embeddings, torch.Generator().manual_seed(7)
    weight: Any = layer.weight
    weight.data.copy_(torch.randn(weight.shape, generator=generator))
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    tokens = torch.randint(vocab, (1, 250 * vocab), generator=generator)
    plain = embedding(tokens)
    layer.gradient_accumulation_fusion = True
    rows = embedding(tokens)
    assert torch.equal(rows, plain)
    grad = torch.randn(rows.shape, generator=generator).bfloat16()
    rows.backward(grad)

    expected = torch.ones(weight.shape, dtype=torch.float64)
    expected.index_add_(0, tokens[0], grad[:, 0].double())
    error = (weight.main_grad.double() - expected).norm() / expected.norm()
    assert error < 1e-6 and weight.grad_added_to_main_grad
    assert torch.equal(weight.grad, weight)  # for DDP's hook, which reads nothing of it
    (rounded,) = torch.autograd.grad(plain, weight, grad)
    error_of_tensor = (1 + rounded.double() - expected).norm() / expected.norm()
    assert error_of_tensor > 1e-3  # what the test would miss, were the sum one of bfloat16
