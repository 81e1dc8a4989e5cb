"""Text of generated tokens, as a whole and as they come. Special tokens are no text, and neither
are rows that a vocabulary has beyond the tokenizer's pieces."""

from __future__ import annotations

from collections.abc import Sequence

from refine_mcore.data import Tokenizer

# Tokens of the prompt that are decoded with a response: tokenizers drop the blank before the first.
_CONTEXT = 8
_REPLACEMENT = "�"  # what a decoder makes of bytes that are no character yet


def response_text(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    special_tokens: bool = False,
) -> str:
    """The text that the tokens `response` add to the prompt, with `special_tokens` theirs too, for
    who looks for one."""
    before = list(prompt[-_CONTEXT:])
    said = [x for x in response if _is_text(tokenizer, x, special_tokens)]
    return tokenizer.ids_to_text([*before, *said])[len(tokenizer.ids_to_text(before)) :]


def _is_text(tokenizer: Tokenizer, token: int, special_tokens: bool = False) -> bool:
    return token < tokenizer.vocab_size and (special_tokens or token not in tokenizer.special_ids)


class TextStream:
    """The text of a response as its tokens come: each piece once, when it can no longer change."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._tokens = tokenizer, list(prompt[-_CONTEXT:])
        self._said = len(tokenizer.ids_to_text(self._tokens))

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        if _is_text(self._tokenizer, token):
            self._tokens.append(token)
        text = self._tokenizer.ids_to_text(self._tokens)
        return self._until(text, len(text.rstrip(_REPLACEMENT)))

    def rest(self) -> str:
        """What is left when no token follows."""
        text = self._tokenizer.ids_to_text(self._tokens)
        return self._until(text, len(text))

    def _until(self, text: str, stop: int) -> str:
        said, self._said = self._said, max(stop, self._said)
        return text[said : self._said]
