"""The updates of LaCT's fast weights that a text makes one after another, with one backward.

An update of the weights w0, w1, w2 from a chunk's keys K, values V [C,d] and rates is, in the
products' dtype but for what adds up,

    z, h = K w0^T, K w2^T;  d = V w1;  F = the factors of z, h, d and the rates (forms.py)
    G = F0^T K, F2^T K, F1^T V            ascent on sum_t eta_t <f(k_t), v_t>, of w0, w2, w1^T
    M = G + mu M'                         with momentum, mu its mean over the chunk
    S = newton_schulz(M), or M            the step
    w <- w + S, rows back to their norms  (forms.py: moved)

and its backward is written out here: autograd would keep a graph of every chunk, round operands
once for each reader, and add up gradients where a product can.  Kept are weights, steps and
Newton-Schulz's matrices, of the size of the weights; what has a chunk's tokens is made again, and
so is Newton-Schulz where a run recomputes selectively.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels.lact import newton_schulz
from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.forms import Forms, Moved, plus
from refine_kernels.lact.products import Product
from refine_kernels.recompute import is_remaking


@dataclass(frozen=True)
class Rule:
    """What an update is: the options of chunk.py."""

    chunk_size: int
    product: Product
    muon: bool
    muon_dtype: torch.dtype | None
    prenorm: bool
    forms: Forms

    @property
    def has_operands(self) -> bool:
        """Whether moved weights are read as others than they are."""
        return self.prenorm or self.product.operands != self.product.states

    def step(self, total: Tensor) -> tuple[Tensor, list[Tensor]]:
        """S [B,n,3,dh,d] of M, and what `step_backward` needs."""
        if not self.muon:
            return total, []
        dtype = self.muon_dtype or total.dtype
        step, kept = newton_schulz.steps(total.flatten(0, 2), dtype, self.forms.newton_schulz)
        return step.reshape(total.shape), kept

    def step_backward(self, kept: Sequence[Tensor], grad: Tensor) -> Tensor:
        """The gradient of M from that of S, which is in the dtype of S."""
        if not self.muon:
            return grad
        found = newton_schulz.steps_backward(kept, grad.flatten(0, 2), self.forms.newton_schulz)
        return found.reshape(grad.shape)

    def moved(self, weight: Tensor, step: Tensor, norm: Tensor) -> Moved:
        """As forms.moved."""
        return self.forms.moved(weight, step, norm, self.product.operands, prenorm=self.prenorm)

    def moved_gradients(self, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        """As forms.moved_gradients."""
        return self.forms.moved_gradients(*given, prenorm=self.prenorm)


def updated(
    rule: Rule,
    count: int,
    weights: FastWeights,
    norms: RowNorms,
    fk: Tensor,
    fv: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
) -> list[FastWeights]:
    """The given weights, and those after each of ``count`` updates from the first chunks of the
    tokens; shapes as in chunk.py, weights of one row are every stream's."""
    if count == 0:
        return [weights]
    streams, tokens = fk.shape[0], count * rule.chunk_size
    decay = None
    if momentum is not None:
        of_chunks = momentum[:, :tokens].to(rule.product.states).unflatten(1, (count, -1))
        decay = of_chunks.mean(2)[..., None, None, None]
    used = weights.read_in(rule.product.operands)
    given = [*used[:2], weights.momentum if decay is not None else None]
    given += used.operands or (None, None)
    given = [None if x is None else x.expand(streams, *x.shape[1:]) for x in given]
    results = _Updates.apply(rule, count, fk, fv, lr, decay, *norms, *given)
    found = [weights]
    for of_update in _by_update(results, count):
        w02, w1, *others = of_update
        buffers = others.pop(0) if decay is not None else None
        found.append(FastWeights(w02, w1, buffers, tuple(others) or None))
    return found


