"""The delta rule token by token: the definition that the other forms are tested against.

    S_t = S_{t-1} + k_t (beta_t (v_t - S_{t-1}^T k_t))^T          o_t = scale * S_t^T q_t

(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", eq. 2-3.)  Queries and
keys are used as they come unless their norm is asked for.
"""

import torch
from torch import Tensor


def naive_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence literally.

    q, k [B,T,G,K]; v [B,T,H,V]; beta [B,T,H]; initial_state [B,H,K,V] or None for zeros;
    scale defaults to K**-0.5; value head h uses query and key head h // (H / G); q and k are
    divided by sqrt(sum of squares + qk_norm_eps) if that is given.  Returns o [B,T,H,V] in the
    dtype of v and the final state [B,H,K,V] in at least float32.
    """
    no_decay = torch.zeros_like(beta)
    return naive_gated_delta_rule(
        q, k, v, beta, no_decay, scale=scale, qk_norm_eps=qk_norm_eps, initial_state=initial_state
    )


def naive_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`naive_delta_rule` with the state decayed by exp(g_t) before each token's write.

    g [B,T,H] is the log of the decay, <= 0.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    out_dtype = v.dtype
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, beta, g = (x.to(dtype) for x in (q, k, v, beta, g))
    if qk_norm_eps is not None:
        q, k = (x / (x.square().sum(-1, keepdim=True) + qk_norm_eps).sqrt() for x in (q, k))
    b, t, h, v_dim = v.shape
    head = [i // (h // k.shape[2]) for i in range(h)]
    q, k = q[:, :, head], k[:, :, head]
    state = k.new_zeros(b, h, k.shape[-1], v_dim) if initial_state is None else initial_state
    state = state.to(dtype)
    outputs = []
    for i in range(t):
        state = g[:, i, :, None, None].exp() * state
        predicted = torch.einsum("bhkv,bhk->bhv", state, k[:, i])
        write = beta[:, i, :, None] * (v[:, i] - predicted)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, i], write)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, i]))
    return torch.stack(outputs, 1).to(out_dtype), state
