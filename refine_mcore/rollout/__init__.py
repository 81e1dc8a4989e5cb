"""Rollouts branched in place from the states of a training forward: where to branch, decoding,
scoring."""
