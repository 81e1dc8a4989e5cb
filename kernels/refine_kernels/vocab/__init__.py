"""Log-probabilities, entropy and sampling over logits whose vocabulary may be sharded."""
