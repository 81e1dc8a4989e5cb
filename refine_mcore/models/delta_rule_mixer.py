"""What DeltaNet and GatedDeltaNet share: projections, short convolution, matrix state, output norm
and gate.

State and tape are in delta_rule_state.py.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from refine_kernels.dispatch import (
    ChunkOutput,
    causal_conv1d,
    chunk_delta_rule,
    chunk_gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
    rms_norm,
)
from refine_kernels.recompute import remade
from torch import Tensor

from refine_mcore.models.delta_rule_state import L2_EPS, DeltaRuleState, DeltaRuleTape
from refine_mcore.models.mixer import Mixer, MixerOutput, MixerSubmodules
from refine_mcore.models.parallel_layers import (
    PackedColumnParallelLinear,
    PackedConvolution,
    Projection,
    replicated_parameter,
    shared_by_heads,
)
from refine_mcore.models.state import FastWeightState
from refine_mcore.models.transformer_config import KERNEL_CHUNK, FastWeightConfig

# Most tokens that the recurrent form takes, where nothing is kept for a backward: its time grows
# with them, that of a single chunk hardly.
_FEW_TOKENS = 4


class RecurrenceInputs(NamedTuple):
    """k [R, T, key heads, K], before its norm, v [R, T, heads, V], write strength beta and log
    decay g [R, T, heads]."""

    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None


class HeadLayout(NamedTuple):
    """Heads over all ranks: query/key heads of width `key`, value heads of width `value`."""

    key_heads: int
    value_heads: int
    key: int
    value: int


class DeltaRuleMixer(Mixer):
    """Delta-rule sequence mixer; a family says its heads, its extra projections and its gates."""

    def __init__(
        self,
        config: FastWeightConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        pg_collection: Any,
    ) -> None:
        super().__init__(config, pg_collection.tp)
        mixer: Any = config.arch.mixer
        self.options = mixer
        self.heads = self.head_layout(config.hidden_size)
        self.norm_eps = getattr(mixer, "norm_eps", None) or config.layernorm_epsilon
        key_size = self.heads.key_heads * self.heads.key
        value_size = self.heads.value_heads * self.heads.value
        self.in_proj = PackedColumnParallelLinear(
            submodules.in_proj,
            config,
            [
                Projection("q_proj", key_size),
                Projection("k_proj", key_size),
                Projection("v_proj", value_size),
                *self.gate_projections(),
                *([Projection("g_proj", value_size)] if mixer.use_gate else []),
            ],
            self.tp_group,
        )
        self.conv_sizes = self.in_proj.local_sizes[:3]
        self.conv_width = mixer.conv_size if mixer.use_short_conv else 1
        self.raw_parameters = {"o_norm": "o_norm.weight"}
        if mixer.use_short_conv:
            self.short_conv = PackedConvolution(
                config,
                ("q_conv1d", "k_conv1d", "v_conv1d"),
                self.conv_sizes,
                mixer.conv_size,
                self.tp_group,
            )
        self.o_norm = replicated_parameter((self.heads.value,), config)
        self.o_proj = self.build_output_projection(submodules, value_size)

    @abstractmethod
    def head_layout(self, hidden_size: int) -> HeadLayout:
        """The family's heads."""

    @abstractmethod
    def gate_projections(self) -> list[Projection]:
        """The projections that the gates are made of, beside q, k, v."""

    @abstractmethod
    def gates(self, parts: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and g [R, T, local value heads] for the values v [R, T, heads, V], from the named
        projections, in at least float32."""

    def mix(
        self, tokens: Tensor, state: FastWeightState | None, output_state: bool, record: bool
    ) -> MixerOutput:
        assert state is None or isinstance(state, DeltaRuleState)
        raw, gates = self.split_packed(tokens)
        tape = DeltaRuleTape(self, state) if record else None
        raw = raw if tape is None else tape.record_raw(raw)
        past, initial = (None, None) if state is None else state.of_streams()
        convolved, conv_tail = self.convolve(raw, past)
        q, inputs = self.recurrence_inputs(convolved, gates)
        if tape is not None:
            inputs = tape.record_inputs(inputs)
        out = self.recurrence(
            q, inputs, initial, output_writes=record, output_final_state=output_state or record
        )
        o = out.o if tape is None else tape.record_outputs(KERNEL_CHUNK, out)
        assert o is not None
        gate = gates["g_proj"].reshape(o.shape) if self.options.use_gate else None
        gain = shared_by_heads(self.o_norm, self.tp_group)
        y = remade(rms_norm, o, gain, self.norm_eps, gate)
        after = None
        if output_state:
            assert out.final_state is not None
            after = DeltaRuleState.of(conv_tail, out.final_state)
        return MixerOutput(y.flatten(2), after, tape)

    def fixed_state(
        self, state: FastWeightState, tokens: int, rollouts: int
    ) -> FastWeightState | None:
        """Its shapes never change."""
        assert isinstance(state, DeltaRuleState)
        return state.unshared()

    def split_packed(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inputs of the convolution, q, k and v as they lie side by side, and the gates by
        name. One split: its backward is one concatenation."""
        sizes = [sum(self.conv_sizes), *self.in_proj.widths[3:]]
        names = [projection.name for projection in self.in_proj.projections[3:]]
        raw, *gates = packed.split(sizes, dim=-1)
        return raw, dict(zip(names, gates, strict=False))  # behind them may be padding

    def convolve(self, raw: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """SiLU of the short convolution of q, k, v [R, T, channels] that follow the inputs `past`,
        and the inputs the next token needs."""
        if not self.options.use_short_conv:
            return remade(self.activate, raw), raw[:, :0]
        out, tail = remade(self._short_conv, raw, self.short_conv(), past)
        return out, tail

    def _short_conv(
        self, raw: Tensor, weight: Tensor, past: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        activation = None if self.qk_identity else "silu"
        out, tail = causal_conv1d(raw, weight, past, activation)
        return (self.activate(out) if activation is None else out), tail

    @property
    def qk_identity(self) -> bool:
        """True if q and k take no activation after the convolution."""
        return getattr(self.options, "qk_activation", "silu") == "identity"

    def activate(self, x: Tensor) -> Tensor:
        """SiLU on v, and on q and k unless the family leaves them as they are."""
        if not self.qk_identity:
            return F.silu(x)
        q, k, v = x.split(self.conv_sizes, dim=-1)
        return torch.cat([q, k, F.silu(v)], dim=-1)

    def recurrence_inputs(
        self, convolved: Tensor, gates: dict[str, Tensor]
    ) -> tuple[Tensor, RecurrenceInputs]:
        """q [R, T, key heads, K], before its norm, and what the state is written with."""
        q, k, v = (
            y.unflatten(-1, (-1, width))
            for y, width in zip(
                convolved.split(self.conv_sizes, dim=-1),
                (self.heads.key, self.heads.key, self.heads.value),
                strict=True,
            )
        )
        return q, RecurrenceInputs(k, v, *self.gates(gates, v))

    def recurrence(
        self,
        q: Tensor,
        inputs: RecurrenceInputs,
        initial_state: Tensor | None,
        *,
        output_writes: bool,
        output_final_state: bool,
    ) -> ChunkOutput:
        """Output, the states before each chunk, and the writes and the final state if asked for."""
        k, v, beta, g = inputs
        options: dict[str, Any] = {"initial_state": initial_state, "qk_norm_eps": L2_EPS}
        few = k.shape[1] <= _FEW_TOKENS and initial_state is not None and not output_writes
        if few and not torch.is_grad_enabled():
            if g is None:
                o, final = recurrent_delta_rule(q, k, v, beta, **options)
            else:
                o, final = recurrent_gated_delta_rule(q, k, v, beta, g, **options)
            return ChunkOutput(o, final, [], None)
        options |= {
            "chunk_size": KERNEL_CHUNK,
            "output_writes": output_writes,
            "output_final_state": output_final_state,
        }
        if g is None:
            return chunk_delta_rule(q, k, v, beta, **options)
        return chunk_gated_delta_rule(q, k, v, beta, g, **options)
