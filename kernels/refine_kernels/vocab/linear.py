"""Log-probability of given tokens and entropy of the distribution, from the hidden states that emit
them and the output weight, without the logits of all of them.

Logits are the largest tensor of a language-model step: 16,384 tokens times 131,072 words are 4 GiB
in bfloat16.  Here they exist a tile at a time.  The forward takes the rows in slices and keeps one
log-sum-exp per row; the backward makes the logits again, now in slices of the vocabulary over all
rows.  So each word's weight gradient is one product, rounded once, with no running sum of the
weight's size; the running sum is that of the hidden states' gradient.  That is one product more
than with the logits kept, 4 instead of 3, so logits that are no more than one tile are kept.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels.sums import add_product_
from refine_kernels.vocab.log_probs import RowForms, combine, sliced_rows
from refine_kernels.vocab.shard import VocabShard

# Logits alive at a time: enough of them for an efficient product, few beside a layer's activations.
TILE_ENTRIES = 2**25


def linear_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    with_entropy: bool,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    tile_entries: int = TILE_ENTRIES,
    forms: RowForms | None = None,
    weight_sums: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and H(p) for p = softmax(hidden weight^T / temperature).

    hidden [..., d], the same on all ranks of ``group``; weight [V_local, d]; targets [...] global
    token ids.  ``vocab_size``, ``group``, ``forms``, ignored targets and what is returned as in
    log_probs_and_entropy: (log_probs [...], entropy [...] or None) in at least float32, of which
    only log_probs carries a gradient.  Products are in the dtype of the arguments, as logits are.
    The gradient of ``hidden`` is summed over ``group``, as a column-parallel layer does.  That of
    ``weight`` is added to ``weight_sums``, if given, whose dtype may be wider: autograd is then
    handed the weight in its place, so that hooks know that it is done.
    """
    shard = VocabShard.of(weight.shape[0], vocab_size, group)
    log_probs, entropy = _LinearLogProbs.apply(
        hidden.flatten(0, -2),
        weight,
        targets.flatten(),
        temperature,
        shard,
        tile_entries,
        with_entropy,
        forms or sliced_rows(),
        weight_sums,
    )
    shape = targets.shape
    return log_probs.view(shape), entropy.view(shape) if with_entropy else None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        shard: VocabShard,
        tile_entries: int,
        with_entropy: bool,
        forms: RowForms,
        weight_sums: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        parts, logits = [], None
        rows = max(1, tile_entries // weight.shape[0])
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = h @ weight.t()
            parts.append(forms.local_statistics(logits, y, temperature, shard, with_entropy))
        stats, target_logit = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        peak, total, weighted, target_logit = combine(stats, target_logit, shard.group)
        log_total = total.log()
        lse = peak + log_total
        kept = logits if len(parts) == 1 else None
        ctx.save_for_backward(hidden, weight, targets, lse, kept)
        ctx.temperature, ctx.shard, ctx.tile_entries = temperature, shard, tile_entries
        ctx.forms, ctx.weight_sums = forms, weight_sums
        entropy = None
        if with_entropy:
            entropy = log_total - weighted / total
            ctx.mark_non_differentiable(entropy)
        return target_logit - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """With G = d / d logits, a tile at a time: d hidden = sum G W, d weight = G^T hidden."""
        hidden, weight, targets, lse, kept = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        sums, grad_weight = ctx.weight_sums, None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight) if sums is None else weight.detach()
        columns = max(1, ctx.tile_entries // max(1, hidden.shape[0]))
        for start in range(0, weight.shape[0], columns):
            tile = slice(start, start + columns)
            w = weight[tile]
            logits = hidden @ w.t() if kept is None else kept
            g = logits if kept is None else torch.empty_like(kept)
            shard = ctx.shard.columns(start, start + len(w))
            ctx.forms.write_gradient(logits, targets, lse, grad, ctx.temperature, shard, out=g)
            add_product_(grad_hidden, g, w)
            if grad_weight is None:
                continue
            if sums is not None:
                add_product_(sums[tile], g.t(), hidden)
            else:
                torch.mm(g.t(), hidden, out=grad_weight[tile])
        grad_hidden = grad_hidden.to(hidden.dtype)
        if ctx.shard.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.shard.group)
        return grad_hidden, grad_weight, *[None] * 7
