"""RMS norm as its definition; autograd keeps every intermediate."""

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Same arguments and result as rms_norm."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(dtype)
    if gate is not None:
        y = y * F.silu(gate.to(dtype))
    return (y if base is None else y + base).to(x.dtype)
