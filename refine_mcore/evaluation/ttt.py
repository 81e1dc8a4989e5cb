"""Test-time training: adapt to the prompts of a batch by ReFINE updates, then answer them.

Weights and optimizer state go back to where they were after every batch or example, unless
`ttt.reset` says otherwise. The authors' evaluation never resets, which the paper does not say: its
adaptation adds up over the test set (`ttt.reset: none`).

What an example's rollouts draw follows from its prompt alone, never from its place in the files.
With `reset: example` its answer does too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
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
from refine_mcore.evaluation.metrics import LONGBENCH_TASKS, RULER_QA_TASKS
from refine_mcore.evaluation.report import markdown, scores
from refine_mcore.evaluation.runner import Results
from refine_mcore.evaluation.tasks import Row, rows_of_files
from refine_mcore.generation import generate, response_text
from refine_mcore.models.whole_model import whole_model
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.phases import shortest_prompt
from refine_mcore.training.setup import build_training


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

    def __init__(self, config: Config, pg_collection: Any) -> None:
        self._config = config
        self.stage, _, self.optimizer, _, self._step = build_training(config, pg_collection)
        self.model = whole_model(self.stage)
        self._batches = 0
        self._begin = None if config.ttt.reset == "none" else Snapshot(self.stage, self.optimizer)

    def answer(self, rows: Sequence[Row], end_tokens: Sequence[int]) -> list[list[int]]:
        """Adapt to the prompts of `rows` as one batch, and answer each of them; the weights are
        reset afterwards, unless they never are."""
        self._step(self._micro_batches(rows), 0 if self._begin else self._batches)
        self._batches += 1
        prompts = [row.prompt for row in rows]
        most = max(row.max_new_tokens for row in rows)
        responses = generate(self.model, prompts, most, end_tokens=end_tokens)
        if self._begin is not None:
            self._begin.restore()
        return [tokens[: row.max_new_tokens] for row, tokens in zip(rows, responses, strict=True)]

    def _micro_batches(self, rows: Sequence[Row]) -> list[TextBatch]:
        size = self._config.training.micro_batch_size
        length = max(len(row.prompt) for row in rows)
        found = []
        for start in range(0, len(rows), size):
            prompts = [row.prompt for row in rows[start : start + size]]
            tokens, mask = padded(prompts, length)
            names = torch.tensor([_name(prompt) for prompt in prompts])
            sample = {"tokens": tokens, "mask": mask, "sample_index": names}
            found.append(TextBatch.of(sample, platform.device()))
        return found


def _name(prompt: Sequence[int]) -> int:
    """A number that stands for a prompt in the random draws."""
    data = b",".join(b"%d" % token for token in prompt)
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "little")


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
    settings = {
        "model": config.model.checkpoint,
        "reset": config.ttt.reset,
        "refine": str(config.refine),
        "optimizer": str(config.optimizer),
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
    adapted = AdaptingModel(config, pg_collection)
    ends = () if tokenizer.eos_id < 0 else (tokenizer.eos_id,)
    with tqdm(total=len(rows), unit="row", disable=not (first and config.run.progress)) as bar:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            bar.update(len(batch))
            if not any(results.missing(row.task, row.key, 0) for row in batch):
                continue
            for row, tokens in zip(batch, adapted.answer(batch, ends), strict=True):
                if results.missing(row.task, row.key, 0):
                    results.add_response(row, 0, response_text(tokenizer, row.prompt, tokens))
    return markdown(scores(results.lines), [])
