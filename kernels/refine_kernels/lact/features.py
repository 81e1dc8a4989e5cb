"""What LaCT makes of its queries, or keys: those of its attention and those of its fast weights."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.recompute import recomputed
from refine_kernels.rotary.rotary import rotate

FEATURE_EPS = 1e-5


def attention_and_fast_features(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    column: int,
    head_dim: int,
    silu: bool,
    fast_rope: bool,
) -> tuple[Tensor, Tensor]:
    """Of x [R,T,width] the heads of the attention [R,T,heads,2m] turned by angles whose cos and sin
    [R or 1,T,1,m] are given; and the features [R,T,n,head_dim] of the fast weights: each channel
    times its scale plus its offset, SiLU if asked for, then y / (|y| + 1e-5) head by head (unlike
    the delta rules' norm the eps is outside the root), with fast_rope turned in the attention's
    heads.

    scale and offset [width,C], of which ``column`` is meant: queries and keys share them.  The
    backward makes all between again.
    """
    given = x, scale[:, column], offset[:, column]
    fast = recomputed(partial(_features, head_dim=head_dim, silu=silu), *given)
    heads = (-1, 2 * cos.shape[-1])
    if fast_rope:
        turned = rotate(fast.flatten(2).unflatten(-1, heads), cos, sin)
        fast = turned.flatten(2).unflatten(-1, (-1, head_dim))
    return rotate(x.unflatten(-1, heads), cos, sin), fast


def _features(x: Tensor, scale: Tensor, offset: Tensor, *, head_dim: int, silu: bool) -> Tensor:
    y = x * scale + offset
    y = F.silu(y) if silu else y
    wide = y.unflatten(-1, (-1, head_dim)).to(torch.promote_types(y.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / (norm + FEATURE_EPS)).to(x.dtype)
