"""Log-probability of given tokens and entropy of the whole distribution, from logits.

For logits that are there anyway, such as those a rollout draws from; a text's are never all made
(linear.py).  No softmax of their size is made either: rows are taken in slices, only the logits (as
they come) and one log-sum-exp per row are kept for the backward pass, and the backward writes its
slices straight into the gradient.  With a tensor-parallel group each rank holds an even share of
the vocabulary and only per-row numbers cross the wire.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels.vocab.shard import VocabShard

# Entries of a slice: small enough for a CPU cache and to be no memory peak, large enough for a GPU.
SLICE_ENTRIES = 2**21


def slice_rows(columns: int) -> int:
    """How many rows of so many columns make a slice."""
    return max(1, SLICE_ENTRIES // columns)


class RowForms(NamedTuple):
    """What is done to the rows of a tile of logits, in one form or another."""

    local_statistics: Callable[..., tuple[Tensor, Tensor]]
    write_gradient: Callable[..., None]


def sliced_rows(rows: int | None = None) -> RowForms:
    """torch's, so many rows at a time; None: as many as make a slice."""
    return RowForms(partial(local_statistics, rows=rows), partial(write_gradient, rows=rows))


def log_probs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    with_entropy: bool,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    rows_per_slice: int | None = None,
    forms: RowForms | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and H(p) for p = softmax(logits / temperature).

    logits [..., V_local]; targets [...] global token ids.  ``vocab_size`` is the true size of the
    vocabulary (later columns count as -inf), ``group`` the ranks over which it is sharded evenly.
    ``forms`` are the kernels for the rows, torch's if None.

    Returns (log_probs [...], entropy [...] or None) in at least float32.  Only log_probs carries a
    gradient; it arrives in the dtype of the logits.  A target outside the vocabulary (an ignore
    index) is read as logit 0: finite, and for the caller to mask.
    """
    shard = VocabShard.of(logits.shape[-1], vocab_size, group)
    forms = forms or sliced_rows(rows_per_slice)
    log_probs, entropy = _LogProbs.apply(
        logits.flatten(0, -2), targets.flatten(), temperature, shard, forms, with_entropy
    )
    shape = targets.shape
    return log_probs.view(shape), entropy.view(shape) if with_entropy else None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        shard: VocabShard,
        forms: RowForms,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        stats, target_logit = forms.local_statistics(
            logits, targets, temperature, shard, with_entropy
        )
        peak, total, weighted, target_logit = combine(stats, target_logit, shard.group)
        log_total = total.log()
        lse = peak + log_total
        ctx.save_for_backward(logits, targets, lse)
        ctx.temperature, ctx.shard, ctx.forms = temperature, shard, forms
        entropy = None
        if with_entropy:
            entropy = log_total - weighted / total
            ctx.mark_non_differentiable(entropy)
        return target_logit - lse, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """d log p(y) / d logits = (onehot(y) - p) / temperature."""
        logits, targets, lse = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        ctx.forms.write_gradient(
            logits, targets, lse, grad, ctx.temperature, ctx.shard, out=grad_logits
        )
        return grad_logits, None, None, None, None, None


def write_gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    temperature: float,
    shard: VocabShard,
    *,
    rows: int | None = None,
    out: Tensor,
) -> None:
    """Gradient of sum_r grad_r log p(target_r) by this rank's logits [R, V_local], into ``out``,
    which may be the logits; lse [R] is the log-sum-exp of logits / temperature over all ranks."""
    out[:, shard.valid :] = 0
    if shard.valid == 0:
        return
    rows = rows or slice_rows(logits.shape[1])
    grad = (grad / temperature).unsqueeze(1)
    column, held = _local_columns(targets, shard)
    for start in range(0, logits.shape[0], rows):
        s = slice(start, start + rows)
        z = logits[s, : shard.valid].to(lse.dtype) / temperature
        g = z.sub_(lse[s, None]).exp_().mul_(-grad[s])
        g.scatter_add_(1, column[s], grad[s] * held[s])
        out[s, : shard.valid] = g


def _local_columns(targets: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Column of each target [R,1], and whether this rank holds it [R,1]."""
    column = (targets.long() - shard.offset).unsqueeze(1)
    held = (column >= 0) & (column < shard.valid)
    return column.masked_fill(~held, 0), held


def local_statistics(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    shard: VocabShard,
    with_entropy: bool,
    *,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row, over this rank's columns, with z = logits / temperature and peak m = max z:

    stats [3,R] = (m, sum exp(z - m), sum exp(z - m) (z - m)), and the target's z or 0 [R].
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n = logits.shape[0]
    stats = torch.zeros(3, n, dtype=dtype, device=logits.device)
    target_logit = stats.new_zeros(n)
    if shard.valid == 0:
        # The lowest finite number, not -inf: (-inf) * 0 would be nan when shards are combined.
        stats[0] = torch.finfo(dtype).min
        return stats, target_logit
    column, held = _local_columns(targets, shard)
    rows = rows or slice_rows(logits.shape[1])
    for start in range(0, n, rows):
        s = slice(start, start + rows)
        z = logits[s, : shard.valid].to(dtype) / temperature
        peak = z.amax(1, keepdim=True)
        target_logit[s] = z.gather(1, column[s]).mul_(held[s]).squeeze(1)
        z.sub_(peak)
        p = z.exp()
        stats[0, s] = peak.squeeze(1)
        stats[1, s] = p.sum(1)
        if with_entropy:
            stats[2, s] = p.mul_(z).sum(1)
    return stats, target_logit


def combine(
    stats: Tensor, target_logit: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same statistics over the whole vocabulary: two all-reduces of per-row numbers."""
    peak, total, weighted = stats
    if group is None:
        return peak, total, weighted, target_logit
    top = peak.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    shift = peak - top
    factor = shift.exp()
    sums = torch.stack((total * factor, (weighted + shift * total) * factor, target_logit))
    dist.all_reduce(sums, group=group)
    return top, sums[0], sums[1], sums[2]
