"""RULER's SQuADQA and HotpotQA and LongBench, from files that hold prompts and answers
(data/examples.py), with the columns of the authors' files: `task` names the task, `max_gen_tokens`
how far to generate (RULER's have none: 32), `max_seq_length` the length whose rows are averaged
together (LongBench's have none)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from refine_mcore import platform
from refine_mcore.data import Tokenizer, read_examples
from refine_mcore.data.examples import Example
from refine_mcore.errors import UserError
from refine_mcore.evaluation.metrics import LONGBENCH_TASKS, RULER_QA_TASKS
from refine_mcore.evaluation.tasks.row import Row

logger = logging.getLogger(__name__)

_RULER_TOKENS = 32
# Their metrics look no further than the first line, which no line break may begin.
_ONE_LINE = {
    *RULER_QA_TASKS,
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa"),
}


def files_of(paths: Iterable[str]) -> list[Path]:
    """The files named, and those of `.parquet` and `.jsonl` in the directories named. Raises
    UserError for a directory without any."""
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(x for x in path.iterdir() if x.suffix in (".parquet", ".jsonl"))
        if not inside:
            raise UserError(f"{path} holds no .parquet or .jsonl files")
        found += inside
    return found


def rows_of_files(
    paths: Iterable[str],
    tokenizer: Tokenizer,
    tasks: Collection[str],
    *,
    rows: int | None = None,
    longest: int | None = None,
) -> list[Row]:
    """The rows of the given tasks, `rows` at most of each file; of other tasks' files none.

    Raises UserError for files that cannot be read, rows without a task, a task without a metric, a
    prompt of more than `longest` tokens, and where nothing is left.
    """
    found: list[Row] = []
    for path in files_of(paths):
        taken = 0
        for example in read_examples([path]):
            if taken == rows:
                break
            task = example.row.get("task")
            if not isinstance(task, str):
                raise UserError(f"{example.origin} has no text in the field 'task'")
            if task not in (*LONGBENCH_TASKS, *RULER_QA_TASKS):
                known = ", ".join((*LONGBENCH_TASKS, *RULER_QA_TASKS))
                raise UserError(f"{example.origin} is of the unknown task {task!r}; known: {known}")
            if task not in tasks:
                continue
            tokens = _number(example, "max_gen_tokens", _RULER_TOKENS)
            length = _number(example, "max_seq_length", None)
            prompt = tokenizer.text_to_ids(example.prompt)
            if longest is not None and len(prompt) > longest:
                raise UserError(
                    f"{example.origin}: the prompt has {len(prompt)} tokens, more than the "
                    f"{longest} allowed"
                )
            found.append(
                Row(
                    task,
                    f"{path}:{taken}",
                    prompt,
                    example.answers,
                    tokens,
                    {} if length is None else {"length": length},
                    task in _ONE_LINE,
                    str(path),
                    example.origin,
                )
            )
            taken += 1
    if not found:
        raise UserError(f"{', '.join(paths)}: no rows of {', '.join(sorted(tasks))}")
    _warn_of_joined(found)
    return found


def _number(example: Example, name: str, default: Any) -> Any:
    """A field that holds a positive number, `default` without it."""
    value = example.row.get(name, default)
    if value is not default and (type(value) is not int or value < 1):
        raise UserError(f"{example.origin} has no positive number in {name!r}")
    return value


def _warn_of_joined(rows: Iterable[Row]) -> None:
    """Say whose rows one figure is made of although they may be of several lengths."""
    files: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if "length" not in row.group:
            files[row.task][row.file] = None
    for task, names in files.items():
        if len(names) > 1 and platform.rank() == 0:
            logger.warning(
                "the rows of %s, without 'max_seq_length', are averaged over %d files: %s",
                *(task, len(names), ", ".join(names)),
            )
