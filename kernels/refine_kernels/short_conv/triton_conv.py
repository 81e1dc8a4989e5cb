"""The short causal convolution as one pass over memory each way: what conv.py computes, in Triton.

A program takes some tokens of some channels.  The backward makes the sums before the activation
again, those of the next few tokens too, whose outputs read these inputs: that costs loads from
cache and saves a tensor of the text's size.  Each program sums its own share of the gradient of the
taps, and torch adds those up.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement, launch
from refine_kernels.short_conv import conv as by_torch
from refine_kernels.triton_variant import Variant, integers, variant

_WIDEST = 8
# Tokens and numbers that a program holds at a time: of each the backward makes a dozen and a half.
_TOKENS, _TILE = 8, 512
_BLOCKS = 16  # of tokens, one after the other, that a program of the backward takes
_SHORT_TEXTS = 32  # of one block, that a program of the backward takes at most


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As conv.causal_conv1d."""
    assert activation in ("silu", None), activation
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype)
    y = _CausalConv.apply(x, weight, initial_state, activation == "silu")
    return y, by_torch.last_inputs(x, initial_state, weight.shape[-1] - 1)


def refusal(
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    activation: str | None = None,
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are."""
    width = weight.shape[-1]
    if width > _WIDEST:
        return f"{width} taps are more than {_WIDEST}"
    return agreement.unknown_dtype(x.dtype) or _disagreement(
        width, initial_state is not None, activation, x.dtype, x.device
    )


@functools.cache
def _disagreement(
    width: int, past: bool, activation: str | None, dtype: torch.dtype, device: torch.device
) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 150, 70, generator=gen),
        "weight": torch.randn(70, 1, width, generator=gen),
    }
    if past:
        inputs["initial state"] = torch.randn(2, width - 1, 70, generator=gen)

    def of(form: Any) -> agreement.Form:
        return lambda x, weight, past=None: [form(x, weight, past, activation)[0]]

    return agreement.disagreement(
        of(causal_conv1d),
        of(by_torch.causal_conv1d),
        {name: x.to(device, dtype) for name, x in inputs.items()},
        ["output"],
        tolerance=agreement.TOLERANCE[dtype],
    )


def _constants(width: int, silu: bool, tokens: int) -> dict[str, Any]:
    tokens = min(_TOKENS, triton.next_power_of_2(tokens))
    return {"W": width, "SILU": silu, "BT": tokens, "BD": _TILE // tokens, "num_warps": 4}


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, past: Tensor | None, silu: bool) -> Tensor:
        x, weight = launch.dense_rows(x), weight.contiguous()
        past = None if past is None else launch.dense_rows(past)
        ctx.save_for_backward(x, weight, past)
        ctx.silu = silu
        texts, tokens, channels = x.shape
        y = launch.empty(x.shape, x.dtype, x.device)
        constants = _constants(weight.shape[-1], silu, tokens)
        grid = (
            triton.cdiv(tokens, constants["BT"]),
            triton.cdiv(channels, constants["BD"]),
            texts,
        )
        launch.run(conv_forward, grid, x, weight, past, y, *_sizes(x, past), **constants)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, past = ctx.saved_tensors
        texts, tokens, channels = x.shape
        width = weight.shape[-1]
        grad_x = launch.empty(x.shape, x.dtype, x.device)
        grad_past = None if past is None else launch.empty(past.shape, past.dtype, past.device)
        # the inputs, those before x first
        constants = _constants(width, ctx.silu, tokens + width - 1)
        blocks = min(_BLOCKS, triton.cdiv(tokens + width - 1, constants["BT"]))
        parts = triton.cdiv(tokens + width - 1, constants["BT"] * blocks)
        # of short texts a program takes all: it has the weight's whole gradient
        alone = parts == 1 and texts <= _SHORT_TEXTS
        grid = (parts, triton.cdiv(channels, constants["BD"]), 1 if alone else texts)
        grad_weight = launch.empty(
            weight.shape if alone else (grid[2] * parts, *weight.shape),
            weight.dtype if alone else torch.float32,
            x.device,
        )
        launch.run(
            conv_backward,
            grid,
            *(x, weight, past, grad.contiguous(), grad_x, grad_past, grad_weight),
            *(texts if alone else 1, blocks, *_sizes(x, past)),
            **constants,
            BW=triton.next_power_of_2(width),
        )
        if not alone:
            grad_weight = grad_weight.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_past, None


def _sizes(x: Tensor, past: Tensor | None) -> tuple[int, ...]:
    """Tokens, channels and strides of x [B,T,D], strides of the past."""
    return x.shape[1], x.shape[2], *x.stride()[:2], *((0, 0) if past is None else past.stride()[:2])


@triton.jit
def _input(
    x, past, first, j, channel, tokens, channels, stride_token, stride_past, W, BT: tl.constexpr
):
    """Inputs u of tokens first + j + (0 ... BT - 1) of a text [BT, BD]: x, before it the past, else
    zero.  Addresses are counted from the first of them, in 32 bits."""
    step = tl.arange(0, BT)
    t = first + j + step
    inside = (channel < channels)[None, :]
    x += (first + j).to(tl.int64) * stride_token
    at = x + (step[:, None] * stride_token + channel[None, :])
    u = tl.load(at, mask=inside & ((t >= 0) & (t < tokens))[:, None], other=0.0).to(tl.float32)
    if past is not None:  # noqa: SIM102  known when compiled, the next one is not
        if first + j < 0:
            at = past + ((t + W - 1)[:, None] * stride_past + channel[None, :])
            known = inside & ((t < 0) & (t > -W))[:, None]
            u += tl.load(at, mask=known, other=0.0).to(tl.float32)
    return u


@triton.jit
def conv_forward(
    x,
    weight,
    past,
    y,
    tokens,
    channels,
    stride_text,
    stride_token,
    stride_past_text,
    stride_past,
    W: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """y_t = act(sum_j w_j u_{t-(W-1)+j})."""
    first = tl.program_id(0) * BT
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    text = tl.program_id(2).to(tl.int64)
    x += text * stride_text
    if past is not None:
        past += text * stride_past_text
    z = tl.zeros((BT, BD), tl.float32)
    for j in tl.static_range(W):
        w = tl.load(weight + channel * W + j, mask=channel < channels, other=0.0).to(tl.float32)
        u = _input(
            x, past, first, j - (W - 1), channel, tokens, channels, stride_token, stride_past, W, BT
        )
        z += w[None, :] * u
    if SILU:
        z *= tl.sigmoid(z)
    step = tl.arange(0, BT)
    y += (text * tokens + first) * channels
    inside = (first + step < tokens)[:, None] & (channel < channels)[None, :]
    at = y + (step[:, None] * channels + channel[None, :])
    tl.store(at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def conv_backward(
    x,
    weight,
    past,
    grad,
    grad_x,
    grad_past,
    grad_weight,
    texts,
    blocks,
    tokens,
    channels,
    stride_text,
    stride_token,
    stride_past_text,
    stride_past,
    W: tl.constexpr,
    BW: tl.constexpr,
    SILU: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """With e_t the gradient of the sum before the activation: du_s = sum_j w_j e_{s+(W-1)-j} and
    dw_j = sum_t e_t u_{t-(W-1)+j}; s from -(W-1) on.  Of some blocks of some texts."""
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    text = tl.program_id(2).to(tl.int64) * texts
    x += text * stride_text
    grad += text * tokens * channels
    grad_x += text * tokens * channels
    if past is not None:
        past += text * stride_past_text
        grad_past += text * (W - 1) * channels
    step, taps = tl.arange(0, BT), tl.arange(0, BW)
    inside = (channel < channels)[None, :]
    offset = step[:, None] * channels + channel[None, :]
    of_weight = tl.zeros((BW, BD), tl.float32)
    for number in range(texts * blocks):
        block = number % blocks
        first = (tl.program_id(0) * blocks + block) * BT - (W - 1)
        total = tl.zeros((BT, BD), tl.float32)
        for j in tl.static_range(W):
            start = first + (W - 1) - j
            known = inside & ((start + step >= 0) & (start + step < tokens))[:, None]
            at = grad + start.to(tl.int64) * channels + offset
            e = tl.load(at, mask=known, other=0.0).to(tl.float32)
            if SILU:
                z = tl.zeros((BT, BD), tl.float32)
                for i in tl.static_range(W):
                    w = tl.load(weight + channel * W + i, mask=channel < channels, other=0.0)
                    u = _input(
                        x,
                        past,
                        first,
                        i - j,
                        channel,
                        tokens,
                        channels,
                        stride_token,
                        stride_past,
                        W,
                        BT,
                    )
                    z += w.to(tl.float32)[None, :] * u
                sigma = tl.sigmoid(z)
                e *= sigma * (1 + z * (1 - sigma))
            w = tl.load(weight + channel * W + j, mask=channel < channels, other=0.0)
            total += w.to(tl.float32)[None, :] * e
            if j == W - 1:  # t = s: this program's own tokens
                for i in tl.static_range(W):
                    u = _input(
                        x,
                        past,
                        first,
                        i - j,
                        channel,
                        tokens,
                        channels,
                        stride_token,
                        stride_past,
                        W,
                        BT,
                    )
                    of_weight += tl.where((taps == i)[:, None], tl.sum(e * u, 0)[None, :], 0.0)
        found = total.to(grad_x.dtype.element_ty)
        s = first + step
        at = grad_x + first.to(tl.int64) * channels + offset
        tl.store(at, found, mask=inside & ((s >= 0) & (s < tokens))[:, None])
        if past is not None:
            at = grad_past + (first + W - 1) * channels + offset
            tl.store(at, found, mask=inside & (s < 0)[:, None])
        if block == blocks - 1:
            x += stride_text
            grad += tokens * channels
            grad_x += tokens * channels
            if past is not None:
                past += stride_past_text
                grad_past += (W - 1) * channels
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    at = grad_weight + part * channels * W + channel[None, :] * W + taps[:, None]
    found = of_weight.to(grad_weight.dtype.element_ty)
    tl.store(at, found, mask=inside & (taps < W)[:, None])


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time: a text, with and without tokens before it, and a step of
    decoding."""
    types = {"grad_weight": "*fp32", **integers("texts", "blocks", "tokens", "channels")}
    for title, tokens, without in (
        ("text", 1024, ("past", "grad_past")),
        ("piece", 1024, ()),
        ("decode", 1, ()),
    ):
        for kernel in (conv_forward, conv_backward):
            constants = {**_constants(4, True, tokens), "BW": 4}
            yield variant(kernel, f"w4_{title}", constants, types, without)