class _Updates(torch.autograd.Function):
    """Of tokens, decays [B,count,n,1,1,1], norms, and weights, momentum and operands before; gives
    of each update the weights, the momentum where there are decays, and operands where they are
    others than the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        rule: Rule,
        count: int,
        fk: Tensor,
        fv: Tensor,
        lr: Tensor,
        decay: Tensor | None,
        norm02: Tensor,
        norm1: Tensor,
        w02: Tensor,
        w1: Tensor,
        momentum: Tensor | None,
        operand02: Tensor | None,
        operand1: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.rule, ctx.count, ctx.remakes = rule, count, rule.muon and is_remaking()
        ctx.has_operands = [operand02 is not None] + [rule.has_operands] * (count - 1)
        keeps = any(ctx.needs_input_grad)
        chunks = _Chunks(rule, fk, fv, lr)
        kept: list[Tensor | None] = []
        results: list[Tensor] = []
        for i in range(count):
            used02 = w02 if operand02 is None else operand02
            used1 = w1 if operand1 is None else operand1
            of_products = chunks.products(i, used02, used1)
            total = rule.forms.accumulated(
                *of_products, _of_chunk(decay, i), momentum, rule.product.states
            )
            step, of_step = rule.step(total)
            if keeps:
                of_step = [total] if ctx.remakes else of_step
                kept += [w02, w1, used02, used1, momentum, step, *of_step]
            of_w02, of_w1 = _split(step)
            w02, operand02 = rule.moved(w02, of_w02, norm02)
            w1, operand1 = rule.moved(w1, of_w1, norm1)
            momentum = None if decay is None else total
            found = (w02, w1, momentum, operand02, operand1)
            results += [x for x in found if x is not None]
        ctx.save_for_backward(fk, fv, lr, decay, norm02, norm1, *kept)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rule, count = ctx.rule, ctx.count
        # asked for once: what is made again for a backward is made whenever it is asked for
        fk, fv, lr, decay, norm02, norm1, *flat = ctx.saved_tensors
        norms, kept = (norm02, norm1), _by_update(flat, count)
        chunks = _Chunks(rule, fk, fv, lr)
        # of what was there before each update and after the last
        of_states = [_Gradients([None, None], None, [None, None])]
        of_states += [_Gradients.of(x, decay is not None) for x in _by_update(grads, count)]
        of_norms: list[tuple[Tensor, ...]] = []
        of_decays: list[Tensor | None] = []
        for i in reversed(range(count)):
            w02, w1, used02, used1, momentum, step, *of_step = kept[i]
            before, after = of_states[i : i + 2]
            grad = torch.empty(step.shape, dtype=step.dtype, device=step.device)
            of_both = (w02, w1), _split(step), norms, after.weights, after.operands, _split(grad)
            moved = [rule.moved_gradients(*given) for given in zip(*of_both, strict=True)]
            found, of_norm = zip(*moved, strict=True)
            before.weights = [plus(*x) for x in zip(before.weights, found, strict=True)]
            of_step = rule.step(*of_step)[1] if ctx.remakes else of_step
            *of_products, of_momentum, of_decay = rule.forms.accumulated_gradients(
                rule.step_backward(of_step, grad),
                *(after.momentum, _of_chunk(decay, i), momentum, rule.product.operands),
            )
            before.momentum = plus(before.momentum, of_momentum)
            read = before.operands if ctx.has_operands[i] else before.weights
            read[:] = chunks.backward(i, used02, used1, of_products, read)
            of_norms.insert(0, of_norm)
            of_decays.insert(0, of_decay)
        first = of_states[0]
        return (
            *(None, None, *chunks.gradients()),
            _of_decays(of_decays, decay),
            *map(_summed, zip(*of_norms, strict=True), norms),
            *(*first.weights, first.momentum, *first.operands),
        )


@dataclass
class _Gradients:
    """Those of the weights in force during a chunk, w02 and w1, of their momentum and of their
    operands; None where there are none."""

    weights: list[Tensor | None]
    momentum: Tensor | None
    operands: list[Tensor | None]

    @classmethod
    def of(cls, grads: Sequence[Tensor | None], momentum: bool) -> _Gradients:
        """From those of an update's results."""
        w02, w1, *others = grads
        of_momentum = others.pop(0) if momentum else None
        return cls([w02, w1], of_momentum, others or [None, None])


