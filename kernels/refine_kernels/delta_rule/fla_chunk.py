"""Both delta rules over a text by flash-linear-attention, for who asks for it: where nobody reads a
state inside the text, of which it gives none.
"""

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from refine_kernels import agreement
from refine_kernels.delta_rule import chunk
from refine_kernels.delta_rule.chunk import ChunkOutput

_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_KEY = 256
_FEW_TOKENS = 16  # of rollouts that are scored: triton_few.py
_L2_EPS = 1e-6  # its own, under the root beside the sum of squares


def refusal(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_writes: bool = False,
    output_final_state: bool = True,
) -> str | None:
    """Why it is not for these arguments here, None if it is."""
    if output_writes:
        return "flash-linear-attention gives no writes"
    if q is None:
        return "flash-linear-attention takes no text without queries"
    if v.shape[1] <= _FEW_TOKENS:
        return "a few tokens are one launch in Triton"
    if not v.is_cuda:
        return "flash-linear-attention runs on a GPU"
    if v.dtype not in _DTYPES:
        return f"flash-linear-attention takes no {v.dtype}"
    if k.shape[-1] > _LARGEST_KEY:
        return f"keys are {k.shape[-1]} wide, above {_LARGEST_KEY}"
    if qk_norm_eps not in (None, _L2_EPS):
        return f"flash-linear-attention norms with {_L2_EPS}, not {qk_norm_eps}"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    widths = (k.shape[-1], v.shape[-1], v.shape[2] // k.shape[2])
    return _disagreement(widths, g is not None, qk_norm_eps, v.dtype, v.device)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_writes: bool = False,
    output_final_state: bool = True,
) -> ChunkOutput:
    """As chunk.chunk_delta_rule, without states and writes; the chunk is its own."""
    return _chunk_rule(q, k, v, beta, None, scale, qk_norm_eps, initial_state, output_final_state)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_writes: bool = False,
    output_final_state: bool = True,
) -> ChunkOutput:
    """As chunk_delta_rule above, with decays."""
    return _chunk_rule(q, k, v, beta, g, scale, qk_norm_eps, initial_state, output_final_state)


def _chunk_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    qk_norm_eps: float | None,
    initial_state: Tensor | None,
    output_final_state: bool = True,
) -> ChunkOutput:
    name = "delta_rule" if g is None else "gated_delta_rule"
    function = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    groups = v.shape[2] // k.shape[2]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
    o, final_state = function(
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        beta=beta.contiguous(),
        **({} if g is None else {"g": g.contiguous()}),
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=qk_norm_eps is not None,
    )
    return ChunkOutput(o, final_state, [], None)


@functools.cache
def _disagreement(
    widths: tuple[int, int, int],
    gated: bool,
    qk_norm_eps: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    k_dim, v_dim, groups = widths
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, 150, *shape, generator=gen)

    inputs = {name: normal(2, k_dim) for name in "qk"}
    inputs["k"] /= inputs["k"].norm(dim=-1, keepdim=True)
    inputs |= {"v": normal(2 * groups, v_dim), "beta": normal(2 * groups).sigmoid()}
    if gated:
        inputs["g"] = -normal(2 * groups).sigmoid()
    # rates and states come in float32 whatever the tokens are
    inputs = {name: x.to(device, dtype if name in "qkv" else None) for name, x in inputs.items()}
    inputs["state"] = torch.randn(1, 2 * groups, k_dim, v_dim, generator=gen).to(device)

    def of(rule: Any) -> agreement.Form:
        def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *rest: Tensor) -> list[Tensor]:
            *g, state = rest
            out = rule(q, k, v, beta, g[0] if g else None, None, qk_norm_eps, state)
            return [out.o, out.final_state]

        return run

    by_torch = functools.partial(chunk.chunk_rule, chunk_size=64, output_writes=False)

    return agreement.disagreement(
        of(_chunk_rule),
        of(by_torch),
        inputs,
        ["output", "state"],
        tolerance=agreement.TOLERANCE[dtype],
    )
