"""The tokenizer: Megatron-Core's SentencePiece wrapper as it is, with errors that name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from refine_mcore.errors import UserError


class Tokenizer(Protocol):
    """What the project uses of Megatron's tokenizers."""

    # Number of pieces; all ids are below it.
    vocab_size: int

    def text_to_ids(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""

    def ids_to_text(self, ids: list[int]) -> str:
        """Inverse of `text_to_ids`."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The SentencePiece model in file `path`. Raises UserError if it is missing or not one."""
    # Imported here, so that reading documents does not take the seconds that Megatron's import
    # does.
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import (
        SentencePieceTokenizer,
    )

    if not Path(path).is_file():
        raise UserError(f"tokenizer {path} does not exist or is not a file")
    try:
        return SentencePieceTokenizer(str(path))
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer {path} is not a readable SentencePiece model") from None
