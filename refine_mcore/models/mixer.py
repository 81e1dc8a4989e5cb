"""What every sequence mixer (delta rule, LaCT, attention) is to its layer: one path with an
optional state in and out.

A training forward (no state), a chunked prefill, a decode step and the scoring of branches are the
same function with other lengths and states. Mixers follow Megatron's conventions: submodules in a
dataclass, `[s, b, h]` in and out, heads sharded over the tensor-parallel group; the state is
explicit because `TransformerLayer` has no argument for it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from refine_mcore.models.parallel_layers import MixerModule
from refine_mcore.models.state import FastWeightState, LayerTape
from refine_mcore.models.token_layout import TokenLayout


@dataclass
class MixerSubmodules:
    """The parallel linears of a mixer: Megatron's local ones or Transformer Engine's."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class MixerOutput(NamedTuple):
    """Output [s, 1, h], the state after the tokens (if asked for), the tape of the forward (if
    asked for)."""

    hidden_states: Tensor
    state: FastWeightState | None
    tape: LayerTape | None


class Mixer(MixerModule):
    """A sequence mixer of one layer."""

    def forward(
        self,
        hidden_states: Tensor,
        layout: TokenLayout,
        state: FastWeightState | None = None,
        *,
        output_state: bool = False,
        record: bool = False,
    ) -> MixerOutput:
        """Mix the new tokens [s, 1, h] of the streams that `layout` describes.

        `record` asks for a tape and needs streams that are texts, not branches.
        """
        tokens = layout.split(self.in_proj(hidden_states))
        if layout.packing is None:
            mixed, new_state, tape = self.mix(tokens, state, output_state, record)
        else:
            mixed, new_state, tape = layout.packing.mix(self.mix, tokens, state, record)
        mixed = layout.join(mixed.to(hidden_states.dtype))
        return MixerOutput(self.o_proj(mixed)[0], new_state, tape)

    @abstractmethod
    def mix(
        self, tokens: Tensor, state: FastWeightState | None, output_state: bool, record: bool
    ) -> MixerOutput:
        """What the family does between its projections: packed inputs [R, T, c] to [R, T, value
        size], on this rank's heads."""

    @abstractmethod
    def fixed_state(
        self, state: FastWeightState, tokens: int, rollouts: int
    ) -> FastWeightState | None:
        """A state in fixed places (fixed_state.py) to make `tokens` tokens from, one by one, of
        streams that come in forks of `rollouts`; None for streams that have none. It may refer to
        what `state` has, which whoever takes it keeps."""

    def build_output_projection(self, submodules: MixerSubmodules, size: int) -> Any:
        """The row-parallel projection back to the hidden size."""
        return build_module(
            submodules.out_proj,
            size,
            self.config.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.tp_group,
        )
