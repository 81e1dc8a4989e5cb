"""Windows of long documents.

Deviation from the official code, which takes the first S tokens of each document and no others: a
document gives all its non-overlapping windows of S tokens; the remainder is dropped, or with
`data.packing: documents` packed with others, and with documents that are shorter, into windows
where each is for itself. As there, no window spans two documents and no BOS is added.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from refine_mcore.config import DataConfig
from refine_mcore.data.order import ShuffledOrder
from refine_mcore.data.packing import pack, packed
from refine_mcore.data.tokenizer import Tokenizer, check_vocabulary
from refine_mcore.data.tokens import map_tokens

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


class PackedWindows:
    """The windows of `DocumentWindows`, and what they leave of the documents packed into more of
    them (`pack`); a piece of a single token, which predicts nothing, is left out.

    So are packed windows without a piece of `shortest` tokens.
    """

    def __init__(self, tokens: IndexedDataset, length: int, shortest: int) -> None:
        self._tokens, self._length = tokens, length
        self._full = DocumentWindows(tokens, length)
        counts = tokens.sequence_lengths
        self._rest = counts % length
        documents = np.flatnonzero(self._rest > 1)
        lengths = self._rest[documents].tolist()
        rows = pack(lengths, length)
        kept = [row for row in rows if max(lengths[piece] for piece in row) >= shortest]
        self._rows = [documents[row] for row in kept]
        self.left_out = len(rows) - len(kept)
        filled = sum(int(self._rest[row].sum()) for row in self._rows)
        self.filled = 1.0 if not kept else filled / (len(kept) * length)

    def __len__(self) -> int:
        return len(self._full) + len(self._rows)

    def __getitem__(self, index: int) -> list[npt.NDArray[np.integer]]:
        """The pieces of a window."""
        if index < len(self._full):
            return [self._full[index]]
        pieces = []
        for document in self._rows[index - len(self._full)].tolist():
            rest = int(self._rest[document])
            start = int(self._tokens.sequence_lengths[document]) - rest
            pieces.append(self._tokens.get(document, start, rest))
        return pieces


class ShuffledPackedWindows:
    """Packed windows without end, in an order of their own in each epoch."""

    def __init__(self, windows: PackedWindows, length: int, seed: int, origin: str) -> None:
        self._windows, self._length, self.origin = windows, length, origin
        self._order = ShuffledOrder(len(windows), seed)

    def __len__(self) -> int:
        """Windows per epoch."""
        return len(self._windows)

    def batch(self, samples: Sequence[int], /) -> dict[str, Tensor]:
        """`tokens`, `mask` and `documents`, see `packed`."""
        return packed([self._windows[self._order[sample]] for sample in samples], self._length)


class LongDocumentWindows(Dataset[Tensor]):
    """Shuffled windows without end, in an order of their own in each epoch.

    There is at least one window; `origin` tells a user where they come from. Indexing yields int64
    token ids [S].
    """

    def __init__(self, windows: Windows, seed: int, origin: str = "") -> None:
        self._windows, self.origin = windows, origin
        self._order = ShuffledOrder(len(windows), seed)

    def __len__(self) -> int:
        """Windows per epoch."""
        return len(self._windows)

    @property
    def sequence_length(self) -> int:
        """S, tokens per window."""
        return len(self._windows[0])

    def __getitem__(self, sample: int) -> Tensor:
        return torch.from_numpy(self._windows[self._order[sample]].astype(np.int64))

    def batch(self, samples: Sequence[int], /) -> dict[str, Tensor]:
        """`tokens` and `mask`: all are valid, as windows are full."""
        tokens = torch.stack([self[sample] for sample in samples])
        return {"tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}


def build_packed(
    config: DataConfig, tokenizer: Tokenizer, vocab_size: int, directory: Path, shortest: int
) -> ShuffledPackedWindows:
    """As `build_dataset`, with documents of any length packed into the windows, each of which has
    a document of at least `shortest` tokens; of all documents the longest must have as many."""
    check_vocabulary(config, str(config.tokenizer), tokenizer.vocab_size, vocab_size)
    length = config.sequence_length
    tokens = map_tokens(config, tokenizer, directory, shortest)
    windows = PackedWindows(tokens, length, shortest)
    left_out = (
        f", {windows.left_out} of documents below {shortest} tokens left out"
        if windows.left_out
        else ""
    )
    origin = (
        f"{len(windows)} windows of {length} tokens packed of {len(tokens.sequence_lengths)} "
        f"documents, shared ones filled to {windows.filled:.1%}{left_out}"
    )
    logger.info("%s", origin)
    return ShuffledPackedWindows(windows, length, config.seed, origin)


def build_dataset(
    config: DataConfig, tokenizer: Tokenizer, vocab_size: int, directory: Path
) -> LongDocumentWindows:
    """The windows of `config.sequence_length` tokens in the documents of `config.paths`.

    `vocab_size` is the model's; the tokens are kept in `directory` (data/tokens.py). Every rank
    calls this. Raises UserError for unreadable documents, a tokenizer that is not the model's by
    its size, text too short for a single window, and tokens that cannot be written.
    """
    check_vocabulary(config, str(config.tokenizer), tokenizer.vocab_size, vocab_size)
    length = config.sequence_length
    windows = DocumentWindows(map_tokens(config, tokenizer, directory, length), length)
    short = windows.documents - windows.used
    origin = (
        f"{len(windows)} windows of {length} tokens from {windows.used} of {windows.documents} "
        f"documents{f', {short} are too short' if short else ''}"
    )
    logger.info("%s", origin)
    return LongDocumentWindows(windows, config.seed, origin)
