"""The gated delta rule token by token (Yang et al. 2024, "Gated Delta Networks", eq. 10).

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T     o_t = scale S_t^T q_t

One loop defines both rules; it lives beside the ungated rule.
"""

from refine_kernels.delta_rule.naive import naive_gated_delta_rule

__all__ = ["naive_gated_delta_rule"]
