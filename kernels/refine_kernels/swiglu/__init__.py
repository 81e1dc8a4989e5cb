"""The activation of a gated MLP; keeps nothing but its input."""
