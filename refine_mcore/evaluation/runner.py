"""Runs rows through a model and keeps what is done: one line per response in a file that a killed
run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from refine_mcore.errors import UserError
from refine_mcore.evaluation.metrics import score
from refine_mcore.evaluation.tasks import Row
from refine_mcore.generation import NotFiniteError

# Token ids after each prompt: generate(prompts, most tokens, seed, ids, stop).
Generate = Callable[
    [list[list[int]], int, int, list[int], Callable[[list[int]], bool] | None], list[list[int]]
]


class Results:
    """Lines of JSON, each of one row and seed, in `path`; only the `writer` rank writes.

    Lines of other `settings` are refused: they would be mixed up with these. A last line that was
    cut off by a kill is dropped.
    """

    def __init__(self, path: Path, settings: dict[str, Any], writer: bool) -> None:
        text = json.dumps(settings, sort_keys=True)
        self._mark = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._path, self._writer = path, writer
        self.lines: list[dict[str, Any]] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content.rpartition(b"\n")[0]
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                found = json.loads(line)
                same = found["settings"] == self._mark
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}:{number} is not a line of results") from None
            if not same:
                raise UserError(
                    f"{path} holds results of another model or of other settings: name another "
                    "directory or remove it"
                )
            self.lines.append(found)
        if writer and whole and len(whole) + 1 < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole) + 1)
        elif writer and not whole and content:
            path.write_bytes(b"")
        self._done = {(x["task"], x["key"], x["seed"]) for x in self.lines}

    def missing(self, task: str, key: str, seed: int) -> bool:
        return (task, key, seed) not in self._done

    def of(self, rows: Collection[Row], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The lines of these rows and seeds."""
        asked = {(row.task, row.key, seed) for row in rows for seed in seeds}
        return [x for x in self.lines if (x["task"], x["key"], x["seed"]) in asked]

    def add(self, task: str, key: str, seed: int, **values: Any) -> None:
        line = {"task": task, "key": key, "seed": seed, "settings": self._mark, **values}
        self.lines.append(line)
        self._done.add((task, key, seed))
        if self._writer:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def add_response(self, row: Row, seed: int, response: str) -> None:
        """Of a row, with its score."""
        self.add(
            row.task,
            row.key,
            seed,
            group=row.group,
            response=response,
            answers=list(row.answers),
            prompt_tokens=len(row.prompt),
            score=score(row.task, response, row.answers),
        )


def run_rows(
    rows: Sequence[Row],
    seeds: Sequence[int],
    generate: Generate,
    text_of: Callable[[Row, list[int]], str],
    results: Results,
    *,
    batch_size: int,
    progress: Callable[[int], object],
) -> None:
    """Generate and score what is missing of every row and seed; `progress(n)` hears of n more.

    `text_of` makes the text of a response. Rows of a task are batched in their order; a response
    does not depend on the others. Raises UserError for a row that the model has no finite logits
    for.
    """
    work = [(row, seed) for seed in seeds for row in rows]
    todo = [(row, seed) for row, seed in work if results.missing(row.task, row.key, seed)]
    progress(len(work) - len(todo))
    while todo:
        row, seed = todo[0]
        alike = (row.task, row.max_new_tokens, seed)
        batch = [x for x in todo[:batch_size] if (x[0].task, x[0].max_new_tokens, x[1]) == alike]
        todo = [x for x in todo[:batch_size] if x not in batch] + todo[batch_size:]

        def ended(tokens: list[int], row: Row = row) -> bool:
            return "\n" in text_of(row, tokens)

        try:
            responses = generate(
                [each.prompt for each, _ in batch],
                row.max_new_tokens,
                seed,
                [each.draws for each, _ in batch],
                ended if row.one_line else None,
            )
        except NotFiniteError as error:
            raise UserError(f"{row.task} {batch[error.stream][0].key}: {error}") from None
        for (each, _), tokens in zip(batch, responses, strict=True):
            results.add_response(each, seed, text_of(each, tokens))
        progress(len(batch))
