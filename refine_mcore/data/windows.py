"""Windows of long documents, and the order in which a run sees them.

Deviation from the official code, which takes the first S tokens of each document and no others: a
document gives all its non-overlapping windows of S tokens; the remainder is dropped. As there, no
window spans two documents and no BOS is added. The order is a function of (seed, epoch, number of
samples consumed) and never of the parallel layout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from refine_mcore.config import DataConfig
from refine_mcore.data.tokenizer import Tokenizer
from refine_mcore.data.tokens import map_tokens
from refine_mcore.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

logger = logging.getLogger(__name__)


class Windows(Protocol):
    """Sequences of one length S: an array [N, S], or what finds them in mapped tokens."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: int, /) -> npt.NDArray[np.integer]:
        """Token ids [S]."""


class DocumentWindows:
    """All non-overlapping windows of `length` tokens in the documents of `tokens`, in their order.

    Kept is one number per document; a window is read when it is asked for.
    """

    def __init__(self, tokens: IndexedDataset, length: int) -> None:
        self._tokens, self._length = tokens, length
        counts = tokens.sequence_lengths // length
        # The first window of every document, and the end.
        self._starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.documents, self.used = len(counts), int(np.count_nonzero(counts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int, /) -> npt.NDArray[np.integer]:
        document = int(np.searchsorted(self._starts, index, side="right")) - 1
        offset = (index - int(self._starts[document])) * self._length
        return self._tokens.get(document, offset, self._length)


class LongDocumentWindows(Dataset[Tensor]):
    """Shuffled windows without end: sample i is of epoch i // len(self), each with its own order.

    There is at least one window; `origin` tells a user where they come from. Indexing yields int64
    token ids [S].
    """

    def __init__(self, windows: Windows, seed: int, origin: str = "") -> None:
        assert len(windows) > 0
        self._windows = windows
        self.origin = origin
        self._seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Windows per epoch."""
        return len(self._windows)

    @property
    def sequence_length(self) -> int:
        """S, tokens per window."""
        return len(self._windows[0])

    def __getitem__(self, sample: int) -> Tensor:
        epoch, offset = divmod(sample, len(self))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return torch.from_numpy(self._windows[self._order[offset]].astype(np.int64))


def build_dataset(
    config: DataConfig, tokenizer: Tokenizer, vocab_size: int, directory: Path
) -> LongDocumentWindows:
    """The windows of `config.sequence_length` tokens in the documents of `config.paths`.

    `vocab_size` is the model's; the tokens are kept in `directory` (data/tokens.py). Every rank
    calls this. Raises UserError for unreadable documents, a tokenizer that is not the model's by
    its size, text too short for a single window, and tokens that cannot be written.
    """
    _check_vocabulary(config, tokenizer.vocab_size, vocab_size)
    length = config.sequence_length
    windows = DocumentWindows(map_tokens(config, tokenizer, directory), length)
    short = windows.documents - windows.used
    origin = (
        f"{len(windows)} windows of {length} tokens from {windows.used} of {windows.documents} "
        f"documents{f', {short} are too short' if short else ''}"
    )
    logger.info("%s", origin)
    return LongDocumentWindows(windows, config.seed, origin)


def _check_vocabulary(config: DataConfig, pieces: int, vocab_size: int) -> None:
    unused = vocab_size - pieces
    if unused < 0 or unused > config.unused_vocabulary:
        raise UserError(
            f"data.tokenizer {config.tokenizer} is not the model's: it has {pieces} pieces, the "
            f"model a vocabulary of {vocab_size}"
            + (
                f" and data.unused_vocabulary allows {config.unused_vocabulary} more than there "
                "are pieces"
                if unused > 0
                else ""
            )
        )


def batch_iterator(
    dataset: LongDocumentWindows,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """This rank's micro-batches, without end, from global sample `consumed_samples` on.

    Each round hands `micro_batch_size` consecutive samples to every data-parallel rank in turn
    (Megatron's order), so a step of G samples covers the same G whatever the layout, and the number
    consumed is all the state there is. Yields `tokens` int64 [b, S], `mask` bool [b, S] (true at
    valid tokens: all, as windows are full) and `sample_index` int64 [b], which with the seed
    identifies a sequence for the rollouts' randomness.
    """
    assert 0 <= data_parallel_rank < data_parallel_size
    start = consumed_samples + data_parallel_rank * micro_batch_size
    while True:
        samples = range(start, start + micro_batch_size)
        tokens = torch.stack([dataset[sample] for sample in samples])
        yield {
            "tokens": tokens,
            "mask": torch.ones_like(tokens, dtype=torch.bool),
            "sample_index": torch.tensor(samples, dtype=torch.int64),
        }
        start += micro_batch_size * data_parallel_size
