"""The gated delta rule: the delta rule on a state that is first decayed by exp(g_t)."""
