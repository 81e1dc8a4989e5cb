"""LaCT's fast-weight branch over large chunks: apply the weights, then update them once.

Zhang et al. 2025, "Test-Time Training Done Right", section 3, in the order of the published
language model: the tokens of a chunk are read with the weights from before that chunk's own update,
so the layer is strictly causal and the update can wait until the next chunk begins.

For the backward, reading and the gradients of an update keep their inputs alone and make the rest
again, one chunk at a time: in float32 the intermediates of a chunk are many times its tokens.
Those of Newton-Schulz, whose products cost as much, are of the size of the weights and are kept,
but under selective recomputation.
"""

import torch
from torch import Tensor

from refine_kernels.lact.fast_weights import FastWeights, RowNorms, weights_of
from refine_kernels.lact.forms import BY_TORCH, Forms
from refine_kernels.lact.newton_schulz import newton_schulz
from refine_kernels.lact.products import Precision, Product, product_in
from refine_kernels.recompute import recomputed, recomputed_where_remaking


def apply_fast_weights(
    weights: FastWeights,
    fq: Tensor,
    *,
    precision: Precision | None = None,
    forms: Forms = BY_TORCH,
) -> Tensor:
    """f(fq) = w1 (silu(w0 fq) * (w2 fq)) for every token and fast head: [B,T,n,d] -> [B,T,n,d].

    ``precision`` is that of the products (see products.py); all else is computed in at least
    float32.  Returned in the dtype of fq.  ``forms`` are the kernels between the products.
    """
    product = product_in(precision, fq.dtype, weights.w1.dtype)

    def read(fq: Tensor, *weights: Tensor) -> Tensor:
        w02, w1 = weights_of(weights)
        hidden = forms.hidden(product(fq.transpose(1, 2), w02.mT), product.operands)
        return product(hidden, w1.mT).transpose(1, 2).to(fq.dtype)

    return recomputed(read, fq, *weights.read())


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
    forms: Forms = BY_TORCH,
) -> FastWeights:
    """One update from all given tokens: ascent on sum_t eta_t <f(fk_t), fv_t>.

    fk, fv [B,T,n,d]; lr [B,T,n,3] holds the rates of (w0, w1, w2); momentum [B,T,n] or None for
    none.  muon orthogonalises each step (in ``muon_dtype``; None: the dtype of the
    weights).  Rows then return to their initial norms; with prenorm only where they are read.
    ``precision`` is that of the products with the tokens (see products.py).
    """
    product = product_in(precision, fk.dtype, weights.w1.dtype)

    def gradients(fk: Tensor, fv: Tensor, lr: Tensor, *weights: Tensor) -> Tensor:
        return _objective_gradients(weights_of(weights), fk, fv, lr, product, forms)

    steps = recomputed(gradients, fk, fv, lr, *weights.read())
    if momentum is not None and weights.momentum is not None:
        decay = momentum.to(lr.dtype).mean(1)[..., None, None, None]
        steps = steps + decay * weights.momentum
    buffers = None if momentum is None else steps
    if muon:
        steps = recomputed_where_remaking(newton_schulz, steps, muon_dtype)
    width = steps.shape[-2]
    of_w02, of_w1 = steps.flatten(2, 3).split([2 * width, width], 2)
    w02, w1 = (
        forms.moved(weight, step, norm, product.operands, prenorm=prenorm)
        for weight, step, norm in zip(weights[:2], (of_w02, of_w1.mT), norms, strict=True)
    )
    scales, operands = None, None
    if w02.scale is not None and w1.scale is not None:
        scales = w02.scale, w1.scale
    if w02.operand is not None and w1.operand is not None:
        operands = w02.operand, w1.operand
    return FastWeights(w02.weight, w1.weight, buffers, scales, operands)


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
    forms: Forms = BY_TORCH,
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
            forms=forms,
        )
        boundary_weights.append(weights)
    outputs = [
        apply_fast_weights(w, q, precision=precision, forms=forms)
        for w, q in zip(boundary_weights, queries, strict=True)
    ]
    return torch.cat(outputs, 1), boundary_weights


def _objective_gradients(
    weights: tuple[Tensor, Tensor],
    fk: Tensor,
    fv: Tensor,
    lr: Tensor,
    product: Product,
    forms: Forms,
) -> Tensor:
    """Gradients of sum_t eta_t <f(fk_t), fv_t> for (w0, w2, w1^T), each with its own rates, as one
    [B,n,3,dh,d]."""
    w02, w1 = weights
    k, v = fk.transpose(1, 2), fv.transpose(1, 2)
    zh, d_hidden = product(k, w02.mT), product(v, w1)
    of_w02, of_w1 = forms.factors(zh, d_hidden, lr, product.operands)
    # tokens first: so the backward's products come out as the factors lie
    found = [product(tokens.mT, x).mT for tokens, x in ((k, of_w02), (v, of_w1))]
    return torch.cat(found, 2).to(product.states).unflatten(2, (3, -1))
