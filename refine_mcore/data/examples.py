"""Prompts with their answers, for post-training and test-time training.

`.jsonl` (an object per line) and `.parquet` (a row each) with `prompt`, a text, and `answers` or
`answer`, a text or a list of them: the references, of which the first is the one to train on.

As in the official code, prompt and answer are tokenized apart, without BOS, and by default without
EOS behind the answer. Deviations: padding is behind the texts and not before them (before, it would
reach LaCT's fast weights), and a prompt that is too long is refused, not cut.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refine_mcore import platform
from refine_mcore.config import DataConfig
from refine_mcore.data.documents import read_json_lines
from refine_mcore.data.order import ShuffledOrder
from refine_mcore.data.packing import pack, packed
from refine_mcore.data.tokenizer import Tokenizer, check_vocabulary
from refine_mcore.errors import UserError

logger = logging.getLogger(__name__)

_ROWS = 64  # of a parquet file in memory at a time


@dataclass(frozen=True)
class Example:
    """A prompt and its references; `row` is all that the file says of it, `origin` where it came
    from (`file:line` or `file: row`), for messages."""

    prompt: str
    answers: tuple[str, ...]
    row: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids, int32; `answer` is the first reference, what is trained on."""

    prompt: npt.NDArray[np.int32]
    answer: npt.NDArray[np.int32]


def read_examples(paths: Iterable[str | Path]) -> Iterator[Example]:
    """The examples of all files in order, one at a time.

    Raises UserError naming file and line or row for a missing or unreadable file, another
    extension, a missing field, an empty prompt or answer, and a file without any example.
    """
    for path in map(Path, paths):
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise UserError(f"{path}: examples are read from .jsonl and .parquet files only")
        empty = True
        try:
            for origin, row in reader(path):
                empty = False
                yield _example(row, origin)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if empty:
            raise UserError(f"{path}: holds no examples")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading .parquet takes pyarrow, of the extra `eval`") from None
    number = 0
    try:
        with path.open("rb") as file:
            for rows in parquet.ParquetFile(file).iter_batches(batch_size=_ROWS):
                # one by one, as a value may be none of Python's: text that is not UTF-8, a date
                for place in range(rows.num_rows):
                    number += 1
                    yield f"{path}: row {number}", _values(rows.slice(place, 1), path, number)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror is not None:  # the system's, not pyarrow's
            raise
        raise UserError(f"{path} is not a readable parquet file") from None


def _values(row: Any, path: Path, number: int) -> Any:
    """The fields of a record batch of one row."""
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: row {number} cannot be read: {reason}") from None


_READERS = {".jsonl": read_json_lines, ".parquet": _read_parquet}


def _example(row: Any, origin: str) -> Example:
    fields = row if isinstance(row, dict) else {}
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{origin} has no text in the field 'prompt'")
    # files of rows of both kinds have a null in the other field
    name = "answers" if fields.get("answers") is not None else "answer"
    value = fields.get(name)
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        raise UserError(f"{origin} has no text, or list of texts, in a field 'answer' or 'answers'")
    if not answers or not answers[0].strip():
        raise UserError(f"{origin} has an empty answer in the field '{name}'")
    return Example(prompt, tuple(answers), fields, origin)


def tokenize_examples(
    config: DataConfig, tokenizer: Tokenizer, vocab_size: int, shortest_prompt: int = 1
) -> list[TokenizedExample]:
    """All examples of `config.paths`, in order, read by rank 0 for all. Every rank calls this.

    `vocab_size` is the model's. Answers have at most `config.max_answer_tokens` tokens, EOS
    included if `config.answer_eos`, and prompts leave as many of `config.sequence_length`. Raises
    UserError for examples that cannot be read, prompts that are longer, or have fewer tokens than
    `shortest_prompt`, and a tokenizer that is not the model's by its size or has no EOS.
    """
    check_vocabulary(config, str(config.tokenizer), tokenizer.vocab_size, vocab_size)
    if config.sequence_length <= config.max_answer_tokens:
        raise UserError(
            f"data.sequence_length ({config.sequence_length}) leaves no room for a prompt beside "
            f"data.max_answer_tokens ({config.max_answer_tokens})"
        )
    examples: list[TokenizedExample] = []
    work = _tokenize(config, tokenizer, shortest_prompt, examples)
    platform.work_apart(work if platform.rank() == 0 else None)
    # not as what the work returns, which is gathered with room for as much from every rank
    return platform.on_first_rank(lambda: examples)


