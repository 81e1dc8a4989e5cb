"""Figures of held-out texts and a small needle test between training steps.

Draws are counter-based and no random state of the process is touched, so that a run is the same
with and without. Data-parallel replicas share the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refine_mcore import platform
from refine_mcore.config import Config
from refine_mcore.data import Tokenizer, read_documents
from refine_mcore.evaluation.checkpoint import end_tokens
from refine_mcore.evaluation.metrics import score
from refine_mcore.evaluation.next_token import doubling_borders, next_token_scores
from refine_mcore.evaluation.tasks import VARIANTS, Row, niah_rows
from refine_mcore.generation import NotFiniteError, generate, response_text
from refine_mcore.models.fast_weight_model import FastWeightModel, LanguageModel
from refine_mcore.models.whole_model import whole_model

_BATCH = 4  # needles at a time


class HeldOut:
    """What `evaluation` of a configuration asks for, ready to be run on a model; responses end as
    those of the checkpoint `origin` do, where the run has one. Every rank makes one.

    Raises UserError for texts and settings that cannot be read and a length that needles do not fit
    into.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, origin: Path | None) -> None:
        options, self._tokenizer = config.evaluation, tokenizer
        length = options.text_length or config.data.sequence_length
        documents = islice(read_documents(options.paths), options.texts)
        self._texts = [tokenizer.text_to_ids(document.text)[:length] for document in documents]
        self._borders = doubling_borders(length)
        self._rows: list[Row] = []
        if options.niah_length is not None:
            variants = list(VARIANTS)
            lengths = [options.niah_length]
            self._rows = niah_rows(tokenizer, lengths, options.niah_rows, 0, variants)
            self._ends = platform.on_first_rank(lambda: end_tokens(tokenizer, origin))

    def figures(self, stage: FastWeightModel, pg_collection: Any) -> dict[str, float]:
        """By name, the same on all ranks, each of which calls this with its part of the model. The
        score of needles that the model has no finite logits for is no number either."""
        model, dp = whole_model(stage), pg_collection.dp
        mine = slice(dp.rank(), None, dp.size())
        names = [f"{a}-{b}" for a, b in zip(self._borders, self._borders[1:], strict=False)]
        sums: dict[str, list[float]] = {name: [0.0, 0.0, 0.0, 0.0] for name in names}
        for tokens in self._texts[mine]:
            if len(tokens) < 2:
                continue
            buckets = next_token_scores(model, tokens, self._borders, seed=0)
            for name, x in zip(names, buckets, strict=True):
                found = (x.tokens, x.loss, x.argmax_hits, x.sampled_hits)
                sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)]
        of_tasks = {row.task: [0.0, 0.0] for row in self._rows}
        rows = self._rows[mine]
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            for row, scored in zip(batch, self._scores(model, batch), strict=True):
                of_tasks[row.task][0] += 1
                of_tasks[row.task][1] += scored
        flat = [x for values in (*sums.values(), *of_tasks.values()) for x in values]
        total = torch.tensor(flat, dtype=torch.float64, device=platform.device())
        dist.all_reduce(total, group=dp)
        values = iter(total.tolist())
        by_bucket = {name: [next(values) for _ in range(4)] for name in sums}
        whole = [sum(column) for column in zip(*by_bucket.values(), strict=True)]
        result: dict[str, float] = {}
        for name, (count, loss, argmax, sampled) in {"": whole, **by_bucket}.items():
            at = f"/{name}" if name else ""
            if count:
                result[f"evaluation/loss{at}"] = loss / count
                result[f"evaluation/accuracy_argmax{at}"] = argmax / count
                result[f"evaluation/accuracy_sampled{at}"] = sampled / count
        for task in of_tasks:
            count, scored = next(values), next(values)
            result[f"evaluation/{task}"] = scored / count
        return result

    def _scores(self, model: LanguageModel, rows: Sequence[Row]) -> list[float]:
        prompts, most = [row.prompt for row in rows], max(row.max_new_tokens for row in rows)
        try:
            responses = generate(model, prompts, most, end_tokens=self._ends)
        except NotFiniteError:  # the loss of held-out texts is none either, and the run goes on
            return [math.nan] * len(rows)
        texts = [
            response_text(self._tokenizer, prompt, tokens)
            for prompt, tokens in zip(prompts, responses, strict=True)
        ]
        return [score(row.task, text, row.answers) for row, text in zip(rows, texts, strict=True)]
