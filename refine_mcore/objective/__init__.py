"""The ReFINE objective as pure functions on tensors: no model, no process group, no host sync.

`positions` picks where to roll out, `rewards` compares a rollout with the text, `advantages`
standardises rewards inside a group, `losses` turns them into the clipped policy loss.
Arithmetic is at least fp32 and never below the dtype of the input.
"""
