"""Measuring training steps; `tools/benchmark_step.py` is the command."""
