"""DeltaNet (Yang et al. 2024, arXiv 2406.06484), as fla's `delta_net` computes it.

q, k, v = SiLU(conv(W x)), q and k of unit norm per head;  beta = sigmoid(W_b x)
S_t = S_{t-1} + k_t (x) beta_t (v_t - S_{t-1}^T k_t);  o_t = S_t^T q_t / sqrt(K)
y = W_o rms(o)
"""

from __future__ import annotations

from refine_kernels.dispatch import delta_gates
from torch import Tensor

from refine_mcore.models.delta_rule_mixer import DeltaRuleMixer, HeadLayout
from refine_mcore.models.parallel_layers import Projection, at_least_float32


class DeltaNet(DeltaRuleMixer):
    """Ungated delta rule; without `use_beta` every write has strength one."""

    def head_layout(self, hidden_size: int) -> HeadLayout:
        heads = self.options.num_heads
        return HeadLayout(
            heads,
            heads,
            self.options.key_head_dim(hidden_size),
            self.options.value_head_dim(hidden_size),
        )

    def gate_projections(self) -> list[Projection]:
        return [Projection("b_proj", self.options.num_heads)] if self.options.use_beta else []

    def gates(self, parts: dict[str, Tensor], v: Tensor) -> tuple[Tensor, None]:
        if not self.options.use_beta:
            return v.new_ones(v.shape[:3], dtype=at_least_float32(v.dtype)), None
        return delta_gates(parts["b_proj"], doubled=self.options.allow_neg_eigval)[0], None
