"""A checkpoint of transformers trained by ReFINE steps in a pipeline and given back to
transformers, and a run from a preset. Needs the extra `hf`:

    make setup EXTRAS=dev,hf && make test TESTS=tests/training/test_transformers.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from refine_mcore.config import load_config
from refine_mcore.data import load_tokenizer
from refine_mcore.training.loop import Run
from refine_mcore.training.setup import with_own_tokenizer
from tests.conversion.helpers import copy_model, to_checkpoint, to_hf
from tests.distributed.harness import run_distributed
from tests.training.jobs import CORPUS, TOKENIZER, run_job, write_config
from tests.training.test_hybrid_checkpoint import small_tokenizer

transformers = pytest.importorskip("transformers")
TEXT = json.loads(CORPUS.read_text(encoding="utf-8").splitlines()[1])["text"][:400]


def loaded(directory: Path) -> tuple[Any, Any]:
    """Model and tokenizer as transformers has them; nothing missing, nothing left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


def our_logits(checkpoint: Path, tokens: list[int], groups: Any) -> torch.Tensor:
    from refine_mcore.config import config_from_dict
    from refine_mcore.training.setup import training_model

    settings = {"model": {"checkpoint": str(checkpoint)}, "training": {"dtype": "float32"}}
    model = training_model(config_from_dict(settings, "test"), groups)
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])).hidden)[0]


def test_from_transformers_through_a_pipeline_and_back(
    golden: Path, tmp_path: Path, single_rank: Any
) -> None:
    source = copy_model(golden, "qwen35_text", tmp_path / "source")
    small_tokenizer(source / "tokenizer.json")
    # else transformers would take the tokenizer for Qwen's own
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = to_checkpoint(source, tmp_path / "checkpoint")
    options = [
        *("model.preset=null", "model.overrides={}", f"model.checkpoint={checkpoint}"),
        *("data.tokenizer=null", "training.dtype=float32", "training.steps=3"),
        *("training.ntp_warmup_steps=0", "optimizer.lr=0.01", "optimizer.lr_warmup_steps=0"),
        *("parallel.pipeline=2", "parallel.slices=2", f"run.directory={tmp_path / 'run'}"),
    ]
    run_distributed(_train, 2, write_config(tmp_path), options)
    run = tmp_path / "run" / "checkpoints"
    model, tokenizer = loaded(to_hf(run, tmp_path / "exported"))
    tokens = load_tokenizer(source).text_to_ids(TEXT)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == tokens
    before, _ = loaded(source)
    with torch.no_grad():
        theirs, untrained = (x(torch.tensor([tokens])).logits[0] for x in (model, before))
    ours = our_logits(run, tokens, single_rank)[:, : theirs.shape[1]]
    assert (theirs - ours).abs().max() < 5e-4
    assert (theirs - untrained).abs().max() > 0.05  # it has learnt


def _train(path: Path, options: list[str]) -> None:
    Run(with_own_tokenizer(load_config(path, options))).train()
    dist.barrier()


def test_tokenizers_of_runs_from_presets(tmp_path: Path) -> None:
    """A SentencePiece model, by its own name and settings."""
    run_job(write_config(tmp_path), tmp_path / "run", "training.steps=2")
    exported = to_hf(tmp_path / "run" / "checkpoints", tmp_path / "exported")
    assert (exported / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == load_tokenizer(TOKENIZER).text_to_ids(TEXT)
    assert tokenizer.decode(ids) == TEXT
