"""The order in which a run sees its samples: a function of (seed, epoch, number of samples
consumed), never of the parallel layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Samples(Protocol):
    """What a run trains on, without end; `origin` tells a user where it comes from."""

    origin: str

    def __len__(self) -> int:
        """Samples per epoch."""

    def batch(self, samples: Sequence[int], /) -> dict[str, Tensor]:
        """`tokens` int64 [b, S], `mask` bool [b, S] of valid tokens and what else a `TextBatch` of
        them holds, by its names."""


class ShuffledOrder:
    """Which of `count` items sample i is: of epoch i // count, each with its own order."""

    def __init__(self, count: int, seed: int) -> None:
        assert count > 0
        self._count, self._seed = count, seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, sample: int, /) -> int:
        epoch, offset = divmod(sample, self._count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        return int(self._order[offset])


def batch_iterator(
    dataset: Samples,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches, without end, from global sample `consumed_samples` on.

    Each round hands `micro_batch_size` consecutive samples to every data-parallel rank in turn
    (Megatron's order), so a step of G samples covers the same G whatever the layout, and the number
    consumed is all the state there is. Yields what `dataset.batch` gives and `sample_index` int64
    [b], which with the seed identifies a sequence for the rollouts' randomness.
    """
    assert 0 <= data_parallel_rank < data_parallel_size
    start = consumed_samples + data_parallel_rank * micro_batch_size
    while True:
        samples = range(start, start + micro_batch_size)
        yield dataset.batch(samples) | {"sample_index": torch.tensor(samples, dtype=torch.int64)}
        start += micro_batch_size * data_parallel_size
