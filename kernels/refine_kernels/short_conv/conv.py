"""Short depthwise causal convolution: training form and decode step in one function.

A convolution of four taps is four shifted multiply-adds; library convolutions want channels first
and padding, two copies of the input.  The backward pass is written by hand so that only the input
is kept: autograd would keep a copy per tap and the sum before the activation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(sum_j w_j u_{t-(W-1)+j}) with u = initial_state (or zeros) followed by x.

    x [B,T,D]; weight [D,1,W]; initial_state [B,W-1,D], the inputs before x; activation "silu" or
    None.  Returns (y [B,T,D], the last W-1 raw inputs [B,W-1,D]), in the dtype of x; computed in
    at least float32.  Differentiable once.
    """
    assert activation in ("silu", None), activation
    tail = weight.shape[-1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], tail, x.shape[2])
    initial_state = initial_state.to(x.dtype)
    y = _CausalConv.apply(x, weight, initial_state, activation == "silu")
    return y, last_inputs(x, initial_state, tail)


def last_inputs(x: Tensor, initial_state: Tensor | None, tail: int) -> Tensor:
    """The last ``tail`` inputs after x: [B,tail,D]."""
    t = x.shape[1]
    if t >= tail:
        return x[:, t - tail :]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], tail, x.shape[2])
    return torch.cat((initial_state[:, t:], x), 1)


def _spans(x: Tensor, initial_state: Tensor) -> list[tuple[Tensor, slice]]:
    """The inputs u of the first outputs, which reach back before x, and those of the others; with
    each the outputs that they make.  x is not copied."""
    t, tail = x.shape[1], initial_state.shape[1]
    n = min(t, tail)
    spans = [(torch.cat((initial_state, x[:, :n]), 1), slice(0, n))] if n else []
    return spans + ([(x, slice(n, t))] if t > n else [])


def _convolve(x: Tensor, weight: Tensor, initial_state: Tensor) -> Tensor:
    """The sum before the activation, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = torch.empty(x.shape, dtype=dtype, device=x.device)
    taps = weight[:, 0].to(dtype).unbind(1)
    for u, outputs in _spans(x, initial_state):
        u, out = u.to(dtype), z[:, outputs]
        torch.mul(u[:, : out.shape[1]], taps[0], out=out)
        for j, w in enumerate(taps[1:], 1):
            out.addcmul_(u[:, j : j + out.shape[1]], w)
    return z


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, initial_state: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, initial_state)
        ctx.silu = silu
        z = _convolve(x, weight, initial_state)
        return (F.silu(z, inplace=True) if silu else z).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, initial_state = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        grad = grad.to(dtype)
        if ctx.silu:
            z = _convolve(x, weight, initial_state)
            grad = torch.ops.aten.silu_backward(grad, z)
        tail = initial_state.shape[1]
        # of the initial state, then of x
        grad_u = grad.new_zeros(x.shape[0], tail + x.shape[1], x.shape[2])
        taps = weight[:, 0].to(dtype).unbind(1)
        grad_taps = grad.new_zeros(len(taps), x.shape[2])
        for u, outputs in _spans(x, initial_state):
            u, grad_z = u.to(dtype), grad[:, outputs]
            n = grad_z.shape[1]
            for j, w in enumerate(taps):
                first = outputs.start + j
                grad_u[:, first : first + n].addcmul_(grad_z, w)
                grad_taps[j] += (grad_z * u[:, j : j + n]).sum((0, 1))
        return (
            grad_u[:, tail:].to(x.dtype),
            grad_taps.t().unsqueeze(1).to(weight.dtype, memory_format=torch.contiguous_format),
            grad_u[:, :tail].to(x.dtype),
            None,
        )
