"""Measures models for run.py; a torchrun of one rank.

measure.py models OUT.json CHECKPOINT...   recall, next-token loss and reward on held-out texts
measure.py costs OUT.json CHECKPOINT       floating-point operations of a step of each arm
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from corpus import Corpus
from run import DOCUMENTS, HERE, TOKENIZER
from sentencepiece import SentencePieceProcessor
from torch.utils.flop_counter import FlopCounterMode

from refine_mcore import platform
from refine_mcore.config import Config, config_from_dict
from refine_mcore.models.whole_model import whole_model
from refine_mcore.step.refine_loss import TextBatch, text_pass
from refine_mcore.training.setup import build_training, training_model

_SEED = 7  # of the held-out texts


def main() -> None:
    what, output, *checkpoints = sys.argv[1:]
    study = yaml.safe_load((HERE / "study.yaml").read_text())
    platform.initialize()
    with platform.distributed(600):
        groups = platform.initialize_model_parallel(1, 1, 0)
        texts = [_held_out(kind) for kind in study["measure"]]
        found: dict[str, dict[str, float]] = {
            checkpoint: _costs(study, checkpoint, groups)
            if what == "costs"
            else _model(study, checkpoint, groups, texts)
            for checkpoint in checkpoints
        }
    Path(output).write_text(json.dumps(found))


def _config(study: dict[str, Any], checkpoint: str, refine: dict[str, Any]) -> Config:
    part = study["continue"]
    settings = {
        "model": {"checkpoint": checkpoint},
        "data": part["data"],
        "training": study["common"]["training"] | part["training"],
        "refine": part["refine"] | refine,
    }
    return config_from_dict(settings, "study.yaml")


def _batch(tokens: torch.Tensor) -> TextBatch:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return TextBatch(tokens, mask, torch.arange(len(tokens)))


def _baddbmm(_: Any, a: Any, b: Any, **options: Any) -> int:
    """Floating-point operations by the shapes of the operands."""
    batch, rows, inner = a
    return 2 * batch * rows * inner * b[-1]


_IN_PLACE = {torch.ops.aten.baddbmm_: _baddbmm}  # which torch does not count by itself


def _costs(study: dict[str, Any], checkpoint: str, groups: Any) -> dict[str, float]:
    """Of one step of each arm, what its matrix products and attention take."""
    found = {}
    for arm, options in study["arms"].items():
        config = _config(study, checkpoint, options)
        shape = (config.training.micro_batch_size, config.data.sequence_length)
        tokens = torch.randint(2048, shape, generator=torch.Generator().manual_seed(0))
        step = build_training(config, groups).step
        with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
            step([_batch(tokens)], 0)
        found[arm] = counter.get_total_flops()
    return found


def _held_out(kind: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`tokens` [n, T] of texts never trained on, and which of them are `recalled`."""
    tokenizer = SentencePieceProcessor(model_file=str(TOKENIZER))
    corpus, rng = Corpus(DOCUMENTS, tokenizer, held_out=True), random.Random(_SEED)
    options = {name: value for name, value in kind.items() if name != "count"}
    tokens, recalled = [], []
    for _ in range(kind["count"]):
        text, spans = corpus.draw(rng, **options)
        pieces = tokenizer.encode(text, return_type="proto").pieces[: kind["length"]]
        tokens.append([piece.id for piece in pieces])
        recalled.append([any(p.begin < e and b < p.end for b, e in spans) for p in pieces])
    return {"tokens": torch.tensor(tokens), "recalled": torch.tensor(recalled)}


def _model(
    study: dict[str, Any], checkpoint: str, groups: Any, texts: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """By length: share of the recalled values that the model puts first, their mean loss, and that
    of all other tokens. The reward is that of rollouts as the arm `fused` draws them, at the length
    of training; taken last, as its step moves the weights."""
    config = _config(study, checkpoint, {})
    model = whole_model(training_model(config, groups))
    found = {}
    for kind in texts:
        batch, recalled = _batch(kind["tokens"]), kind["recalled"][:, 1:]
        length = batch.tokens.shape[1]
        with torch.no_grad():
            text = text_pass(model, batch, with_entropy=False, record=False)
            first = model.logits(text.hidden)[:, :-1].argmax(-1) == batch.tokens[:, 1:]
        loss = -text.log_probs[:, :-1]
        found[f"recall {length}"] = first[recalled].double().mean().item()
        found[f"recall loss {length}"] = loss[recalled].double().mean().item()
        found[f"loss {length}"] = loss[~recalled].double().mean().item()
        if length == config.data.sequence_length:
            metrics, _ = build_training(config, groups).step([batch], 0)
            assert metrics.reward_mean is not None
            found["reward"] = metrics.reward_mean
    return found


if __name__ == "__main__":
    main()
