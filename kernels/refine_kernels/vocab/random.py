"""Random numbers that are a function of integers, so that no layout can change them.

A stateful generator gives other numbers when the batch is split differently.  Here the noise for
(seed, step, sample, position, rollout, token) is a hash of those integers: the finaliser of
splitmix64 (Steele, Lea & Flood 2014), in int64 tensor operations that wrap as 64-bit integers do.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits with a logical shift; torch shifts int64 arithmetically."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _mix_(x: Tensor) -> Tensor:
    """splitmix64 finaliser, in place: a bijection of 64-bit integers in which every bit counts."""
    _xor_shift_(x, 30).mul_(MIX_1)
    _xor_shift_(x, 27).mul_(MIX_2)
    return _xor_shift_(x, 31)


def combine_keys(*parts: int | Tensor) -> Tensor:
    """One int64 key for each broadcast entry of ``parts``; the order of the parts matters.

    Integers and integer tensors may be mixed; all integers give a 0-dim tensor.
    """
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        # a 0-dim key on the host joins a tensor on the device without a copy to wait for
        key = _mix_((key + GOLDEN) ^ torch.as_tensor(part, dtype=torch.int64))
    return key


def counter_uniform(keys: Tensor, counters: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform noise in the open interval (0, 1): entry [r, n] depends on keys[r], counters[n].

    keys [R] and counters [N] are int64; returns [R, N] in float64 (default) or float32.
    """
    x = keys[:, None] + _mix_(counters * GOLDEN)[None, :]
    x = _mix_(x)
    # The top bits, centred in their interval: never 0 and never 1.
    bits = 52 if dtype == torch.float64 else 23
    x = (x >> (64 - bits)).bitwise_and_((1 << bits) - 1)
    return x.to(dtype).add_(0.5).mul_(2.0**-bits)
