"""Large-chunk test-time training: a SwiGLU of fast weights, updated once per chunk."""
