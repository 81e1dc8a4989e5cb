"""RULER's needles in a haystack, made for any tokenizer and length, as lm-evaluation-harness makes
them.

Deviations: the haystack of prose is the shipped public-domain text, from a place of its own in each
sample; keys are drawn from shorter lists of words and differ within a sample; sentences end at a
full stop, question or exclamation mark; before a needle at the very beginning stands no blank; and
the text is fitted to the word, or to the copy of the noise, with prompt and answer (128 tokens) at
most as long as asked for. There, texts grow by 500 words or 25 copies at a time.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refine_mcore.data import Tokenizer
from refine_mcore.errors import UserError
from refine_mcore.evaluation.tasks.row import Row

HAYSTACK = Path(__file__).parents[3] / "examples" / "data" / "public_domain.jsonl"
_ANSWER_TOKENS = 128
_DEPTHS = [round(i * 100 / 39) for i in range(40)]
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "able acid aged airy amber ample avid bare bitter blank bold brave brief bright broad calm "
    "chilly civil clean clear clever coarse cold cool crisp curly damp dark deep dense dim "
    "distant dry dull dusty eager early easy even faint fair fast fierce fine firm flat fond "
    "free fresh frosty gentle giant glad golden grand gray great green grim happy hard harsh "
    "heavy high hollow honest huge humble icy idle jolly keen kind large late lazy lean light "
    "little lively lone long "
)
_NOUNS = _words(
    "acorn anchor apple arrow badge basin basket beach beacon bell bench blanket boat bottle "
    "bridge brook broom bucket cabin candle canyon carpet castle cedar chain chair cherry "
    "circle clock cloud coast copper corner cotton cradle crown curtain desert door drum dune "
    "eagle engine feather fence ferry field flame flute forest fountain garden gate glove "
    "hammer harbor harvest helmet hill hinge honey island ivory jacket jewel kettle ladder lake "
    "lamp lantern leaf lemon linen lizard maple marble meadow mirror moon mountain needle oak "
    "ocean orchard "
)


@dataclass(frozen=True)
class Variant:
    """Needles of `keys` keys with `values` values each, of which `queries` keys are asked for,
    between the sentences of prose or between lines that repeat the same noise."""

    prose: bool
    keys: int
    values: int
    queries: int


VARIANTS = {
    "niah_single_1": Variant(False, 1, 1, 1),
    "niah_multikey_1": Variant(True, 4, 1, 1),
    "niah_multiquery": Variant(True, 4, 1, 4),
    "niah_multivalue": Variant(True, 1, 4, 1),
}


def niah_rows(
    tokenizer: Tokenizer, lengths: Sequence[int], rows: int, seed: int, variants: Sequence[str]
) -> list[Row]:
    """`rows` samples of each variant and length, by seed, variant, length and number alone.

    A row's `group` has its length and the depth of the needle asked for, of several the first one's
    in the text, in percent. Raises UserError for a length that leaves no room.
    """
    return [
        _row(tokenizer, variant, length, number, seed)
        for variant in variants
        for length in lengths
        for number in range(rows)
    ]


def _row(tokenizer: Tokenizer, name: str, length: int, number: int, seed: int) -> Row:
    variant, rng = VARIANTS[name], random.Random(f"{seed} {name} {length} {number}")
    names = [
        f"{a}-{n}" for a, n in zip(rng.sample(_ADJECTIVES, 4), rng.sample(_NOUNS, 4), strict=True)
    ]
    keys = names[: variant.keys]
    values = [[str(rng.randint(10**6, 10**7 - 1)) for _ in range(variant.values)] for _ in keys]
    asked = rng.sample(range(variant.keys), variant.queries)
    needles = [
        (number, f"One of the special magic numbers for {key} is: {value}.")
        for number, (key, own) in enumerate(zip(keys, values, strict=True))
        for value in own
    ]
    rng.shuffle(needles)
    depths: list[float]
    if variant.prose:
        depths, between = sorted(rng.sample(_DEPTHS, len(needles))), " "
        words = _prose()
        first = int(rng.random() * len(words))

        def pieces(size: int) -> list[str]:
            wrapped = [words[(first + i) % len(words)] for i in range(size)]
            return re.split(r"(?<=[.?!]) ", " ".join(wrapped))
    else:
        depths, between = sorted(100 * rng.random() for _ in needles), "\n"

        def pieces(size: int) -> list[str]:
            return [_NOISE] * size

    question = _question([keys[i] for i in asked], variant)

    def prompt(size: int) -> list[int]:
        context = between.join(_with_needles(pieces(size), needles, depths))
        return tokenizer.text_to_ids(question(context))

    found = _longest(prompt, length - _ANSWER_TOKENS)
    if found is None:
        least = len(prompt(0)) + _ANSWER_TOKENS
        raise UserError(
            f"{name} does not fit into {length} tokens with this tokenizer, which takes {least} "
            "for it without any text around"
        )
    return Row(
        name,
        f"{length}:{number}",
        found,
        tuple(value for i in asked for value in values[i]),
        _ANSWER_TOKENS,
        {
            "length": length,
            "depth": int(min(d for d, (i, _) in zip(depths, needles, strict=True) if i in asked)),
        },
    )


def _with_needles(
    pieces: list[str], needles: Sequence[tuple[int, str]], depths: Sequence[float]
) -> list[str]:
    """Each needle behind that share of the pieces, in percent."""
    found: list[str] = []
    last = 0
    for depth, (_, needle) in zip(depths, needles, strict=True):
        place = int(len(pieces) * depth / 100)
        found += [*pieces[last:place], needle]
        last = place
    return found + pieces[last:]


def _question(keys: Sequence[str], variant: Variant) -> Callable[[str], str]:
    """What makes a prompt of a haystack, the beginning of the answer included."""
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if variant.queries * variant.values == 1:
        hidden, it, verb, asked = "A special magic number is", "number", "is", "What is the"
    else:
        hidden, it, verb = "Some special magic numbers are", "numbers", "are"
        asked = "What are all the"

    def prompt(context: str) -> str:
        return (
            f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {it} afterwards.\n{context}\n{asked} special magic {it} for {query} "
            f"mentioned in the provided text? The special magic {it} for {query} mentioned in the "
            f"provided text {verb}"
        )

    return prompt


def _longest(prompt: Callable[[int], list[int]], room: int) -> list[int] | None:
    """The prompt of the largest size that has at most `room` tokens, None if none has."""
    low, high, best = 0, 1, prompt(0)
    if len(best) > room:
        return None
    while len(found := prompt(high)) <= room:
        low, best, high = high, found, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = prompt(middle)
        if len(found) <= room:
            low, best = middle, found
        else:
            high = middle
    return best


@cache
def _prose() -> list[str]:
    """The words of the shipped documents."""
    try:
        lines = HAYSTACK.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"the haystack {HAYSTACK} cannot be read: {error.strerror}") from None
    return [word for line in lines for word in json.loads(line)["text"].split()]