class _Chunks:
    """The tokens of the updates by chunks, and their gradients."""

    def __init__(self, rule: Rule, fk: Tensor, fv: Tensor, lr: Tensor) -> None:
        self._rule, self._fk, self._fv, self._lr = rule, fk, fv, lr
        self._k, self._v = by_head(fk), by_head(fv)
        self._found: list[tuple[Tensor, ...]] = []

    def products(self, i: int, w02: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
        """G of chunk i, by the weights as products take them: that of w0 and w2 [B,n,2dh,d], and
        of w1^T [B,n,dh,d]."""
        k, v, _, (of_w02, of_w1) = self._factors(i, w02, w1)
        return self._rule.product(of_w02.mT, k), self._rule.product(of_w1.mT, v)

    def backward(
        self,
        i: int,
        w02: Tensor,
        w1: Tensor,
        grads: Sequence[Tensor],
        of_weights: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """The gradients of the weights from those of `products`, added to those given; the tokens'
        own are left for `gradients`."""
        product = self._rule.product
        k, v, gates, factors = self._factors(i, w02, w1)
        of_factors = product(k, grads[0].mT), product(v, grads[1].mT)
        of_zh, of_d, of_lr = self._rule.forms.factors_gradients(*gates, *of_factors)
        of_k = product.added(product(factors[0], grads[0]), of_zh, w02)
        of_v = product.added(product(factors[1], grads[1]), of_d, w1.mT)
        self._found.append((of_k, of_v, of_lr))
        pairs = (of_zh.mT, k), (v.mT, of_d)
        return [product.added(x, *pair) for x, pair in zip(of_weights, pairs, strict=True)]

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all tokens, of which the ones behind the last update have none."""
        of_k, of_v, of_lr = (list(x[::-1]) for x in zip(*self._found, strict=True))
        rest = self._fk.shape[1] - len(of_lr) * self._rule.chunk_size
        if rest:
            streams, _, heads, width = self._fk.shape
            of_k.append(of_k[0].new_zeros(streams, heads, rest, width))
            of_v.append(of_k[-1])
            of_lr.append(of_lr[0].new_zeros(streams, rest, heads, 3))
        return (
            torch.cat(of_k, 2).transpose(1, 2).to(self._fk.dtype),
            torch.cat(of_v, 2).transpose(1, 2).to(self._fv.dtype),
            torch.cat(of_lr, 1),
        )

    def _factors(
        self, i: int, w02: Tensor, w1: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """K and V of chunk i [B,n,C,d], what its gates take, and the factors of its gradients."""
        product, size = self._rule.product, self._rule.chunk_size
        k, v, lr = (
            x.narrow(dim, i * size, size) for x, dim in ((self._k, 2), (self._v, 2), (self._lr, 1))
        )
        gates = product(k, w02.mT), product(v, w1), lr
        return k, v, gates, self._rule.forms.factors(*gates, product.operands)


def by_head(x: Tensor) -> Tensor:
    """[B,T,n,d] -> [B,n,T,d]; of several streams a copy, in which products find every chunk of each
    head as one batch."""
    return x.transpose(1, 2).flatten(0, 1).unflatten(0, (x.shape[0], x.shape[2]))


def _split(step: Tensor) -> tuple[Tensor, Tensor]:
    """Of w0, w2 and w1^T [B,n,3,dh,d] those of w02 [B,n,2dh,d] and of w1 [B,n,d,dh], as views."""
    return step[:, :, :2].flatten(2, 3), step[:, :, 2].mT


def _summed(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(parts)).sum(0).sum_to_size(like.shape)


def _of_chunk(decay: Tensor | None, i: int) -> Tensor | None:
    return None if decay is None else decay[:, i]


def _of_decays(parts: Sequence[Tensor | None], decay: Tensor | None) -> Tensor | None:
    """The gradient of the decays, of which the first multiplies nothing where there was no
    momentum."""
    if decay is None:
        return None
    found = torch.zeros_like(decay)
    of_some = [x for x in parts if x is not None]
    if of_some:
        summed = torch.stack(of_some, 1).sum(-1)[..., None, None, None]
        found[:, len(parts) - len(of_some) :] = summed
    return found


def _by_update(flat: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """As many of them for each update."""
    size = len(flat) // count
    return [flat[i * size : (i + 1) * size] for i in range(count)]
