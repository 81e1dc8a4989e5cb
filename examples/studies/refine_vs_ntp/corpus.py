"""The texts of the study: public-domain prose with facts in between that are told once and asked
for later, `KEY VALUE,` each time. KEY and VALUE are words of the prose, paired anew in every text,
so that only the text itself says the value: associative recall over real text.

Every fact comes `asks` more times, in a new order each time; all places are drawn evenly. A text of
the kind `dense` is made of facts alone. The last part of every document is never trained on.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

_HELD_OUT = 0.15  # of each document, its end
_WORDS = 128  # half are keys, half values


class Text(NamedTuple):
    """A text, and the bytes [begin, end) of every value that was told before."""

    text: str
    recalled: list[tuple[int, int]]


class Corpus:
    """Draws texts of at least so many tokens from the documents of `path`."""

    def __init__(self, path: Path, tokenizer: SentencePieceProcessor, held_out: bool) -> None:
        self._tokenizer = tokenizer
        documents = [json.loads(line)["text"].split() for line in path.read_text().splitlines()]
        border = [int(len(words) * (1 - _HELD_OUT)) for words in documents]
        self._prose = [
            word
            for words, i in zip(documents, border, strict=True)
            for word in (words[i:] if held_out else words[:i])
        ]
        pieces = (tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size()))
        whole = sorted(p[1:] for p in pieces if re.fullmatch("▁[a-z]{4,}", p))
        words = random.Random(0).sample(whole, _WORDS)
        self.keys, self.values = words[::2], words[1::2]

    def draw(self, rng: random.Random, length: int, facts: int, asks: int, dense: bool) -> Text:
        """A text of `length` tokens or a few more."""
        told = [
            f"{key} {value},"
            for key, value in zip(
                rng.sample(self.keys, facts), rng.choices(self.values, k=facts), strict=True
            )
        ]
        if dense:
            asks = length // (3 * facts)  # key, value and comma: three tokens
        lines = [*told]
        for _ in range(asks):
            lines += rng.sample(told, facts)
        if dense:
            return _marked(lines, told)
        room, start = length - self._tokens(lines), rng.randrange(len(self._prose) - length)
        prose: list[str] = []
        while room > 0:
            prose.append(self._prose[start + len(prose)])
            room -= self._tokens(prose[-1:])
        places = sorted(rng.randrange(len(prose) + 1) for _ in lines)
        words, last = [], 0
        for place, line in zip(places, lines, strict=True):
            words += [*prose[last:place], line]
            last = place
        return _marked(words + prose[last:], told)

    def _tokens(self, words: list[str]) -> int:
        return sum(len(self._tokenizer.encode(f" {word}")) for word in words)


def _marked(words: list[str], told: list[str]) -> Text:
    facts, seen, recalled, begin = set(told), set(), [], 0
    for word in words:
        size = len(word.encode())
        if word in seen:
            recalled.append((begin + len(word.split()[0].encode()), begin + size - 1))
        if word in facts:
            seen.add(word)
        begin += size + 1
    return Text(" ".join(words), recalled)


def write_texts(path: Path, corpus: Corpus, kinds: list[dict[str, Any]], seed: int) -> None:
    """`count` texts of each kind, as documents to train on."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for kind in kinds:
            options = {name: value for name, value in kind.items() if name != "count"}
            for _ in range(kind["count"]):
                file.write(json.dumps({"text": corpus.draw(rng, **options).text}) + "\n")
