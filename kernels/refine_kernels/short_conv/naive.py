"""The short causal convolution written as its definition, one tap at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(sum_j w_j u_{t-(W-1)+j}) with u = initial_state (or zeros) followed by x.

    x [B,T,D]; weight [D,1,W]; initial_state [B,W-1,D]; activation "silu" or None.
    Returns (y [B,T,D], the last W-1 inputs [B,W-1,D]).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    width, t = weight.shape[-1], x.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    u = torch.cat((initial_state.to(x.dtype), x), 1)
    terms = [u[:, j : j + t].to(dtype) * weight[:, 0, j].to(dtype) for j in range(width)]
    y = torch.stack(terms).sum(0)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), u[:, t:]
