"""Rotary positions as their definition: pairs as complex numbers, times e^(i angle)."""

import torch
from torch import Tensor


def naive_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Same arguments and result as rotate."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)
