"""Training: the ReFINE step, the optimizer loop around it, checkpoints and metrics."""
