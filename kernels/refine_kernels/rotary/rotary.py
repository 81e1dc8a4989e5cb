"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), dimensions paired in halves."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [R,T,heads,dim] with its first n dimensions turned: i and i + n/2 by the angle whose cos
    and sin [R or 1,T,1,n/2] are given, which have no gradients.  Those past n stay as they are.

    Computed in the dtype of cos, returned in that of x.
    """
    half = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(rotated, dim=-1).to(x.dtype)
