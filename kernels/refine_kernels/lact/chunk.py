"""LaCT's fast-weight branch over large chunks: apply the weights, then update them once.

Zhang et al. 2025, "Test-Time Training Done Right", section 3, in the order of the published
language model: the tokens of a chunk are read with the weights from before that chunk's own update,
so the layer is strictly causal and the update can wait until the next chunk begins.

With prenorm the published code reads the first chunk with the weights as they are; here they
pass through the same normalisation as later ones, a relative difference of 1e-5 over the row norm.

For the backward, reading and updating keep their inputs alone and make the rest again, one chunk at
a time: in float32 the intermediates of a chunk are many times its tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact.fast_weights import FastWeights, RowNorms, with_row_norm
from refine_kernels.lact.newton_schulz import newton_schulz
from refine_kernels.lact.products import Precision, Product, product_in
from refine_kernels.recompute import recomputed


def apply_fast_weights(
    weights: FastWeights,
    norms: RowNorms,
    fq: Tensor,
    *,
    prenorm: bool = False,
    precision: Precision | None = None,
) -> Tensor:
    """f(fq) = w1 (silu(w0 fq) * (w2 fq)) for every token and fast head: [B,T,n,d] -> [B,T,n,d].

    ``precision`` is that of the products (see products.py); all else is computed in at least
    float32.  Returned in the dtype of fq.
    """
    product = product_in(precision, fq.dtype, weights.w0.dtype)

    def read(w0: Tensor, w1: Tensor, w2: Tensor, fq: Tensor, *norms: Tensor) -> Tensor:
        w0, w1, w2 = FastWeights(w0, w1, w2).effective(RowNorms(*norms), prenorm)
        x = fq.transpose(1, 2)
        hidden = F.silu(product(x, w0.mT)) * product(x, w2.mT)
        return product(hidden, w1.mT).transpose(1, 2).to(fq.dtype)

    return recomputed(read, *weights[:3], fq, *norms)


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
    precision: Precision | None = None,
) -> FastWeights:
    """One update from all given tokens: ascent on sum_t eta_t <f(fk_t), fv_t>.

    fk, fv [B,T,n,d]; lr [B,T,n,3] holds the rates of (w0, w1, w2); momentum [B,T,n] or None for
    none.  muon orthogonalises each step (in ``muon_dtype``; None: the dtype of the
    weights).  Rows then return to their initial norms; with prenorm that is left to the reader of
    the weights.  ``precision`` is that of the products with the tokens (see products.py).
    """
    product = product_in(precision, fk.dtype, weights.w0.dtype)

    def update(
        fk: Tensor, fv: Tensor, lr: Tensor, momentum: Tensor | None, *states: Tensor
    ) -> FastWeights:
        w0, w1, w2, n0, n1, n2, *buffers = states
        weights, norms = FastWeights(w0, w1, w2), RowNorms(n0, n1, n2)
        grads = _objective_gradients(weights.effective(norms, prenorm), fk, fv, lr, product)
        if momentum is not None and buffers:
            decay = momentum.to(lr.dtype).mean(1)[..., None, None]
            g0, g1, g2 = (g + decay * b for g, b in zip(grads, buffers, strict=True))
            grads = (g0, g1, g2)
        updated = []
        for w, g, norm in zip(weights[:3], grads, norms, strict=True):
            w = w + (newton_schulz(g, muon_dtype) if muon else g)
            updated.append(w if prenorm else with_row_norm(w, norm))
        w0, w1, w2 = updated
        return FastWeights(w0, w1, w2, momentum=None if momentum is None else grads)

    states = (*weights[:3], *norms, *(weights.momentum or ()))
    return recomputed(update, fk, fv, lr, momentum, *states)


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
    precision: Precision | None = None,
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
            weights,
            norms,
            k,
            v,
            rate,
            decay,
            muon=muon,
            muon_dtype=muon_dtype,
            prenorm=prenorm,
            precision=precision,
        )
        boundary_weights.append(weights)
    outputs = [
        apply_fast_weights(w, norms, q, prenorm=prenorm, precision=precision)
        for w, q in zip(boundary_weights, queries, strict=True)
    ]
    return torch.cat(outputs, 1), boundary_weights


def _objective_gradients(
    weights: tuple[Tensor, Tensor, Tensor], fk: Tensor, fv: Tensor, lr: Tensor, product: Product
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_t eta_t <f(fk_t), fv_t> for (w0, w1, w2), each with its own rates."""
    w0, w1, w2 = weights
    k, v = fk.transpose(1, 2), fv.transpose(1, 2)
    z, h = product(k, w0.mT), product(k, w2.mT)
    d_hidden = product(v, w1)
    eta0, eta1, eta2 = lr.transpose(1, 2).to(z.dtype).split(1, -1)
    sigma = z.sigmoid()
    silu = z * sigma
    d_z = eta0 * d_hidden * h * (sigma + silu * (1 - sigma))
    g0 = product(d_z.mT, k)
    g1 = product(v.mT, eta1 * silu * h)
    g2 = product((eta2 * d_hidden * silu).mT, k)
    return g0, g1, g2
