"""A checkpoint as people have it, trained and given back: Qwen3.5 in bfloat16 with its vision tower
and its own tokenizer, through the tools a user runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.conversion.helpers import (
    HYBRIDS,
    WEIGHTS,
    Tensors,
    change_config,
    change_weights,
    copy_model,
    to_checkpoint,
    to_hf,
)
from tests.training.jobs import CORPUS, run_job, write_config


def small_tokenizer(path: Path) -> None:
    """At most 131 pieces, which the reference models have rows for."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=97, special_tokens=["?"], limit_alphabet=60, show_progress=False
    )
    with CORPUS.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator([json.loads(file.readline())["text"]], trainer)
    tokenizer.save(str(path))


def in_bfloat16(tensors: Tensors) -> Tensors:
    """All of it, as in published files, where A_log alone may be float32."""
    return {name: t if "A_log" in name else t.bfloat16() for name, t in tensors.items()}


@pytest.mark.parametrize("sharded", ["true", pytest.param("false", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", HYBRIDS)
def test_trained_and_given_back(golden: Path, tmp_path: Path, name: str, sharded: str) -> None:
    """Every tensor of the text model has learnt, and no other has changed."""
    source = copy_model(golden, name, tmp_path / "source")
    change_weights(source, in_bfloat16)
    change_config(source, dtype="bfloat16")
    small_tokenizer(source / "tokenizer.json")
    checkpoint = to_checkpoint(source, tmp_path / "checkpoint")

    steps = run_job(
        write_config(tmp_path),
        tmp_path / "run",
        *("model.preset=null", "model.overrides={}", f"model.checkpoint={checkpoint}"),
        *(f"data.tokenizer={checkpoint / 'hf'}", "training.dtype=bfloat16", "training.steps=2"),
        *("optimizer.lr=0.05", f"optimizer.use_distributed_optimizer={sharded}"),
    )

    assert len(steps) == 2 and steps[1]["loss_policy"] is not None
    exported = to_hf(tmp_path / "run" / "checkpoints", tmp_path / "exported")
    before, after = load_file(source / WEIGHTS), load_file(exported / WEIGHTS)
    assert {k: (t.dtype, t.shape) for k, t in after.items()} == {
        k: (t.dtype, t.shape) for k, t in before.items()
    }
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "visual" not in key}
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (exported / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("name", HYBRIDS)
def test_small_parameters_are_float32_in_training(
    golden: Path, tmp_path: Path, single_rank, name: str
) -> None:
    """Though files are bfloat16: their updates are far below its precision."""
    from refine_mcore.config import config_from_dict
    from refine_mcore.training.setup import training_model

    source = copy_model(golden, name, tmp_path / "source")
    change_weights(source, lambda ts: {name: t.bfloat16() for name, t in ts.items()})
    checkpoint = to_checkpoint(source, tmp_path / "checkpoint")
    config = config_from_dict(
        {"model": {"checkpoint": str(checkpoint)}, "training": {"dtype": "bfloat16"}}, "this test"
    )
    for key, parameter in training_model(config, single_rank).named_parameters():
        precise = key.endswith(("A_log", "dt_bias", "norm.weight", "_norm"))
        assert (parameter.dtype == torch.float32) == precise, key
