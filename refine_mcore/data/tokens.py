"""The documents of a run as token ids on disk, written once and mapped by all ranks.

    DIRECTORY/tokens-HASH/tokens.bin, tokens.idx    Megatron's IndexedDataset, a sequence a document
    DIRECTORY/tokens-HASH/tokens.json               the longest document, and the files' sizes

HASH is of all that decides the tokens, not of the files' names: files may move, and any number of
runs may share DIRECTORY, at once too. A `tokens-HASH` appears by rename once it is complete, is
never changed afterwards, and may be removed between runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refine_mcore import platform
from refine_mcore.config import DataConfig
from refine_mcore.data.documents import Document, read_documents
from refine_mcore.data.tokenizer import Tokenizer, tokenizer_file, tokenizer_library
from refine_mcore.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_PREFIX = "tokens"
_CHUNK = 1 << 20  # bytes of a file that are hashed at a time
_BATCH = 1 << 23  # characters that are tokenized at a time
_ABANDONED = 3600  # seconds: who is still writing does so every few


@dataclass(frozen=True)
class _Summary:
    """What is kept beside the tokens: the first of the longest documents, by the index of its file
    in `data.paths` and what its origin adds to the file's name; and the sizes of the other files.
    """

    tokens: int
    file: int | None  # None if no document has a token
    place: str
    sizes: dict[str, int]


def map_tokens(
    config: DataConfig, tokenizer: Tokenizer, directory: Path, longest: int
) -> IndexedDataset:
    """The token ids of all documents of `config.paths`, in order, memory-mapped. Every rank calls
    this; `directory` is made if needed.

    Rank 0 writes them unless they are there already, then the first rank of every node that does
    not see them. Raises UserError, the same on all ranks and with nothing left behind, for
    documents that cannot be read, a directory that cannot be written, files that differ between
    nodes, and if no document has `longest` tokens.
    """
    # Imported here, so that reading documents does not take the seconds that Megatron's import
    # does.
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    work = _Work(config, tokenizer, directory, longest)
    rank = platform.rank()
    # One after the other: nodes mostly share the directory, and find what rank 0 has written.
    name = platform.work_apart(work.begin() if rank == 0 else None)[0]
    assert name is not None
    platform.work_apart(work.provide(name) if rank and platform.first_of_node() else None)
    if _read_summary(directory / name) is None:
        raise UserError(
            f"rank {rank} does not see {directory / name}, where the first rank of its node has "
            "put the tokens"
        )
    return IndexedDataset(str(directory / name / _PREFIX))


class _Work:
    """The part of the ranks that write: generators for `platform.work_apart`."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, directory: Path, longest: int
    ) -> None:
        self._config, self._tokenizer, self._directory = config, tokenizer, directory
        self._longest = longest

    def begin(self) -> Generator[None, None, str]:
        """Name the tokens by the files that this node sees, and provide them."""
        name = yield from self._name()
        yield from self.provide(name, named=True)
        return name

    def provide(self, name: str, named: bool = False) -> Generator[None, None, None]:
        """Write the tokens unless they are there; `named` if the name is of this node's files."""
        self._remove_leftovers()
        summary = _read_summary(self._directory / name)
        if summary is not None:
            self._check_length(summary)
            return
        if not named and (yield from self._name()) != name:
            raise UserError(
                f"data.paths ({self._files}) or data.tokenizer ({self._config.tokenizer}) do not "
                "hold the same on all nodes"
            )
        partial = self._directory / f".{name}.{uuid.uuid4().hex}.partial"
        try:
            partial.mkdir(parents=True)
            summary = yield from self._write(partial)
            self._check_length(summary)
            _publish(partial, self._directory / name)
        except OSError as error:  # of documents, reading has made it a UserError
            raise UserError(
                f"cannot write the tokens of data.paths to {self._directory}: {error.strerror}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _remove_if_empty(self._directory)

    @property
    def _files(self) -> str:
        return ", ".join(map(str, self._config.paths))

    def _name(self) -> Generator[None, None, str]:
        parts = [str(self._tokenizer.vocab_size)]
        if self._config.tokenizer is not None:
            file = tokenizer_file(self._config.tokenizer)
            parts += [tokenizer_library(file), (yield from _hash_file(file))]
        for path in map(Path, self._config.paths):
            parts.append(path.suffix + (yield from _hash_file(path)))
        return f"{_PREFIX}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}"

    def _remove_leftovers(self) -> None:
        """Those of starts that have ended: others may be writing."""
        for left_over in self._directory.glob(f".{_PREFIX}-*.partial"):
            with suppress(OSError):
                written = max(path.stat().st_mtime for path in (left_over, *left_over.iterdir()))
                if time.time() - written > _ABANDONED:
                    shutil.rmtree(left_over, ignore_errors=True)

    def _write(self, target: Path) -> Generator[None, None, _Summary]:
        """Write all files into the directory `target`, a batch of documents in memory at a time."""
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        data, index = target / f"{_PREFIX}.bin", target / f"{_PREFIX}.idx"
        tokens, file, place = 0, None, ""
        vocab_size = self._tokenizer.vocab_size
        builder = IndexedDatasetBuilder(str(data), dtype=DType.optimal_dtype(vocab_size))
        try:
            for number, path in enumerate(self._config.paths):
                for batch in _batches(read_documents([path])):
                    found = self._tokenizer.texts_to_ids([document.text for document in batch])
                    for document, of_document in zip(batch, found, strict=True):
                        ids = np.asarray(of_document, dtype=np.int32)
                        assert not len(ids) or 0 <= ids.min() <= ids.max() < vocab_size
                        builder.add_document(ids, [len(ids)])
                        if len(ids) > tokens:
                            tokens, file = len(ids), number
                            place = document.origin.removeprefix(str(Path(path)))
                    yield
            builder.finalize(str(index))
        finally:
            builder.data_file.close()
        summary = _Summary(tokens, file, place, {f.name: f.stat().st_size for f in (data, index)})
        (target / f"{_PREFIX}.json").write_text(json.dumps(asdict(summary)))
        return summary

    def _check_length(self, summary: _Summary) -> None:
        if summary.tokens >= self._longest:
            return
        longest = "no document"
        if summary.file is not None:
            longest = f"{Path(self._config.paths[summary.file])}{summary.place}"
        wanted = f"data.sequence_length ({self._longest} tokens)"
        if self._config.packing == "documents":
            wanted = f"refine.margin_left + refine.margin_right ({self._longest} tokens)"
        raise UserError(
            f"{self._files}: no document is as long as {wanted}, the longest is {longest} with "
            f"{summary.tokens}"
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Enough of them at a time for all cores to have some."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _hash_file(path: Path) -> Generator[None, None, str]:
    """Size and hash of the contents."""
    found, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                size += len(chunk)
                yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return f"{size}:{found.hexdigest()}"


def _read_summary(directory: Path) -> _Summary | None:
    """Of the tokens in `directory`; None unless they are complete."""
    try:
        summary = _Summary(**json.loads((directory / f"{_PREFIX}.json").read_text()))
        whole = all((directory / n).stat().st_size == size for n, size in summary.sizes.items())
    except (OSError, ValueError, TypeError):
        return None
    return summary if whole else None


def _publish(partial: Path, target: Path) -> None:
    """Let `partial` become `target`, unless another node was faster."""
    if _read_summary(target) is not None:
        return
    if target.exists():  # damaged
        doomed = partial.with_name(f"{partial.stem}.damaged.partial")
        target.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        partial.rename(target)
    except OSError:
        if _read_summary(target) is None:
            raise


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()
