"""Tokenizers: Megatron-Core's SentencePiece wrapper, told which pieces are special, and
`tokenizer.json` files of Hugging Face by the `tokenizers` library, with errors that name the file.
Both are data: nothing in them runs. Of a directory's other files only `tokenizer_config.json` is
read, for the name of EOS.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from refine_mcore.config import DataConfig
from refine_mcore.conversion.description import TOKENIZER_FILES, find_tokenizer
from refine_mcore.errors import UserError


class Tokenizer(Protocol):
    """What the project uses of Megatron's tokenizers."""

    # Number of pieces; all ids are below it.
    vocab_size: int
    # -1 if there is none.
    eos_id: int
    # Those that stand for no text: beginnings and ends, roles in a chat, the unknown piece.
    special_ids: frozenset[int]

    def text_to_ids(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""

    def texts_to_ids(self, texts: list[str]) -> list[list[int]]:
        """`text_to_ids` of each, by as many threads as the host has cores."""

    def ids_to_text(self, ids: list[int]) -> str:
        """Inverse of `text_to_ids`."""


class JsonTokenizer:
    """A `tokenizer.json`. Special tokens that a text spells out become those tokens, as everywhere
    with these files; none are added."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is not a tokenizer."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception:  # the library raises nothing narrower
            raise UserError(f"tokenizer {path} is not a readable tokenizer.json") from None
        # settings of a file that would drop what is long, make up what is short, or draw pieces
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if isinstance(self._tokenizer.model, tokenizers.models.BPE):
            self._tokenizer.model.dropout = None
        # ids may have gaps
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._path = path
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, x in added.items() if x.special)
        eos = _eos_token(path.with_name("tokenizer_config.json"))
        found = None if eos is None else self._tokenizer.token_to_id(eos)
        self.eos_id = -1 if found is None else found

    def text_to_ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def texts_to_ids(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def ids_to_text(self, ids: list[int]) -> str:
        for token in ids:
            if not 0 <= token < self.vocab_size:  # the library would leave it out
                raise UserError(
                    f"tokenizer {self._path} has no token {token}: its ids are below "
                    f"{self.vocab_size}"
                )
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _eos_token(path: Path) -> str | None:
    """The text of EOS that the configuration of a Hugging Face tokenizer names, if there is one."""
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is not a readable tokenizer configuration") from None
    if isinstance(named, dict):
        named = named.get("content")
    return named if isinstance(named, str) else None


def tokenizer_file(path: str | Path) -> Path:
    """The file that `path` means: itself, or the tokenizer in a Hugging Face directory. Raises
    UserError if the directory has none."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = find_tokenizer(path)
    if found is None:
        raise UserError(f"tokenizer {path} is a directory without {' or '.join(TOKENIZER_FILES)}")
    return found


def tokenizer_library(path: Path) -> str:
    """Name and version of the library that reads the tokenizer file `path`."""
    library = "tokenizers" if path.suffix == ".json" else "sentencepiece"
    return f"{library} {version(library)}"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer `path`: a SentencePiece model, a `.json` file, or a directory that holds one.
    Raises UserError if it is missing or not one."""
    path = tokenizer_file(path)
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist or is not a file")
    if path.suffix == ".json":
        return JsonTokenizer(path)
    # Imported here, so that reading documents does not take the seconds that Megatron's import
    # does.
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import (
        SentencePieceTokenizer,
    )

    try:
        wrapper = SentencePieceTokenizer(str(path))
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer {path} is not a readable SentencePiece model") from None
    model = wrapper.tokenizer
    wrapper.special_ids = frozenset(
        piece
        for piece in range(wrapper.vocab_size)
        if model.IsControl(piece) or model.IsUnknown(piece)
    )
    wrapper.texts_to_ids = partial(model.encode, num_threads=-1)
    return wrapper


def check_vocabulary(config: DataConfig, path: str, pieces: int, vocab_size: int) -> None:
    """Raise UserError if the tokenizer `path` of so many pieces cannot be the model's."""
    unused = vocab_size - pieces
    if unused < 0 or unused > config.unused_vocabulary:
        raise UserError(
            f"tokenizer {path} is not the model's: it has {pieces} pieces, the "
            f"model a vocabulary of {vocab_size}"
            + (
                f" and data.unused_vocabulary allows {config.unused_vocabulary} more than there "
                "are pieces"
                if unused > 0
                else ""
            )
        )
