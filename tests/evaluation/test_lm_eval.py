"""The harness's adapter against the project's own scores. Needs lm_eval, of the extra `eval`:

make setup EXTRAS=dev,eval && make test TESTS=tests/evaluation/test_lm_eval.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from refine_mcore import platform
from refine_mcore.config import load_config
from refine_mcore.data import load_tokenizer
from refine_mcore.step.refine_loss import TextBatch, text_pass
from refine_mcore.training.loop import Run
from tests.training.jobs import TOKENIZER, write_config

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from refine_mcore.evaluation.lm_eval import RefineMcoreLM

TOKENS = load_tokenizer(TOKENIZER)
PAIRS = [("The members of", " Congress"), ("A", " report on health"), ("", "Section 420")]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RefineMcoreLM]:
    place = tmp_path_factory.mktemp("run")
    with platform.distributed(60):
        Run(load_config(write_config(place), ["training.steps=3", "optimizer.lr=0.02"])).train()
    model = RefineMcoreLM(str(place / "run" / "checkpoints"), batch_size=3)
    yield model
    model.close()


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def log_probs(lm: RefineMcoreLM, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token but the first, by one forward: log-prob and the likeliest token."""
    text = torch.tensor([tokens])
    batch = TextBatch(text, torch.ones_like(text, dtype=torch.bool), torch.arange(1))
    with torch.no_grad():
        out = text_pass(lm._lm, batch, with_entropy=False, record=False)
        return out.log_probs[0, :-1], lm._lm.logits(out.hidden)[0, :-1, :2048].argmax(-1)


def test_likelihoods(lm: RefineMcoreLM) -> None:
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        before = TOKENS.text_to_ids(context) if context else [lm.eot_token_id]
        whole = TOKENS.text_to_ids(context + continuation)
        own = whole[len(before) :] if context else whole
        scores, likeliest = log_probs(lm, [*before, *own])
        assert value == pytest.approx(scores[-len(own) :].sum().item(), abs=1e-4)
        assert greedy == bool((likeliest[-len(own) :] == torch.tensor(own)).all())
    texts = ["Requirements for military awards", "x " * 700]  # more than a slice
    rolled = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    for text, value in zip(texts, rolled, strict=True):
        scores, _ = log_probs(lm, [lm.eot_token_id, *TOKENS.text_to_ids(text)])
        assert value == pytest.approx(scores.sum().item(), rel=1e-5)


def test_generates_until_a_text(lm: RefineMcoreLM) -> None:
    plain = {"until": [], "max_gen_toks": 12}
    prompts = ["The", "A long report on health and", "Section"]
    together = lm.generate_until(
        requests("generate_until", *((p, plain) for p in prompts)), disable_tqdm=True
    )
    alone = [
        lm.generate_until(requests("generate_until", (p, plain)), disable_tqdm=True)[0]
        for p in prompts
    ]
    assert together == alone and all(alone)
    stop = alone[0][3:5]
    (cut,) = lm.generate_until(
        requests("generate_until", (prompts[0], plain | {"until": [stop]})), disable_tqdm=True
    )
    assert cut == alone[0].split(stop)[0]


def test_a_local_task(lm: RefineMcoreLM, tmp_path: Path) -> None:
    rows = [
        {"question": f"Number {i}?", "choices": [" yes", " no"], "gold": i % 2} for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local_choice.yaml").write_text(yaml.safe_dump(task))
    found = simple_evaluate(
        lm,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    assert found["results"]["local_choice"]["acc,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}