def _tokenize(
    config: DataConfig, tokenizer: Tokenizer, shortest: int, examples: list[TokenizedExample]
) -> Generator[None, None, None]:
    """Append to `examples`."""
    longest, most = config.sequence_length - config.max_answer_tokens, config.max_answer_tokens
    end = [_end_of_text(config, tokenizer)] if config.answer_eos else []
    cut = 0
    for example in read_examples(config.paths):
        prompt = tokenizer.text_to_ids(example.prompt)
        answer = tokenizer.text_to_ids(example.answers[0]) + end
        if len(prompt) > longest:
            raise UserError(
                f"{example.origin}: the prompt has {len(prompt)} tokens, more than the {longest} "
                f"that data.sequence_length ({config.sequence_length}) leaves beside "
                f"data.max_answer_tokens ({most})"
            )
        if len(prompt) < shortest:
            raise UserError(
                f"{example.origin}: the prompt has {len(prompt)} tokens, the rollouts of "
                f"refine.mode need {shortest} (refine.margin_left, refine.margin_right, "
                "refine.num_chunks)"
            )
        cut += len(answer) > most
        kept = (np.asarray(ids, dtype=np.int32) for ids in (prompt, answer[:most]))
        examples.append(TokenizedExample(*kept))
        yield
    if cut:
        logger.warning("%d of %d answers are cut to %d tokens", cut, len(examples), most)


def _end_of_text(config: DataConfig, tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id < 0:
        raise UserError(f"data.tokenizer {config.tokenizer} has no EOS for data.answer_eos")
    return tokenizer.eos_id


def padded(texts: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [b, length] with zeros behind each text, and which of them are the text's."""
    lengths = torch.tensor([len(text) for text in texts])
    tokens = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return tokens, torch.arange(length) < lengths[:, None]


class ShuffledExamples:
    """Rows of examples without end, in an order of their own in each epoch, padded behind to
    `length`: one in each row, or as many as it holds."""

    def __init__(
        self,
        examples: Sequence[TokenizedExample],
        length: int,
        seed: int,
        origin: str = "",
        *,
        packs: bool = False,
    ) -> None:
        self._examples, self._length, self.origin = examples, length, origin
        self._packs = packs
        self._rows = [[number] for number in range(len(examples))]
        if packs:
            self._rows = pack([len(item.prompt) + len(item.answer) for item in examples], length)
        self._order = ShuffledOrder(len(self._rows), seed)

    def __len__(self) -> int:
        """Rows per epoch."""
        return len(self._rows)

    def batch(self, samples: Sequence[int], /) -> dict[str, Tensor]:
        """`tokens`, `mask` of prompts and answers, `targets` [b, S]: the tokens of the answers;
        `documents` [b, S] where rows are packed."""
        rows = [[self._examples[i] for i in self._rows[self._order[s]]] for s in samples]
        texts = [[np.concatenate((item.prompt, item.answer)) for item in row] for row in rows]
        batch = packed(texts, self._length)
        answers = [
            [np.repeat((0, 1), (len(item.prompt), len(item.answer))) for item in row]
            for row in rows
        ]
        batch["targets"] = packed(answers, self._length)["tokens"].bool()
        if not self._packs:
            del batch["documents"]
        return batch


def build_examples(
    config: DataConfig, tokenizer: Tokenizer, vocab_size: int, shortest_prompt: int
) -> ShuffledExamples:
    """The examples of `config.paths` to train on; see `tokenize_examples`."""
    examples = tokenize_examples(config, tokenizer, vocab_size, shortest_prompt)
    origin = f"{len(examples)} examples from {', '.join(config.paths)}"
    packs = config.packing == "documents"
    found = ShuffledExamples(examples, config.sequence_length, config.seed, origin, packs=packs)
    if packs:
        found.origin = f"{len(found)} rows packed of {origin}"
    logger.info("%s", found.origin)
    return found
