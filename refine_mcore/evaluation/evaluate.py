"""Evaluation of a model on chosen tasks: rows through generation, texts through next-token scores,
and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from refine_mcore import platform
from refine_mcore.data import Tokenizer, read_documents
from refine_mcore.errors import UserError
from refine_mcore.evaluation import report
from refine_mcore.evaluation.checkpoint import Opened, arithmetic, checkpoint_directory, identity
from refine_mcore.evaluation.metrics import LONGBENCH_TASKS, RULER_QA_TASKS
from refine_mcore.evaluation.next_token import doubling_borders, next_token_scores
from refine_mcore.evaluation.runner import Results, run_rows
from refine_mcore.evaluation.tasks import VARIANTS, Row, niah_rows, rows_of_files
from refine_mcore.evaluation.tasks.files import files_of
from refine_mcore.files import written_whole
from refine_mcore.generation import Sampling, generate, response_text
from refine_mcore.models.fast_weight_model import LanguageModel

GROUPS: dict[str, tuple[str, ...]] = {
    "ruler_niah": tuple(VARIANTS),
    "ruler_qa": RULER_QA_TASKS,
    "longbench": LONGBENCH_TASKS,
    "ntp": ("ntp",),
}
_FROM_FILES = {*RULER_QA_TASKS, *LONGBENCH_TASKS}


@dataclass(frozen=True)
class Settings:
    """What is evaluated; every field but `batch_size` shows in the figures."""

    tasks: tuple[str, ...]  # single ones, no groups
    data: tuple[str, ...] = ()  # files or directories of RULER's QA and LongBench
    texts: tuple[str, ...] = ()  # documents of `ntp`
    lengths: tuple[int, ...] = (4096,)  # of needles, in tokens
    rows: int | None = None  # of each file, and of each variant and length (null: 500)
    longest_prompt: int | None = None
    text_length: int = 16384  # most tokens of a text of `ntp`
    seeds: tuple[int, ...] = (0,)
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise UserError(f"the number of rows must be at least 1, not {self.rows}")
        if self.batch_size < 1:
            raise UserError(f"the batch size must be at least 1, not {self.batch_size}")
        if "ntp" in self.tasks and not self.texts:
            raise UserError("task ntp needs text files: name them with --texts")
        if _FROM_FILES.intersection(self.tasks) and not self.data:
            raise UserError("ruler_qa and longbench need their files: name them with --data")


def task_names(names: Sequence[str]) -> tuple[str, ...]:
    """Single tasks of names and groups. Raises UserError for an unknown one."""
    every = {name: group for group, found in GROUPS.items() for name in found}
    single: list[str] = []
    for name in names:
        if name not in every and name not in GROUPS:
            known = ", ".join([*GROUPS, *(x for x in every if x != "ntp")])
            raise UserError(f"unknown task {name!r}; known: {known}")
        single += GROUPS.get(name, (name,))
    return tuple(dict.fromkeys(single))


def evaluate(opened: Opened, settings: Settings, output: Path) -> str:
    """Run everything of `settings` that `output` does not hold yet, on the checkpoint that was
    opened; the tables as Markdown.

    `output` gets results.jsonl as rows are done, and in the end report.json, report.md and, with
    needles, needles.png. All ranks call this; the first writes.
    """
    first, tokenizer = platform.rank() == 0, opened.tokenizer
    files = [*files_of(settings.data), *map(Path, settings.texts)]
    known = asdict(settings) | identity(opened.config, tokenizer, files)
    del known["batch_size"], known["tasks"], known["seeds"]
    if first:
        output.mkdir(parents=True, exist_ok=True)
    results = Results(output / "results.jsonl", known, writer=first)
    rows = _rows(tokenizer, settings)
    total = len(rows) * len(settings.seeds)
    with tqdm(total=total, unit="row", disable=not (first and rows)) as bar:
        run_rows(
            rows,
            settings.seeds,
            partial(_generate, opened, settings),
            lambda row, tokens: response_text(tokenizer, row.prompt, tokens),
            results,
            batch_size=settings.batch_size,
            progress=bar.update,
        )
    if "ntp" in settings.tasks:
        _next_tokens(opened.model, tokenizer, settings, results)
    scored = results.of(rows, settings.seeds)
    texts = [x for x in results.lines if x["task"] == "ntp" and "ntp" in settings.tasks]
    table, positions = report.scores(scored), report.next_token_means(texts)
    checkpoint = checkpoint_directory(opened.config)
    text = report.markdown(table, positions, checkpoint, arithmetic(opened.config))
    if first:
        means = {
            task: {column: asdict(mean) for column, mean in columns.items()}
            for task, columns in table.items()
        }
        figures = {
            "checkpoint": str(checkpoint),
            "settings": known,
            "seeds": settings.seeds,
            "scores": means,
            "next_token": positions,
        }
        _write(output / "report.json", json.dumps(figures, indent=2) + "\n")
        _write(output / "report.md", text)
        report.plot_needles(scored, output / "needles.png")
    return text


def _rows(tokenizer: Tokenizer, settings: Settings) -> list[Row]:
    needles = [name for name in settings.tasks if name in VARIANTS]
    found = niah_rows(tokenizer, settings.lengths, settings.rows or 500, 0, needles)
    of_files = [name for name in settings.tasks if name in _FROM_FILES]
    if of_files:
        longest = settings.longest_prompt
        found += rows_of_files(
            settings.data, tokenizer, of_files, rows=settings.rows, longest=longest
        )
    return found


def _generate(
    opened: Opened,
    settings: Settings,
    prompts: list[list[int]],
    most: int,
    seed: int,
    ids: list[int],
    stop: Callable[[list[int]], bool] | None,
) -> list[list[int]]:
    sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, seed)
    return generate(
        opened.model,
        prompts,
        most,
        sampling=sampling,
        ids=ids,
        end_tokens=opened.end_tokens,
        stop=stop,
    )


def _next_tokens(
    model: LanguageModel, tokenizer: Tokenizer, settings: Settings, results: Results
) -> None:
    """The first tokens of every document, in buckets that double in length."""
    borders = doubling_borders(settings.text_length)
    for document in read_documents(settings.texts):
        key = document.origin
        if not results.missing("ntp", key, 0):
            continue
        tokens = tokenizer.text_to_ids(document.text)[: settings.text_length]
        if len(tokens) > 1:
            buckets = next_token_scores(model, tokens, borders, seed=0)
            results.add("ntp", key, 0, group={}, buckets=[asdict(x) for x in buckets])


def _write(path: Path, text: str) -> None:
    with written_whole(path) as partial_file:
        partial_file.write_text(text, encoding="utf-8")
