"""Causal softmax attention of a text, full or over a window."""
