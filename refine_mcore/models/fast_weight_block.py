"""Megatron's transformer layer and block with an explicit fast-weight state in and out.

`TransformerLayer` calls its attention with fixed keyword arguments and `TransformerBlock.forward`
takes no others, so both forwards are written here around the modules Megatron builds; construction,
checkpoint names and the MLP half are Megatron's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from refine_kernels.recompute import remaking
from torch import Tensor

from refine_mcore.models.mixer import MixerOutput
from refine_mcore.models.state import FastWeightState, LayerTape
from refine_mcore.models.token_layout import TokenLayout
from refine_mcore.models.transformer_config import FastWeightConfig


@dataclass
class FastWeightLayerSubmodules(TransformerLayerSubmodules):
    """Megatron's, and the norms of a post-norm layer."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


class FastWeightLayer(TransformerLayer):
    """x + post(mixer(pre(x))), then x + post(mlp(pre(x))), on [s, 1, h]: either the norms before or
    those after are identities.

    With selective recomputation it keeps the inputs of what it calls `remade`, and not the outputs.
    """

    config: FastWeightConfig

    def __init__(
        self, config: FastWeightConfig, submodules: FastWeightLayerSubmodules, *args: Any, **kw: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kw)
        for name in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            norm = build_module(
                getattr(submodules, name),
                config=config,
                hidden_size=config.hidden_size,
                eps=config.layernorm_epsilon,
            )
            self.add_module(name, norm)

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        state: FastWeightState | None = None,
        *,
        output_state: bool = False,
        record: bool = False,
    ) -> MixerOutput:
        with remaking() if self.config.selective_recompute else nullcontext():
            mixed = self.self_attention(
                self.input_layernorm(hidden_states),
                layout,
                state,
                output_state=output_state,
                record=record,
            )
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            out = self.post_self_attn_layernorm(mixed.hidden_states)
            hidden_states = add((out, None), hidden_states, self.hidden_dropout)
            return mixed._replace(hidden_states=self._forward_mlp(hidden_states))

    def _forward_post_mlp(self, mlp_output_with_bias: Any, residual: Tensor) -> Tensor:
        out, bias = mlp_output_with_bias
        return super()._forward_post_mlp((self.post_mlp_layernorm(out), bias), residual)


class BlockOutput(NamedTuple):
    """Hidden states [s, 1, h] (after the final norm on the last stage), and per layer the state and
    tape asked for."""

    hidden_states: Tensor
    states: list[FastWeightState] | None
    tapes: list[LayerTape] | None


class FastWeightBlock(TransformerBlock):
    """The layers of one pipeline stage, and the final norm on the last."""

    def forward(
        self,
        hidden_states: Tensor | None,
        layout: TokenLayout,
        states: Sequence[FastWeightState] | None = None,
        *,
        output_states: bool = False,
        record: bool = False,
    ) -> BlockOutput:
        if not self.pre_process:
            hidden_states = self.input_tensor
        # Megatron's pipeline schedules free outputs in place, which views do not allow
        hidden_states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        new_states: list[Any] = []
        tapes: list[Any] = []
        for index, layer in enumerate(self.layers):
            state = None if states is None else states[index]
            hidden_states, state, tape = layer(
                hidden_states, layout, state, output_state=output_states, record=record
            )
            new_states.append(state)
            tapes.append(tape)
        if self.final_layernorm is not None:
            hidden_states = self.final_layernorm(hidden_states)
            hidden_states = make_viewless_tensor(hidden_states, requires_grad=True, keep_graph=True)
        return BlockOutput(
            hidden_states, new_states if output_states else None, tapes if record else None
        )
