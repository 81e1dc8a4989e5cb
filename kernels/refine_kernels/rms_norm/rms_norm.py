"""RMS norm whose backward starts from the input again.

Autograd would keep the input and the normalised values in float32, four times the bytes of a
bfloat16 input; both are cheaper to make again than to read.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, times silu(gate) if given, plus
    ``base`` if given.

    x [..., D]; weight [D]; gate of the shape of x, or with a last dimension of 1; base of the shape
    and dtype of x.  Computed in at least float32, returned in the dtype of x.  Differentiable once.
    """
    return _RMSNorm.apply(x, weight, gate, base, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, base: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
        if base is not None:
            y = y + base
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With u = x / rms(x) and d the gradient of u: dx = (d - u mean(d u)) / rms(x)."""
        x, weight, gate = ctx.saved_tensors
        of_base = grad if ctx.needs_input_grad[3] else None
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, gain, grad = x.to(dtype), weight.to(dtype), grad.to(dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(ctx.eps))
        unit = wide * scale
        grad_gate = None
        if gate is not None:
            z = gate.to(dtype)
            of_silu = (grad * unit * gain).sum_to_size(z.shape)
            grad_gate = torch.ops.aten.silu_backward(of_silu, z).to(gate.dtype)
            grad = grad * F.silu(z)
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad_unit = grad * gain
        along = (grad_unit * unit).mean(-1, keepdim=True)
        grad_x = grad_unit.sub_(unit.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_gate, of_base, None
