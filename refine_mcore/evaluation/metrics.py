"""Scores of responses as RULER and LongBench define them, 0 to 1, the best over the references.

They follow the published code of ReFINE (LongBench's, with changes) to the last row of
tests/golden/metrics.json, quirks included: a QA answer is the first line alone, TREC's classes are
looked for anywhere in it, a ROUGE that its library gives up on counts as 0. Here a reference is
compared as a whole; that code cuts it at every "|".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from refine_mcore.errors import UserError

# TREC's question types in the words of LongBench's prompts, the cut-off one included.
_TREC_CLASSES = (
    *("Abbreviation", "Animal", "City", "Color", "Country", "Currency name", "Date"),
    *("Definition of something", "Description of a person", "Description of something"),
    *("Disease and medicine", "Distance, linear measure", "Element and substance"),
    *("Equivalent term", "Event", "Expression abbreviated", "Food"),
    *("Group or organization of person", "Individual", "Invention, book and other creative piece"),
    *("Language", "Lasting time of somethin", "Letter like a-z", "Manner of an action", "Mountain"),
    *("Musical instrument", "Number of something", "Order, rank", "Organ of body", "Other entity"),
    *("Other location", "Other number", "Percent, fraction", "Plant", "Postcode or other code"),
    *("Price", "Product", "Reason", "Religion", "Size, area and volume", "Speed", "Sport", "State"),
    *("Symbols and sign", "Techniques and method", "Temperature", "Title of a person", "Vehicle"),
    *("Weight", "Word with a special property"),
)
_CONTROL = re.compile(r"[\x00-\x1f]")


def token_f1(response: str, answer: str) -> float:
    """F1 of the words, as SQuAD normalises them: lower case, without punctuation and articles."""
    found, wanted = _words(response), _words(answer)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(response: str, answer: str) -> float:
    """F1 of the longest common subsequence of words, by the library `rouge`; 0 where that fails:
    on empty texts and on more words than its recursion takes."""
    try:
        from rouge import Rouge
    except ModuleNotFoundError:
        raise UserError("ROUGE takes the library rouge, of the extra `eval`") from None
    try:
        return float(Rouge().get_scores([response], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def class_named(response: str, answer: str) -> float:
    """1 / (how many of TREC's classes the response names), if it names the right one."""
    named = [name for name in _TREC_CLASSES if name in response]
    return 1 / len(named) if answer in named else 0.0


def similarity(response: str, answer: str) -> float:
    """Python's ratio of matching characters, rounded to hundredths; 0 if one side alone is
    empty."""
    if not response and answer:
        return 0.0
    return round(100 * SequenceMatcher(None, response, answer).ratio()) / 100


def any_of(response: str, answers: Sequence[str]) -> float:
    """1 if one of the references is in the response, in any case."""
    return float(any(answer.lower() in _plain(response) for answer in answers))


def all_of(response: str, answers: Sequence[str]) -> float:
    """Share of the references that are in the response, in any case."""
    return sum(answer.lower() in _plain(response) for answer in answers) / len(answers)


def _plain(response: str) -> str:
    """In lower case, with line breaks for control characters."""
    return _CONTROL.sub("\n", response.strip()).strip().lower()


def _first_line(response: str) -> str:
    return response.split("\n")[0]


def _first_text(response: str) -> str:
    """The first line after any empty ones."""
    return _first_line(response.lstrip("\n"))


def _line_of_code(response: str) -> str:
    """The first line that has neither comment nor fence, or else all of it."""
    lines = response.lstrip("\n").split("\n")
    marks = ("`", "#", "//")
    return next((x for x in lines if not any(mark in x for mark in marks)), response)


def _whole(response: str) -> str:
    return response


Compare = Callable[[str, str], float]
# By task: what of the response counts, and how it is compared with one reference.
_LONGBENCH: dict[str, tuple[Callable[[str], str], Compare]] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa"),
        (_first_line, token_f1),
    ),
    "triviaqa": (_first_text, token_f1),
    **dict.fromkeys(("qmsum", "multi_news"), (_whole, rouge_l)),
    "samsum": (_first_text, rouge_l),
    "trec": (_first_text, class_named),
    **dict.fromkeys(("lcc", "repobench-p"), (_line_of_code, similarity)),
}
_RULER_QA = ("ruler_squadqa", "ruler_hotpotqa")
LONGBENCH_TASKS, RULER_QA_TASKS = tuple(_LONGBENCH), _RULER_QA


def score(task: str, response: str, answers: Sequence[str]) -> float:
    """Score of a response, 0 to 1, by the metric of the task: one of LongBench's, RULER's QA, or
    `niah_...`. Raises UserError for another task and for no references."""
    if not answers:
        raise UserError(f"task {task}: a row without reference answers cannot be scored")
    if task.startswith("niah_"):
        return all_of(response, answers)
    if task in _RULER_QA:
        return any_of(_first_line(response), answers)
    if task not in _LONGBENCH:
        known = ", ".join([*_LONGBENCH, *_RULER_QA, "niah_..."])
        raise UserError(f"no metric is known for task {task!r}; known: {known}")
    part, compare = _LONGBENCH[task]
    return max(compare(part(response), answer) for answer in answers)
