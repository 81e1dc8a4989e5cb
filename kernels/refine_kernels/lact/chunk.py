"""LaCT's fast-weight branch over large chunks: apply the weights, then update them once.

Zhang et al. 2025, "Test-Time Training Done Right", section 3, in the order of the published
language model: the tokens of a chunk are read with the weights from before that chunk's own update,
so the layer is strictly causal and the update can wait until the next chunk begins.

With prenorm the published code reads the first chunk with the weights as they are; here they
pass through the same normalisation as later ones, a relative difference of 1e-5 over the row norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact.fast_weights import FastWeights, RowNorms, with_row_norm
from refine_kernels.lact.newton_schulz import newton_schulz


def apply_fast_weights(
    weights: FastWeights, norms: RowNorms, fq: Tensor, *, prenorm: bool = False
) -> Tensor:
    """f(fq) = w1 (silu(w0 fq) * (w2 fq)) for every token and fast head: [B,T,n,d] -> [B,T,n,d].

    Computed in at least float32, returned in the dtype of fq.
    """
    w0, w1, w2 = weights.effective(norms, prenorm)
    x = _heads_first(fq, w0)
    hidden = F.silu(x @ w0.transpose(-1, -2)) * (x @ w2.transpose(-1, -2))
    return (hidden @ w1.transpose(-1, -2)).transpose(1, 2).to(fq.dtype)


def update_fast_weights(
    weights: FastWeights,
    norms: RowNorms,
    fk: Tensor,
    fv: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    *,
    muon: bool,
    muon_dtype: torch.dtype | None = None,
    prenorm: bool = False,
) -> FastWeights:
    """One update from all given tokens: ascent on sum_t eta_t <f(fk_t), fv_t>.

    fk, fv [B,T,n,d]; lr [B,T,n,3] holds the rates of (w0, w1, w2); momentum [B,T,n] or None for
    none.  muon orthogonalises each step (in ``muon_dtype``; None: the dtype of the
    weights).  Rows then return to their initial norms; with prenorm that is left to the reader of
    the weights.
    """
    grads = _objective_gradients(weights.effective(norms, prenorm), fk, fv, lr)
    buffers = None
    if momentum is not None:
        if weights.momentum is not None:
            decay = momentum.to(lr.dtype).mean(1)[..., None, None]
            g0, g1, g2 = (g + decay * b for g, b in zip(grads, weights.momentum, strict=True))
            grads = (g0, g1, g2)
        buffers = grads
    updated = []
    for w, g, norm in zip(weights[:3], grads, norms, strict=True):
        w = w + (newton_schulz(g, muon_dtype) if muon else g)
        updated.append(w if prenorm else with_row_norm(w, norm))
    return FastWeights(updated[0], updated[1], updated[2], momentum=buffers)


def chunk_lact(
    fq: Tensor,
    fk: Tensor,
    fv: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    weights: FastWeights,
    norms: RowNorms,
    *,
    chunk_size: int,
    muon: bool,
    muon_dtype: torch.dtype | None = None,
    prenorm: bool = False,
) -> tuple[Tensor, list[FastWeights]]:
    """The branch over a text whose first token starts a chunk.

    Shapes as in update_fast_weights, fq [B,T,n,d].  Returns o [B,T,n,d] and the weights in force
    during each of the ceil(T / chunk_size) chunks; the last chunk, full or not, makes no update.
    """
    queries = fq.split(chunk_size, 1)
    # split, not slicing: its backward joins the pieces once.
    keys, values, rates = (x.split(chunk_size, 1) for x in (fk, fv, lr))
    decays = [None] * len(queries) if momentum is None else momentum.split(chunk_size, 1)
    boundary_weights = [weights]
    for k, v, rate, decay in zip(keys[:-1], values, rates, decays, strict=False):
        weights = update_fast_weights(
            weights, norms, k, v, rate, decay, muon=muon, muon_dtype=muon_dtype, prenorm=prenorm
        )
        boundary_weights.append(weights)
    outputs = [
        apply_fast_weights(w, norms, q, prenorm=prenorm)
        for w, q in zip(boundary_weights, queries, strict=True)
    ]
    return torch.cat(outputs, 1), boundary_weights


def _heads_first(x: Tensor, like: Tensor) -> Tensor:
    """[B,T,n,d] -> [B,n,T,d] in the computing dtype."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, like.dtype), torch.float32)
    return x.transpose(1, 2).to(dtype)


def _objective_gradients(
    weights: tuple[Tensor, Tensor, Tensor], fk: Tensor, fv: Tensor, lr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_t eta_t <f(fk_t), fv_t> for (w0, w1, w2), each with its own rates."""
    w0, w1, w2 = weights
    k, v = _heads_first(fk, w0), _heads_first(fv, w0)
    eta0, eta1, eta2 = lr.transpose(1, 2).to(k.dtype).split(1, -1)
    z = k @ w0.transpose(-1, -2)
    h = k @ w2.transpose(-1, -2)
    d_hidden = v @ w1
    sigma = z.sigmoid()
    silu = z * sigma
    d_z = eta0 * d_hidden * h * (sigma + silu * (1 - sigma))
    g0 = d_z.transpose(-1, -2) @ k
    g1 = (eta1 * v).transpose(-1, -2) @ (silu * h)
    g2 = (eta2 * d_hidden * silu).transpose(-1, -2) @ k
    return g0, g1, g2
