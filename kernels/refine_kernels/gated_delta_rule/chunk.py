"""Chunkwise parallel form of the gated delta rule; the mathematics is in delta_rule/chunk.py."""

from torch import Tensor

from refine_kernels.delta_rule.chunk import ChunkOutput, chunk_rule


def chunk_gated_delta_rule(
    q: Tensor | None,
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
    """As chunk_delta_rule with the state decayed by exp(g_t) before token t; g [B,T,H] <= 0.

    A token with beta = 0 and g = 0 leaves the state as it is.
    """
    options = (scale, qk_norm_eps, initial_state, chunk_size, output_writes, output_final_state)
    return chunk_rule(q, k, v, beta, g, *options)
