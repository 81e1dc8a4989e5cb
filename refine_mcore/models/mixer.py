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


@dataclass
class MixerSubmodules:
    """The parallel linears of a mixer: Megatron's local ones or Transformer Engine's."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class MixerOutput(NamedTuple):
    """Output [s, b, h], the state after the tokens (if asked for), the tape of the forward (if
    asked for)."""

    hidden_states: Tensor
    state: FastWeightState | None
    tape: LayerTape | None


class Mixer(MixerModule):
    """A sequence mixer of one layer."""

    def forward(
        self,
        hidden_states: Tensor,
        state: FastWeightState | None = None,
        *,
        output_state: bool = False,
        record: bool = False,
    ) -> MixerOutput:
        """Mix T new tokens of R streams.

        hidden_states [s, b, h] is either [T, R, h] or the streams laid end to end, [R * T, 1, h],
        which sequence parallelism can cut. `record` asks for a tape and needs streams that are
        texts, not branches.
        """
        return self.mix(hidden_states, state, output_state, record)

    @abstractmethod
    def mix(
        self, x: Tensor, state: FastWeightState | None, output_state: bool, record: bool
    ) -> MixerOutput:
        """`forward`, in the family's own terms."""

    def streams_first(self, x: Tensor, state: FastWeightState | None) -> Tensor:
        """[s, b, c] -> [R, T, c]; the streams are the batch unless the state says how many there
        are."""
        streams = x.shape[1] if state is None else state.num_streams
        return x.transpose(0, 1).reshape(streams, -1, x.shape[-1])

    def project_output(self, y: Tensor, like: Tensor) -> Tensor:
        """[R, T, c] -> output projection -> [s, b, h] in the layout of the input `like`."""
        batch = like.shape[1]
        y = y.reshape(batch, -1, y.shape[-1]).transpose(0, 1)
        return self.o_proj(y.to(like.dtype))[0]

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
