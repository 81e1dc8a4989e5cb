"""Sampling in one pass over the logits, in Triton: what sampling.py does a slice at a time.

The noise is the same function of keys and token ids, in float64, so that the tokens are the same.
A program takes some columns of a row, a second kernel the best of a row's programs.
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
from refine_kernels.vocab import random, sampling
from refine_kernels.vocab.shard import VocabShard

_CONSTANTS = {"BLOCK": 2048, "num_warps": 8}
_GOLDEN, _MIX_1, _MIX_2 = (tl.constexpr(x) for x in (random.GOLDEN, random.MIX_1, random.MIX_2))


def refusal(logits: Tensor, keys: Tensor | None, **_: Any) -> str | None:
    """Why the kernel is not for these arguments here, None if it is."""
    return agreement.unknown_dtype(logits.dtype) or _disagreement(
        keys is not None, logits.dtype, logits.device
    )


@functools.cache
def _disagreement(drawn: bool, dtype: torch.dtype, device: torch.device) -> str | None:
    gen = torch.Generator().manual_seed(0)
    inputs = {
        "logits": torch.randn(7, _CONSTANTS["BLOCK"] + 77, generator=gen).to(device, dtype),
        "keys": random.combine_keys(torch.arange(7), 5).to(device),
    }

    def of(form: Any) -> agreement.Form:
        def run(logits: Tensor, keys: Tensor) -> list[Tensor]:
            options = {"temperature": 0.7, "vocab_size": logits.shape[-1] - 9, "form": form}
            return [sampling.sample_tokens(logits, keys if drawn else None, **options)]

        return run

    return agreement.disagreement(
        of(best_columns), of(None), inputs, ["tokens"], tolerance=0.0, gradients=False
    )


def best_columns(
    logits: Tensor, keys: Tensor | None, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """As sampling.best_columns."""
    if shard.valid == 0:
        return sampling.best_columns(logits, keys, temperature, shard)
    logits, keys = launch.dense_rows(logits), None if keys is None else launch.dense_rows(keys)
    rows, blocks = logits.shape[0], triton.cdiv(shard.valid, _CONSTANTS["BLOCK"])
    best = launch.empty((rows, blocks), torch.float64, logits.device)
    column = launch.empty((rows, blocks), torch.int64, logits.device)
    launch.run(
        best_of_block,
        (rows, blocks),
        *(logits, keys, best, column, logits.stride(0), shard.offset, shard.valid),
        **_CONSTANTS,
        TEMPERATURE=temperature,
    )
    of_row = launch.empty((rows,), torch.float64, logits.device)
    token = launch.empty((rows,), torch.int64, logits.device)
    launch.run(
        best_of_row,
        (rows,),
        *(best, column, of_row, token, blocks),
        BLOCKS=triton.next_power_of_2(blocks),
        num_warps=4,
    )
    return of_row, token


sample_tokens = functools.partial(sampling.sample_tokens, form=best_columns)


@triton.jit
def _shifted(x, BITS: tl.constexpr):
    """x ^= x >> BITS, shifting zeros in."""
    return x ^ ((x >> BITS) & ((1 << (64 - BITS)) - 1))


@triton.jit
def _mix(x):
    """As random._mix_."""
    x = _shifted(x, 30) * _MIX_1
    x = _shifted(x, 27) * _MIX_2
    return _shifted(x, 31)


@triton.jit
def best_of_block(
    logits,
    keys,
    best,
    best_column,
    stride,
    offset,
    valid,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of a row's block of logits, with Gumbel noise if there are keys, and where it
    first is."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < valid
    z = tl.load(logits + row * stride + column, mask=inside, other=-float("inf")).to(tl.float64)
    if keys is not None:
        x = _mix(tl.load(keys + row) + _mix((column + offset).to(tl.int64) * _GOLDEN))
        u = (((x >> 12) & ((1 << 52) - 1)).to(tl.float64) + 0.5) * (0.5**52)
        z = z / TEMPERATURE - tl.log(-tl.log(u))
    highest = tl.max(z, 0)
    first = tl.min(tl.where((z == highest) & inside, column, 2147483647), 0)
    at = row * tl.num_programs(1) + block
    tl.store(best + at, highest)
    tl.store(best_column + at, first.to(tl.int64))


@triton.jit
def best_of_row(best, best_column, of_row, token, blocks, BLOCKS: tl.constexpr):
    """The largest of a row's blocks, the first among equals, and its column."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    z = tl.load(best + row * blocks + block, mask=block < blocks, other=-float("inf"))
    highest = tl.max(z, 0)
    first = tl.min(tl.where((z == highest) & (block < blocks), block, BLOCKS - 1), 0)
    tl.store(of_row + row, highest)
    tl.store(token + row, tl.load(best_column + row * blocks + tl.minimum(first, blocks - 1)))


def variants() -> Iterator[Variant]:
    """As it is compiled ahead of time; for any vocabulary."""
    types = {"keys": "*i64", "best": "*fp64", "best_column": "*i64"}
    types |= {"of_row": "*fp64", "token": "*i64"} | integers("offset", "valid", "blocks")
    constants = {**_CONSTANTS, "TEMPERATURE": 0.8}
    yield variant(best_of_block, "drawn", constants, types)
    yield variant(best_of_block, "likeliest", constants, types, ("keys",))
    yield variant(best_of_row, "any", {"BLOCKS": 128, "num_warps": 4}, types)
