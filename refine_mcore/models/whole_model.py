"""All stages of a pipelined model as one model, for evaluation.

The stages run one after the other, with nothing in between to fill the wait; training uses the
engine (pipeline/engine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from refine_mcore.models.fast_weight_model import FastWeightModel, LanguageModel, ModelOutput
from refine_mcore.models.packing import Documents
from refine_mcore.models.parallel_layers import at_least_float32
from refine_mcore.models.state import FastWeightState
from refine_mcore.platform import device


def whole_model(model: FastWeightModel) -> LanguageModel:
    """The model that this rank's stage is a part of: the stage itself if it is the only one."""
    return model if model.pp_group.size() == 1 else WholeModel(model)


class WholeModel:
    """What a `FastWeightModel` of a single stage gives, by all stages of a pipeline together.

    Every rank of the pipeline makes the same calls with the same tokens and gets the same hidden
    states and logits; states and tapes are of its own layers. If all of them call `backward` on the
    same loss, each gets the gradients of its own parameters (embeddings that are tied: its share).
    """

    def __init__(self, model: FastWeightModel) -> None:
        self.config, self.tp_group = model.config, model.tp_group
        self._stage, self._pipeline = model, model.pp_group
        self._rank, self._last = model.pp_group.rank(), model.pp_group.size() - 1

    def __call__(
        self,
        tokens: Tensor,
        states: Sequence[FastWeightState] | None = None,
        *,
        start: int = 0,
        documents: Documents | None = None,
        output_states: bool = False,
        record: bool = False,
    ) -> ModelOutput:
        """As `FastWeightModel.forward`, `hidden` [R, T, h] on every stage."""
        between = self._stage.between_stages(*tokens.shape)
        if self._rank > 0:
            # Gradients travel in the order of their calls, the last call first on every stage: that
            # is how autograd runs them.
            hidden = self._receive(between, self._rank - 1).requires_grad_()
            hidden.register_hook(lambda gradient: self._send(gradient, self._rank - 1))
            self._stage.set_input_tensor(hidden)
        out = self._stage(
            tokens,
            states,
            start=start,
            documents=documents,
            output_states=output_states,
            record=record,
        )
        if self._rank < self._last:
            self._send(out.hidden.detach(), self._rank + 1)
        hidden = self._of_last_stage(
            out.hidden,
            (*tokens.shape, self.config.hidden_size),
            lambda: self._receive(between, self._rank + 1),
        )
        return replace(out, hidden=hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `FastWeightModel.logits`, on every stage."""
        on_last = self._rank == self._last
        return self._of_last_stage(
            self._stage.logits(hidden) if on_last else hidden,
            (*hidden.shape[:-1], self._stage.vocab_size // self.tp_group.size()),
            lambda: torch.zeros_like(hidden),  # the last stage has it
        )

    def log_probs_and_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        with_entropy: bool,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """As `FastWeightModel.log_probs_and_entropy`, on every stage."""
        log_probs, entropy = hidden, None
        if self._rank == self._last:
            log_probs, entropy = self._stage.log_probs_and_entropy(
                hidden, targets, with_entropy=with_entropy, temperature=temperature
            )
        dtype = at_least_float32(hidden.dtype)
        log_probs = self._of_last_stage(
            log_probs, targets.shape, lambda: torch.zeros_like(hidden), dtype
        )
        if with_entropy:
            found = hidden if entropy is None else entropy
            with torch.no_grad():
                entropy = self._of_last_stage(found, targets.shape, found.clone, dtype)
        return log_probs, entropy

    def _of_last_stage(
        self,
        x: Tensor,
        shape: tuple[int, ...],
        gradient: Callable[[], Tensor],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The last stage's `x`. On the stages before it, where it has this `shape` and `dtype` and
        follows from their own `x`, that gets what `gradient()` gives."""
        if self._rank == self._last:
            dist.broadcast(x.detach().contiguous(), group=self._pipeline, group_src=self._last)
            return x
        value = self._empty(shape, dtype)
        dist.broadcast(value, group=self._pipeline, group_src=self._last)
        return _MadeElsewhere.apply(x, value, gradient)

    def _send(self, x: Tensor, stage: int) -> None:
        dist.send(x.contiguous(), group=self._pipeline, group_dst=stage)

    def _receive(self, shape: tuple[int, ...], stage: int) -> Tensor:
        x = self._empty(shape)
        dist.recv(x, group=self._pipeline, group_src=stage)
        return x

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.config.pipeline_dtype, device=device())


class _MadeElsewhere(torch.autograd.Function):
    """`value`, which other ranks made of x, where `gradient()` of x comes from too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Callable[[], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(), None, None
