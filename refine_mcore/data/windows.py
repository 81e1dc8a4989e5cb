"""Windows of long documents, and the order in which a run sees them.

Deviation from the official code, which takes the first S tokens of each document and no others: a
document gives all its non-overlapping windows of S tokens; the remainder is dropped. As there, no
window spans two documents and no BOS is added. The order is a function of (seed, epoch, number of
samples consumed) and never of the parallel layout.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from refine_mcore.config import DataConfig
from refine_mcore.data.documents import read_documents
from refine_mcore.data.tokenizer import Tokenizer
from refine_mcore.errors import UserError

logger = logging.getLogger(__name__)


class LongDocumentWindows(Dataset[Tensor]):
    """Shuffled windows without end: sample i is of epoch i // len(self), each with its own order.

    `windows` is [N, S] integers with N >= 1; `origin` tells a user where they come from. Indexing
    yields int64 token ids [S].
    """

    def __init__(self, windows: npt.NDArray[np.int32], seed: int, origin: str = "") -> None:
        assert windows.ndim == 2 and len(windows) > 0
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
        return self._windows.shape[1]

    def __getitem__(self, sample: int) -> Tensor:
        epoch, offset = divmod(sample, len(self))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return torch.from_numpy(self._windows[self._order[offset]].astype(np.int64))


def build_dataset(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> LongDocumentWindows:
    """The windows of `config.sequence_length` tokens in the documents of `config.paths`.

    `vocab_size` is the model's. Raises UserError for unreadable documents, a tokenizer that is not
    the model's by its size, and text too short for a single window.
    """
    _check_vocabulary(config, tokenizer.vocab_size, vocab_size)
    windows, origin = _cut_documents(config.paths, tokenizer, config.sequence_length)
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


def _cut_documents(
    paths: Sequence[str | Path], tokenizer: Tokenizer, length: int
) -> tuple[npt.NDArray[np.int32], str]:
    """All windows [N, length] of all documents, in the order of the files, and what they are."""
    pieces, documents, longest, longest_origin = [], 0, 0, "no document"
    for document in read_documents(paths):
        ids = np.asarray(tokenizer.text_to_ids(document.text), dtype=np.int32)
        count = len(ids) // length
        pieces.append(ids[: count * length].reshape(count, length))
        documents += 1
        if len(ids) > longest:
            longest, longest_origin = len(ids), document.origin
    if not any(map(len, pieces)):
        files = ", ".join(map(str, paths))
        raise UserError(
            f"{files}: no document is as long as data.sequence_length ({length} tokens), "
            f"the longest is {longest_origin} with {longest}"
        )
    windows = np.concatenate(pieces)
    used = sum(map(bool, map(len, pieces)))
    return windows, (
        f"{len(windows)} windows of {length} tokens from {used} of {documents} documents"
        + (f", {documents - used} are too short" if used < documents else "")
    )
