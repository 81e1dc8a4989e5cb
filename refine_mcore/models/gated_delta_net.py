"""GatedDeltaNet (Yang et al. 2024, arXiv 2412.06464), as fla's `gated_deltanet` computes it.

    g = -exp(A_log) softplus(W_a x + dt_bias)
    S <- exp(g_t) S, then the delta write on the decayed state
    y = W_o (rms(o) * SiLU(W_g x))

A_log and dt_bias are small per-head parameters whose errors compound over the text: they are kept,
and the decay is made, in at least float32.
"""

from __future__ import annotations

from typing import Any

from refine_kernels.dispatch import delta_gates
from torch import Tensor

from refine_mcore.models.delta_rule_mixer import DeltaRuleMixer, HeadLayout
from refine_mcore.models.mixer import MixerSubmodules
from refine_mcore.models.parallel_layers import (
    Projection,
    at_least_float32,
    row_sharded_parameter,
)
from refine_mcore.models.transformer_config import FastWeightConfig


class GatedDeltaNet(DeltaRuleMixer):
    """Delta rule with a scalar decay per token and value head."""

    def __init__(
        self,
        config: FastWeightConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        pg_collection: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection)
        for name in ("A_log", "dt_bias"):
            heads = self.heads.value_heads // self.tp_size
            dtype = at_least_float32(config.params_dtype)
            self.register_parameter(name, row_sharded_parameter((heads,), config, dtype))
            self.raw_parameters[name] = name
        self.row_sharded |= {"A_log", "dt_bias"}

    def head_layout(self, hidden_size: int) -> HeadLayout:
        options = self.options
        return HeadLayout(
            options.num_heads, options.value_heads, options.head_dim, options.value_head_dim
        )

    def gate_projections(self) -> list[Projection]:
        heads = self.options.value_heads
        return [Projection("b_proj", heads), Projection("a_proj", heads)]

    def gates(self, parts: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor | None]:
        return delta_gates(
            parts["b_proj"],
            parts["a_proj"],
            self.dt_bias,
            self.A_log,
            doubled=self.options.allow_neg_eigval,
        )
