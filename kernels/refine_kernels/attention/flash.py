"""Causal attention of a text by FlashAttention as torch has it on CUDA, `varlen_attn`: full or over
a window, grouped heads, a text that goes on, in one launch each way.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refine_kernels import agreement, launch
from refine_kernels.recompute import remade

_DTYPES = (torch.bfloat16, torch.float16)
_WIDEST = 256


def refusal(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> str | None:
    """Why it is not for these arguments of `text_attention` here, None if it is."""
    if not q.is_cuda:
        return "FlashAttention runs on CUDA alone"
    if q.dtype not in _DTYPES:
        return f"FlashAttention takes no {q.dtype}"
    if q.shape[-1] > _WIDEST or q.shape[-1] % 8:
        return f"FlashAttention takes no heads of {q.shape[-1]}"
    if _varlen_attn() is None:
        return f"torch {torch.__version__} has no varlen_attn with windows"
    return _disagreement(q.shape[2], k.shape[2], q.shape[3], window is not None, q.dtype, q.device)


def text_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """As sdpa.text_attention."""
    streams, length, heads, _ = q.shape
    total, kv_heads = k.shape[1:3]
    attention = _varlen_attn()
    assert attention is not None
    out = attention(
        *(remade(launch.aligned, x).flatten(0, 1) for x in (q, k, v)),
        *(_borders(streams, tokens, q.device) for tokens in (length, total)),
        *(length, total),
        # keys to the left of a query's own; the last query's own is the last key
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=heads != kv_heads,
    )
    return out.view(q.shape)


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    wanted = {"window_size", "enable_gqa"}
    return varlen_attn if wanted <= set(inspect.signature(varlen_attn).parameters) else None


@functools.lru_cache(maxsize=16)
def _borders(streams: int, tokens: int, device: torch.device) -> Tensor:
    """Where each text begins and the last one ends."""
    with torch.inference_mode(False):  # whoever takes it from here may need it for a backward
        return torch.arange(0, (streams + 1) * tokens, tokens, dtype=torch.int32, device=device)


@functools.cache
def _disagreement(
    heads: int, kv_heads: int, dim: int, windowed: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    from refine_kernels.attention import sdpa

    gen = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(2, tokens, n, width, generator=gen).to(device, dtype)
        for name, tokens, n, width in (
            ("q", 150, heads, dim),
            ("k", 200, kv_heads, dim),
            ("v", 200, kv_heads, dim + 4),  # among other projections, at no multiple of 16 bytes
        )
    }
    window = 70 if windowed else None

    def of(form: Callable[..., Tensor]) -> agreement.Form:
        def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            return [form(q, k, v[..., :dim], window=window)]

        return run

    return agreement.disagreement(
        of(text_attention),
        of(sdpa.text_attention),
        inputs,
        ["attention"],
        tolerance=agreement.TOLERANCE[dtype],
    )
