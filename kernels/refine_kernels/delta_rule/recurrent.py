"""Decode form of the delta rule, with and without decay: a few tokens from a given state.

The state is read once per token for both the prediction and the output (o = S_{t-1}^T q decayed,
plus the new write weighted by k.q) and written once; a decode step is bound by that traffic.
"""

import torch
from torch import Tensor


def recurrent_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Same arguments as chunk_delta_rule; returns (o, final state)."""
    return recurrent_rule(q, k, v, beta, None, scale, initial_state)


def recurrent_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Both rules; g [B,T,H] is the log decay (<= 0), None for no decay."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    b, t, h, k_dim = k.shape
    scale = k_dim**-0.5 if scale is None else scale
    state = k.new_zeros(b, h, k_dim, v.shape[-1]) if initial_state is None else initial_state
    state = state.to(dtype)
    # rows [B,T,H,1 or 2,K]: the key, and the query below it
    keys = k.to(dtype)[..., None, :]
    rows = keys if q is None else torch.cat((keys, scale * q.to(dtype)[..., None, :]), -2)
    overlap = rows @ keys.transpose(-1, -2)
    values, rates = v.to(dtype), beta.to(dtype)[..., None]
    decays = None if g is None else g.to(dtype).exp()[..., None, None]
    outputs = []
    for i in range(t):
        if decays is not None:
            state = decays[:, i] * state
        read = rows[:, i] @ state
        write = rates[:, i] * (values[:, i] - read[..., 0, :])
        state = torch.addcmul(state, keys[:, i].transpose(-1, -2), write[..., None, :])
        if q is not None:
            outputs.append(read[..., 1, :] + overlap[:, i, :, 1] * write)
    return (torch.stack(outputs, 1).to(v.dtype) if outputs else None), state
