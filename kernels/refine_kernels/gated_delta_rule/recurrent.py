"""Decode form of the gated delta rule; the loop is in delta_rule/recurrent.py."""

from torch import Tensor

from refine_kernels.delta_rule.recurrent import recurrent_rule


def recurrent_gated_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Same arguments as chunk_gated_delta_rule; returns (o, final state)."""
    return recurrent_rule(q, k, v, beta, g, scale, qk_norm_eps, initial_state)
