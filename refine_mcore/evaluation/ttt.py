"""Test-time training: adapt to the prompts of a batch by ReFINE updates, then answer them.

Weights and optimizer state go back to where they were after every batch or example, unless
`ttt.reset` says otherwise. The authors' evaluation never resets, which the paper does not say: its
adaptation adds up over the test set, which is one file (`ttt.reset: none`). Each file begins with a
batch and the weights of the checkpoint.

What an example's rollouts draw follows from its prompt alone, never from its place in the files.
With `reset: example` its answer does too.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from refine_mcore import compat, platform
from refine_mcore.config import Config
from refine_mcore.data import Tokenizer, padded
from refine_mcore.errors import UserError
from refine_mcore.evaluation.checkpoint import (
    arithmetic,
    checkpoint_directory,
    end_tokens,
    identity,
)
from refine_mcore.evaluation.metrics import LONGBENCH_TASKS, RULER_QA_TASKS
from refine_mcore.evaluation.report import markdown, scores
from refine_mcore.evaluation.runner import Results
from refine_mcore.evaluation.tasks import Row, rows_of_files
from refine_mcore.evaluation.tasks.files import files_of
from refine_mcore.generation import NotFiniteError, generate, response_text
from refine_mcore.models.whole_model import whole_model
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.phases import shortest_prompt
from refine_mcore.training.setup import build_training, with_one_checkpoint

logger = logging.getLogger(__name__)


class Snapshot:
    """All tensors of a model and its optimizer as they are now; `restore` brings back every bit."""

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        compat.prime_optimizer(optimizer)
        self._tensors = list(_tensors(model, optimizer))
        self._kept = [x.detach().clone() for x in self._tensors]
        # a fused Adam counts its steps as a number in each group
        self._groups = [(group, dict(group)) for group in _groups(optimizer)]

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, kept in zip(self._tensors, self._kept, strict=True):
            tensor.copy_(kept)
        for group, options in self._groups:
            group.clear()
            group.update(options)


def _tensors(model: torch.nn.Module, optimizer: Any) -> Iterator[Tensor]:
    """Weights, main weights, moments and step counts."""
    yield from model.parameters()
    yield from model.buffers()
    for group in _groups(optimizer):
        yield from group["params"]
        yield from (x for x in group.values() if isinstance(x, Tensor))
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))


def _groups(optimizer: Any) -> Iterator[dict[str, Any]]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from part.optimizer.param_groups


class AdaptingModel:
    """A model that adapts to prompts before it answers them. Every rank makes the same calls."""

    def __init__(self, config: Config, pg_collection: Any, *, goes_back: bool = True) -> None:
        """Without `goes_back` nothing is kept to begin again from."""
        self._config = config
        self.stage, _, self.optimizer, _, self._step = build_training(config, pg_collection)
        self.model = whole_model(self.stage)
        self._batches = 0  # adapted to since the beginning
        self._begin = Snapshot(self.stage, self.optimizer) if goes_back else None

    def answer(self, rows: Sequence[Row], end_tokens: Collection[int]) -> list[list[int]]:
        """Adapt to the prompts of `rows` as one batch, and answer each of them; back at the
        beginning afterwards, unless `ttt.reset` is none.

        A warning names rows of which an update was skipped. Raises UserError for a row that the
        adapted model has no finite logits for.
        """
        metrics, grad_norm = self._step(self._micro_batches(rows), self._batches)
        self._batches += 1
        if metrics.skipped_steps and platform.rank() == 0:
            logger.warning(
                "%d update(s) by %s skipped, as the loss or the norm of its gradient (%s) is not "
                "finite: they are answered without",
                *(metrics.skipped_steps, _origins(rows), grad_norm),
            )
        prompts = [row.prompt for row in rows]
        most = max(row.max_new_tokens for row in rows)
        try:
            responses = generate(self.model, prompts, most, end_tokens=end_tokens)
        except NotFiniteError as error:
            raise UserError(f"{rows[error.stream].origin}: {error}, after adapting") from None
        if self._config.ttt.reset != "none":
            self.begin_again()
        return [tokens[: row.max_new_tokens] for row, tokens in zip(rows, responses, strict=True)]

    def begin_again(self) -> None:
        """Go back to the weights and optimizer state of the beginning."""
        assert self._begin is not None
        self._begin.restore()
        self._batches = 0

    def _micro_batches(self, rows: Sequence[Row]) -> list[TextBatch]:
        size = self._config.training.micro_batch_size
        length = max(len(row.prompt) for row in rows)
        found = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            tokens, mask = padded([row.prompt for row in some], length)
            index = torch.tensor([row.draws for row in some])
            sample = {"tokens": tokens, "mask": mask, "sample_index": index}
            found.append(TextBatch.of(sample, platform.device()))
        return found


def _origins(rows: Sequence[Row]) -> str:
    return " to ".join(dict.fromkeys((rows[0].origin, rows[-1].origin)))


def answer_rows(config: Config, tokenizer: Tokenizer, pg_collection: Any) -> str:
    """Answer all rows of `data.paths` in RUN/responses.jsonl; the table of scores as Markdown.

    A killed run goes on with the rows it has not answered, unless nothing is reset. Raises
    UserError for data-parallel replicas, prompts too short to roll out from, and bad rows.
    """
    if pg_collection.dp.size() > 1:
        raise UserError(
            f"test-time training runs one replica: parallel.tensor x parallel.pipeline must be the "
            f"{dist.get_world_size()} ranks that were started"
        )
    config = with_one_checkpoint(config)
    tasks = (*RULER_QA_TASKS, *LONGBENCH_TASKS)
    longest = config.data.sequence_length - 1
    rows = rows_of_files(config.data.paths, tokenizer, tasks, longest=longest)
    shortest = shortest_prompt(config)
    for row in rows:
        if len(row.prompt) < shortest:
            raise UserError(
                f"{row.origin}: the prompt has {len(row.prompt)} tokens, rollouts need {shortest} "
                "(refine.margin_left, refine.margin_right, refine.num_chunks)"
            )
    if config.data.packing != "none":
        raise UserError(
            "data.packing documents is of training: prompts of test-time training are read alone"
        )
    if config.optimizer.lr_warmup_steps:
        raise UserError(
            "test-time training takes every step at optimizer.lr: optimizer.lr_warmup_steps must "
            f"be 0, not {config.optimizer.lr_warmup_steps}"
        )
    directory, first = Path(config.run.directory), platform.rank() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
    settings = identity(config, tokenizer, files_of(config.data.paths)) | {
        "reset": config.ttt.reset,
        "refine": asdict(config.refine),
        "optimizer": asdict(config.optimizer),
        "seed": config.training.seed,
        "batch": config.training.global_batch_size,
    }
    results = Results(directory / "responses.jsonl", settings, writer=first)
    if config.ttt.reset == "none" and results.lines:
        raise UserError(
            f"{directory} holds responses, and a run with ttt.reset none cannot go on from the "
            "middle: name another run.directory"
        )
    size = 1 if config.ttt.reset == "example" else config.training.global_batch_size
    several = len({row.file for row in rows}) > 1
    adapted = AdaptingModel(config, pg_collection, goes_back=several or config.ttt.reset != "none")
    ends = end_tokens(tokenizer, checkpoint_directory(config))
    with tqdm(total=len(rows), unit="row", disable=not (first and config.run.progress)) as bar:
        for _, found in groupby(rows, key=lambda row: row.file):
            of_file = list(found)
            if several:
                adapted.begin_again()
            for start in range(0, len(of_file), size):
                batch = of_file[start : start + size]
                bar.update(len(batch))
                if not any(results.missing(row.task, row.key, 0) for row in batch):
                    continue
                for row, tokens in zip(batch, adapted.answer(batch, ends), strict=True):
                    if results.missing(row.task, row.key, 0):
                        results.add_response(row, 0, response_text(tokenizer, row.prompt, tokens))
    table = scores(results.of(rows, [0]))
    return markdown(table, [], checkpoint_directory(config), arithmetic(config))
