"""The fast queries and keys of LaCT, from those of its attention."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.recompute import recomputed

FEATURE_EPS = 1e-5


def fast_features(x: Tensor, scale: Tensor, offset: Tensor, *, head_dim: int, silu: bool) -> Tensor:
    """x [R,T,width] -> [R,T,n,head_dim]: each channel times its scale [width] plus its offset,
    SiLU if asked for, then y / (|y| + 1e-5) head by head; unlike the delta rules' norm the eps is
    outside the root.

    The backward makes all between again.
    """
    features = partial(_features, head_dim=head_dim, silu=silu)
    return recomputed(features, x, scale, offset)


def _features(x: Tensor, scale: Tensor, offset: Tensor, *, head_dim: int, silu: bool) -> Tensor:
    x = x * scale + offset
    x = F.silu(x) if silu else x
    wide = x.unflatten(-1, (-1, head_dim)).to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / (norm + FEATURE_EPS)).to(x.dtype)
