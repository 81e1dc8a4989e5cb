"""LaCT's fast-weight branch over large chunks: apply the weights, then update them once.

Zhang et al. 2025, "Test-Time Training Done Right", section 3, in the order of the published
language model: the tokens of a chunk are read with the weights from before that chunk's own update,
so the layer is strictly causal and the update can wait until the next chunk begins.

Only the updates wait for one another (updates.py).  All chunks of a text are read together once
their weights are there; for the backward that keeps its inputs alone and makes the rest again: the
intermediates are many times the tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.forms import BY_TORCH, Forms, Hidden
from refine_kernels.lact.products import Precision, Product, product_in
from refine_kernels.lact.updates import Rule, by_head, updated
from refine_kernels.streams import take_streams


@dataclass(frozen=True)
class ChunkWeights:
    """The weights in force during each chunk, and side by side [B chunks,n,...], a text's chunks in
    order, those that all but a rest of it were read with: whoever reads again takes these, so that
    their gradients are joined."""

    of_chunks: tuple[FastWeights, ...]
    side_by_side: FastWeights | None = None

    def __len__(self) -> int:
        return len(self.of_chunks)

    def __getitem__(self, chunk: int) -> FastWeights:
        return self.of_chunks[chunk]

    def __iter__(self) -> Iterator[FastWeights]:
        return iter(self.of_chunks)

    def reading(self, places: Sequence[tuple[int, int]]) -> FastWeights | None:
        """What f reads in chunk i of text b, for each (i, b); None where not all lie side by
        side."""
        if self.side_by_side is None:
            return None
        chunks = self.side_by_side.w1.shape[0] // self.of_chunks[-1].w1.shape[0]
        if max(i for i, _ in places) >= chunks:
            return None
        rows = [b * chunks + i for i, b in places]
        w02, w1 = (take_streams(w, rows) for w in self.side_by_side[:2])
        return FastWeights(w02, w1)


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
    return read(product, forms.hidden, fq, *weights.read())


def read(product: Product, hidden: Hidden, fq: Tensor, w02: Tensor, w1: Tensor) -> Tensor:
    """As apply_fast_weights, of the weights that products take."""
    return _Read.apply(product, hidden, fq, w02, w1)


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
) -> tuple[Tensor, ChunkWeights]:
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
    outputs, used = [], None
    if full:
        of_w02, of_w1 = zip(*(w.read() for w in in_force[:full]), strict=True)
        used = FastWeights(_by_chunk(of_w02, streams), _by_chunk(of_w1, streams))
        queries = fq[:, : full * chunk_size].reshape(streams * full, chunk_size, *fq.shape[2:])
        read = apply_fast_weights(used, queries, precision=precision, forms=forms)
        outputs.append(read.reshape(streams, full * chunk_size, *fq.shape[2:]))
    if full < len(in_force):
        rest = fq[:, full * chunk_size :]
        outputs.append(apply_fast_weights(in_force[-1], rest, precision=precision, forms=forms))
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return o, ChunkWeights(tuple(in_force), used if full > 1 else None)


class _Read(torch.autograd.Function):
    """Of queries and the weights as they are read, which it keeps; the rest is made again."""

    @staticmethod
    def forward(
        ctx: Any, product: Product, hidden: Hidden, fq: Tensor, w02: Tensor, w1: Tensor
    ) -> Tensor:
        ctx.product, ctx.hidden = product, hidden
        ctx.save_for_backward(fq, w02, w1)
        f = hidden(product(by_head(fq), w02.mT), product.operands)
        return product(f, w1.mT).transpose(1, 2).to(fq.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product: Product = ctx.product
        fq, w02, w1 = ctx.saved_tensors
        x, grad = by_head(fq), by_head(grad)
        zh = product(x, w02.mT).requires_grad_()
        with torch.enable_grad():
            f = ctx.hidden(zh, product.operands)
        (of_zh,) = torch.autograd.grad(f, zh, product(grad, w1))
        of_fq = product(of_zh, w02).transpose(1, 2).to(fq.dtype)
        # laid out as the weights are: others' gradients are added
        of_weights = product(of_zh.mT, x), product(grad.mT, f.detach())
        pairs = zip(of_weights, (w02, w1), strict=True)
        return None, None, of_fq, *(of.sum_to_size(w.shape).to(w.dtype) for of, w in pairs)


def _by_chunk(weights: tuple[Tensor, ...], streams: int) -> Tensor:
    """[B or 1,n,...] of every chunk -> [B chunks,n,...], a text's chunks side by side."""
    if len(weights) == 1:
        return weights[0]
    return torch.stack([w.expand(streams, *w.shape[1:]) for w in weights], 1).flatten(0, 1)
