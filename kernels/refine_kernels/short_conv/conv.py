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
    t = x.shape[1]
    final_state = x[:, t - tail :] if t >= tail else torch.cat((initial_state[:, t:], x), 1)
    return y, final_state


def _taps(weight: Tensor, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """(tokens back, w_j [D]) of each tap."""
    width = weight.shape[-1]
    return [(width - 1 - j, weight[:, 0, j].to(dtype)) for j in range(width)]


def _convolve(x: Tensor, weight: Tensor, initial_state: Tensor) -> Tensor:
    """The sum before the activation, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    t, tail = x.shape[1], initial_state.shape[1]
    z = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for back, w in _taps(weight, dtype):
        z[:, back:].addcmul_(x[:, : max(0, t - back)].to(dtype), w)
        n = min(back, t)
        z[:, :n].addcmul_(initial_state[:, tail - back : tail - back + n].to(dtype), w)
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
        t, tail = x.shape[1], initial_state.shape[1]
        grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
        grad_initial = torch.zeros(initial_state.shape, dtype=dtype, device=x.device)
        grad_weight = []
        for back, w in _taps(weight, dtype):
            n = min(back, t)
            inputs, reached = x[:, : t - n].to(dtype), grad[:, n:]
            head = slice(tail - back, tail - back + n)
            grad_x[:, : t - n].addcmul_(reached, w)
            grad_initial[:, head].addcmul_(grad[:, :n], w)
            grad_weight.append(
                (reached * inputs).sum((0, 1)) + (grad[:, :n] * initial_state[:, head]).sum((0, 1))
            )
        return (
            grad_x.to(x.dtype),
            torch.stack(grad_weight, -1).unsqueeze(1).to(weight.dtype),
            grad_initial.to(x.dtype),
            None,
        )
