"""The delta rule S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T in three equal forms."""
