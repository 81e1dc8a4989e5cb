"""The shipped recipes, shrunk by overrides: their own mode in slices, with recomputation and in a
pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from refine_mcore.config import load_config
from refine_mcore.training.loop import Run
from tests.distributed.harness import run_distributed
from tests.training.jobs import CORPUS, ROOT, TOKENIZER, metrics, run_job

SMALL = "hidden_size: 32, num_layers: 2, intermediate_size: 32, vocab_size: 2048"
RECIPES = {
    "pretrain_deltanet_1.3b": f"{{{SMALL}, mixer.num_heads: 2}}",
    "pretrain_lact_760m": (
        f"{{{SMALL}, mixer.num_attention_heads: 4, mixer.num_fast_heads: 2, mixer.chunk_size: 32,"
        " mixer.window_size: 32, mixer.low_rank: 4}"  # Newton-Schulz in float32, to be compared
    ),
    "pretrain_qwen3.5_2b": (
        f"{{{SMALL}, mixer.num_heads: 2, mixer.head_dim: 8, mixer.num_value_heads: 4,"
        " attention.layers: [1], attention.num_heads: 2, attention.num_kv_heads: 1,"
        " attention.kv_channels: 16}"
    ),
}
LAYOUTS = {
    "slices": ("parallel.slices=4",),
    "recompute": ("parallel.slices=4", "training.recompute=full"),
}
PIPELINE = ("parallel.pipeline=2", "parallel.slices=4", "training.recompute=full")


def options(recipe: str) -> tuple[str, ...]:
    return (
        f"model.overrides={RECIPES[recipe]}",
        f"data.paths=[{CORPUS}]",
        f"data.tokenizer={TOKENIZER}",
        "data.sequence_length=256",
        "training.steps=1",
        "training.global_batch_size=8",
        "refine.mini_batch_size=2",
        "training.dtype=float32",
        "run.tensorboard=false",
        "run.progress=false",
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_as_on_whole_texts(recipe: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / "configs" / f"{recipe}.yaml"
    assert load_config(path).refine.mode == "two_phase"
    of_gradients = 1e-2 if "lact" in recipe else 1e-4  # Muon amplifies rounding
    (whole,) = run_job(path, tmp_path / "whole", *options(recipe))
    for name, layout in LAYOUTS.items():
        (found,) = run_job(path, tmp_path / name, *options(recipe), *layout)
        assert_same(found, whole, of_gradients)
    run_distributed(_in_a_pipeline, 2, path, tmp_path / "pipeline", options(recipe))
    (found,) = metrics(tmp_path / "pipeline")
    assert_same(found, whole, of_gradients)


def _in_a_pipeline(path: Path, run: Path, settings: tuple[str, ...]) -> None:
    Run(load_config(path, [f"run.directory={run}", *settings, *PIPELINE])).train()
    dist.barrier()


def assert_same(found: dict[str, Any], expected: dict[str, Any], of_gradients: float) -> None:
    for key in ("positions", "rollout_tokens", "lr"):
        assert found[key] == expected[key], key
    for key in ("loss_ntp", "loss_policy", "reward_mean", "entropy_mean", "grad_norm"):
        limit = of_gradients if key == "grad_norm" else 1e-4
        assert found[key] == pytest.approx(expected[key], rel=limit, abs=1e-6), key
