"""Decode form of the delta rule, with and without decay: a few tokens from a given state.

The state is read once per token for both the prediction and the output (o = S_{t-1}^T q decayed,
plus the new write weighted by k.q) and written once; a decode step is bound by that traffic.
"""

import torch
from torch import Tensor

from refine_kernels.delta_rule.chunk import unit_per_head


def recurrent_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Same arguments as chunk_delta_rule; returns (o, final state)."""
    return recurrent_rule(q, k, v, beta, None, scale, qk_norm_eps, initial_state)


def recurrent_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    qk_norm_eps: float | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """Both rules; g [B,T,H] is the log decay (<= 0), None for no decay."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    b, t, h, v_dim = v.shape
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is None:
        initial_state = k.new_zeros(b, h, k.shape[-1], v_dim)
    state = initial_state.to(dtype)
    # rows [B,T,H,1 or 2,K]: the key, and the query below it
    keys = unit_per_head(k.to(dtype), h, qk_norm_eps)[..., None, :]
    rows = keys
    if q is not None:
        queries = unit_per_head(q.to(dtype), h, qk_norm_eps)[..., None, :]
        rows = torch.cat((keys, scale * queries), -2)
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
