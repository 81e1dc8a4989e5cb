"""Statistics and gradients of rows of logits in one pass each, in Triton: what log_probs.py does a
slice at a time.

A row's statistics are made in one pass: with the running peak m, sum s of exp(z - m) and sum w of
exp(z - m) (z - m), a new peak m' turns them into f s and f (w + (m - m') s), f = exp(m - m').
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refine_kernels import agreement, launch
from refine_kernels.triton_variant import Variant, integers, variant
from refine_kernels.vocab import linear, log_probs
from refine_kernels.vocab.log_probs import RowForms
from refine_kernels.vocab.shard import VocabShard

_STATISTICS = {"BLOCK": 4096, "num_warps": 8}
_GRADIENT = {"BLOCK": 2048, "num_warps": 4}


def refusal(*arguments: Any, **options: Any) -> str | None:
    """Why the kernels are not for these logits or hidden states here, None if they are."""
    x = next(x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
    return agreement.unknown_dtype(x.dtype) or _disagreement(x.dtype, x.device)


@functools.cache
def _disagreement(dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        "logits": 3 * torch.randn(3, _STATISTICS["BLOCK"] + 77, generator=gen).to(device, dtype),
        "targets": torch.tensor([1, 5000, _STATISTICS["BLOCK"]], device=device),
    }

    def of(forms: RowForms | None) -> agreement.Form:
        def run(logits: Tensor, targets: Tensor) -> Any:
            return log_probs.log_probs_and_entropy(
                logits,
                targets,
                with_entropy=True,
                temperature=0.7,
                vocab_size=logits.shape[-1] - 9,
                forms=forms,
            )

        return run

    return agreement.disagreement(
        of(FORMS),
        of(None),
        inputs,
        ["log-probabilities", "entropy"],
        tolerance=agreement.TOLERANCE[dtype],
    )


def local_statistics(
    logits: Tensor, targets: Tensor, temperature: float, shard: VocabShard, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """As log_probs.local_statistics."""
    rows = logits.shape[0]
    stats = launch.empty((3, rows), torch.float32, logits.device)
    target_logit = launch.empty((rows,), torch.float32, logits.device)
    logits = launch.dense_rows(logits)
    launch.run(
        row_statistics,
        (rows,),
        *(logits, targets, stats, target_logit, logits.stride(0), shard.offset, shard.valid, rows),
        temperature,
        **_STATISTICS,
    )
    return stats, target_logit


def write_gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    temperature: float,
    shard: VocabShard,
    *,
    out: Tensor,
) -> None:
    """As log_probs.write_gradient."""
    assert logits.stride(-1) == 1 and out.stride(-1) == 1
    rows, columns = logits.shape
    launch.run(
        row_gradient,
        (rows, triton.cdiv(columns, _GRADIENT["BLOCK"])),
        *(logits, targets, lse, grad.contiguous(), out, logits.stride(0), out.stride(0)),
        *(columns, shard.offset, shard.valid, temperature),
        **_GRADIENT,
    )


FORMS = RowForms(local_statistics, write_gradient)
log_probs_and_entropy = functools.partial(log_probs.log_probs_and_entropy, forms=FORMS)
# The products are torch's here too.
linear_log_probs_and_entropy = functools.partial(linear.linear_log_probs_and_entropy, forms=FORMS)


@triton.jit
def row_statistics(
    logits,
    targets,
    stats,
    target_logit,
    stride,
    offset,
    valid,
    rows,
    temperature,
    BLOCK: tl.constexpr,
):
    """m, s and w of a row's z = logits / temperature, and the target's z, 0 if it is not here."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    # the least of float32's numbers, as where a rank has no columns
    peak, total, weighted = -3.4028234663852886e38, 0.0, 0.0
    for start in range(0, valid, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < valid, other=-float("inf")).to(tl.float32)
        z /= temperature
        higher = tl.maximum(peak, tl.max(z, 0))
        shift = peak - higher
        factor = tl.exp(shift)
        z -= higher
        p = tl.exp(z)
        # differences that exp makes zero of count as -200, so that their product is zero too
        weighted = factor * (weighted + tl.maximum(shift, -200.0) * total)
        weighted += tl.sum(p * tl.maximum(z, -200.0), 0)
        total = factor * total + tl.sum(p, 0)
        peak = higher
    tl.store(stats + row, peak)
    tl.store(stats + rows + row, total)
    tl.store(stats + 2 * rows + row, weighted)
    column = tl.load(targets + row) - offset
    held = (column >= 0) & (column < valid)
    z = tl.load(logits + column, mask=held, other=0.0).to(tl.float32)
    tl.store(target_logit + row, z / temperature)


@triton.jit
def row_gradient(
    logits,
    targets,
    lse,
    grad,
    out,
    stride,
    stride_out,
    columns,
    offset,
    valid,
    temperature,
    BLOCK: tl.constexpr,
):
    """(onehot(target) - exp(z - lse)) grad / temperature, in some columns of a row; `out` may be
    `logits`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * stride + column
    z = tl.load(at, mask=column < valid, other=-float("inf")).to(tl.float32) / temperature
    p = tl.exp(z - tl.load(lse + row))
    hit = (column == tl.load(targets + row) - offset) & (column < valid)
    found = (tl.where(hit, 1.0, 0.0) - p) * (tl.load(grad + row) / temperature)
    found = tl.where(column < valid, found, 0.0)
    at = out + row * stride_out + column
    tl.store(at, found.to(out.dtype.element_ty), mask=column < columns)


def variants() -> Iterator[Variant]:
    """As they are compiled ahead of time; for any vocabulary."""
    types = dict.fromkeys(("stats", "target_logit", "lse", "grad"), "*fp32")
    types |= {"targets": "*i64", "temperature": "fp32"}
    types |= integers("offset", "valid", "rows", "columns", "stride", "stride_out")
    yield variant(row_statistics, "any", _STATISTICS, types)
    yield variant(row_gradient, "any", _GRADIENT, types)
