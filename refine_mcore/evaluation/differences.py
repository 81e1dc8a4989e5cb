"""How far computed values are from those they should be, with the limit that each is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One comparison: it holds if `error`, which says how far off `what` is, is within `limit`."""

    what: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the error is within its limit; one that is not a number is not."""
        return self.error <= self.limit

    @property
    def used(self) -> float:
        """The share of its limit that the error takes up; infinite if it is not a number."""
        if math.isnan(self.error):
            return math.inf
        if self.error == 0.0:
            return 0.0
        return self.error / self.limit if self.limit > 0 else math.inf

    def __str__(self) -> str:
        return f"{self.what} {self.error:.1e} (limit {self.limit:.1e})"


def relative(
    what: str, actual: Tensor, expected: Tensor, limit: float, floor: float = 0.0
) -> Difference:
    """|actual - expected| / (|expected| + floor) over all entries together, in float64 on the host.

    `floor` is the size below which an expected value is zero but for rounding. Infinite for other
    shapes; where nothing is expected but zeros, zero or infinite.
    """
    if actual.shape != expected.shape:
        return Difference(f"{what} of shape {list(actual.shape)}", math.inf, limit)
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, size = (a - e).norm().item(), e.norm().item() + floor
    if size == 0.0:
        return Difference(what, 0.0 if error == 0.0 else math.inf, limit)
    return Difference(what, error / size, limit)


def largest(what: str, actual: Tensor, expected: Tensor, limit: float) -> Difference:
    """max |actual - expected|; infinite for other shapes or dtypes."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Difference(f"{what} as {actual.dtype} {list(actual.shape)}", math.inf, limit)
    return Difference(what, (actual - expected).abs().max().item(), limit)


def unequal(what: str, actual: Tensor, expected: Tensor) -> Difference:
    """The number of integers that are not the same, which must be none; infinite for other
    shapes."""
    if actual.shape != expected.shape:
        return Difference(f"{what} of shape {list(actual.shape)}", math.inf, 0.0)
    return Difference(what, float((actual.cpu() != expected.cpu()).sum()), 0.0)


def broken(differences: Sequence[Difference]) -> list[Difference]:
    """Those that do not hold, the worst first."""
    return sorted((d for d in differences if not d.holds), key=lambda d: -d.used)
