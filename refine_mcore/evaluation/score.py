"""Logits, hidden states, losses, in-place rollouts and gradients of given tokens: what a conversion
is checked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from refine_mcore.config import OptimizerConfig, RefineConfig
from refine_mcore.conversion.parameters import HFParameter, hf_parameter_map, to_hf_tensors
from refine_mcore.models.fast_weight_model import FastWeightModel, LanguageModel
from refine_mcore.models.sharding import full_tensors, main_gradient
from refine_mcore.models.whole_model import whole_model
from refine_mcore.rollout.branches import Branches, Randomness
from refine_mcore.rollout.decode import decode
from refine_mcore.step.refine_loss import (
    TextBatch,
    TextPass,
    ntp_loss,
    text_pass,
)
from refine_mcore.training.optimizer import wrap_data_parallel


def score_tokens(
    stage: FastWeightModel,
    pg_collection: Any,
    tokens: Tensor,
    *,
    rollout_at: Sequence[int] = (),
    rollout_tokens: int = RefineConfig.rollout_tokens,
    seed: int | None = None,
    gradients: bool = False,
    parameters: Sequence[HFParameter] | None = None,
) -> dict[str, Tensor]:
    """Everything `tools/score.py` writes, by name, for tokens [B, T].

    logits [B, T, V], hidden [B, T, d] (after the final norm), entropy [B, T], logprob [B, T - 1],
    loss [1] (mean over the B (T - 1) next tokens). For each position in `rollout_at`:
    `rollout_t{position}.tokens` [B, k] and `.logits` [B, k, V], branched in place from that one
    forward, greedy or drawn with `seed`. With `gradients`, `gradient.<Hugging Face name>` of the
    loss, in at least float32; those are on rank 0 only, and named as in `parameters`, or else as
    the architecture's model type has them.

    `stage` is this rank's part of the model. Every rank calls it; replicas would add up.
    """
    model = whole_model(stage)
    wrapped = wrap_data_parallel(stage, OptimizerConfig(), pg_collection) if gradients else None
    mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = TextBatch(tokens, mask, torch.arange(tokens.shape[0]))
    with torch.set_grad_enabled(gradients):
        text = text_pass(model, batch, with_entropy=True, record=bool(rollout_at))
        loss = ntp_loss(text, batch, batch.num_targets())
    with torch.no_grad():
        logits = model.logits(text.hidden)
    assert text.entropy is not None
    result = {
        "logits": _whole_vocabulary(model, logits),
        "hidden": text.hidden.detach(),
        "entropy": text.entropy,
        "logprob": text.log_probs.detach()[:, :-1],
        "loss": loss.detach()[None],
    }
    for position in rollout_at:
        rolled, emitted = _roll_out_at(model, batch, text, logits, position, rollout_tokens, seed)
        result[f"rollout_t{position}.tokens"] = rolled
        result[f"rollout_t{position}.logits"] = _whole_vocabulary(model, emitted)
    if wrapped is not None:
        loss.backward()
        # sums the shares of norms under sequence parallelism and of tied embeddings
        finalize_model_grads([wrapped])
        by_key = full_tensors(stage, main_gradient)
        if by_key:
            table = parameters or hf_parameter_map(model.config.arch)
            by_name = to_hf_tensors(table, by_key)
            result |= {f"gradient.{name}": gradient for name, gradient in by_name.items()}
    return {name: tensor.contiguous().cpu() for name, tensor in result.items()}


def _roll_out_at(
    model: LanguageModel,
    batch: TextBatch,
    text: TextPass,
    logits: Tensor,
    position: int,
    k: int,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    branches = Branches.at([[position]] * batch.tokens.shape[0])
    keys = None
    if seed is not None:
        keys = Randomness(seed, 0).token_keys(batch.sample_index, branches, 1, k)
    emitted: list[Tensor] = []
    assert text.tape is not None
    with torch.no_grad():
        tokens, _ = decode(
            model,
            text.tape.at(branches.batch_index, branches.position),
            branches.rows_before(logits),
            k,
            keys,
            observe=emitted.append,
        )
    return tokens, torch.stack(emitted, 1)


def _whole_vocabulary(model: LanguageModel, logits: Tensor) -> Tensor:
    """[..., V / tp] -> [..., V], without the padding."""
    whole = gather_from_tensor_model_parallel_region(logits, group=model.tp_group)
    return whole[..., : model.config.arch.vocab_size]
