"""A state between two that the chunkwise form returns, read from the writes since the first.

With the writes U of the tokens 1 to T and their cumulated log decay c_t,

    S_T = exp(c_T) S_0 + sum_t exp(c_T - c_t) k_t u_t^T,

so that a state anywhere in a text costs one product, forward and backward: the writes have their
gradients from the pass over the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.delta_rule.chunk import unit_per_head


def state_from_writes(
    state: Tensor,
    k: Tensor,
    writes: Tensor,
    g: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    qk_norm_eps: float | None = None,
) -> Tensor:
    """The state [R,H,K,V] after T tokens from the one before them, or after the first counts[r].

    state [R,H,K,V]; keys k [R,T,G,K] and norm as in chunk_delta_rule; writes [R,T,H,V]; log decay
    g [R,T,H], None for none; counts [R], whole numbers.
    """
    if counts is not None:
        inside = torch.arange(k.shape[1], device=k.device) < counts[:, None]
        writes = writes * inside[..., None, None]
        g = None if g is None else g * inside[..., None]
    keys = unit_per_head(k.to(state.dtype), state.shape[1], qk_norm_eps)
    if g is not None:
        g = g.to(state.dtype)
        # c_T - c_t as sums of what comes later: differences would lose what is small beside c_T
        later = F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
        keys = keys * later.exp()[..., None]
        state = (later[:, 0] + g[:, 0])[..., None, None].exp() * state
    # [R,H,K,T] x [R,H,T,V]
    written = keys.permute(0, 2, 3, 1) @ writes.to(state.dtype).transpose(1, 2)
    return state + written
