"""LaCT's fast-weight branch over large chunks: apply the weights, then update them once.

Zhang et al. 2025, "Test-Time Training Done Right", section 3, in the order of the published
language model: the tokens of a chunk are read with the weights from before that chunk's own update,
so the layer is strictly causal and the update can wait until the next chunk begins.

Only the updates wait for one another (updates.py).  All chunks of a text are read together once
their weights are there; for the backward that keeps its inputs alone and makes the rest again: in
float32 the intermediates are many times the tokens.
"""

import torch
from torch import Tensor

from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.forms import BY_TORCH, Forms
from refine_kernels.lact.products import Precision, product_in
from refine_kernels.lact.updates import Rule, updated
from refine_kernels.recompute import recomputed


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

    def read(fq: Tensor, w02: Tensor, w1: Tensor) -> Tensor:
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
    rule = Rule(fk.shape[1], product, muon, muon_dtype, prenorm, forms)
    return updated(rule, 1, weights, norms, fk, fv, lr, momentum)[-1]


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
    streams, tokens = fq.shape[:2]
    product = product_in(precision, fk.dtype, weights.w1.dtype)
    rule = Rule(chunk_size, product, muon, muon_dtype, prenorm, forms)
    weights = weights.read_in(product.operands)  # once for all who read them
    count = max(0, -(-tokens // chunk_size) - 1)
    in_force = updated(rule, count, weights, norms, fk, fv, lr, momentum)
    full = tokens // chunk_size
    outputs = []
    if full:
        of_w02, of_w1 = zip(*(w.read() for w in in_force[:full]), strict=True)
        used = FastWeights(_by_chunk(of_w02, streams), _by_chunk(of_w1, streams))
        queries = fq[:, : full * chunk_size].reshape(streams * full, chunk_size, *fq.shape[2:])
        o = apply_fast_weights(used, queries, precision=precision, forms=forms)
        outputs.append(o.reshape(streams, full * chunk_size, *fq.shape[2:]))
    if full < len(in_force):
        rest = fq[:, full * chunk_size :]
        outputs.append(apply_fast_weights(in_force[-1], rest, precision=precision, forms=forms))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), in_force


def _by_chunk(weights: tuple[Tensor, ...], streams: int) -> Tensor:
    """[B or 1,n,...] of every chunk -> [B chunks,n,...], a text's chunks side by side."""
    if len(weights) == 1:
        return weights[0]
    return torch.stack([w.expand(streams, *w.shape[1:]) for w in weights], 1).flatten(0, 1)
