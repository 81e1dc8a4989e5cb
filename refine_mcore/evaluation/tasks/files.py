"""RULER's SQuADQA and HotpotQA and LongBench, from files that hold prompts and answers
(data/examples.py), with the columns of the authors' files: `task` names the task, `max_gen_tokens`
how far to generate (RULER's have none: 32)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from refine_mcore.data import Tokenizer, read_examples
from refine_mcore.errors import UserError
from refine_mcore.evaluation.metrics import LONGBENCH_TASKS, RULER_QA_TASKS
from refine_mcore.evaluation.tasks.row import Row

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
            tokens = example.row.get("max_gen_tokens", _RULER_TOKENS)
            if not isinstance(tokens, int) or tokens < 1:
                raise UserError(f"{example.origin} has no positive number in 'max_gen_tokens'")
            prompt = tokenizer.text_to_ids(example.prompt)
            if longest is not None and len(prompt) > longest:
                raise UserError(
                    f"{example.origin}: the prompt has {len(prompt)} tokens, more than the "
                    f"{longest} allowed"
                )
            key, one_line = f"{path.name}:{taken}", task in _ONE_LINE
            found.append(
                Row(task, key, prompt, example.answers, tokens, {}, one_line, example.origin)
            )
            taken += 1
    if not found:
        raise UserError(f"{', '.join(paths)}: no rows of {', '.join(sorted(tasks))}")
    return found
