"""A run saved at tensor x pipeline 2 x 2 goes on at one rank, at tensor 4 and at pipeline 4 as if
nothing had happened, and exports like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from tests.conversion.helpers import WEIGHTS, to_hf
from tests.distributed.harness import run_distributed
from tests.training.jobs import metrics, run_job, write_config
from tests.training.test_checkpointing import (
    assert_same_metrics,
    keep_until,
    run_here,
    tensors_of,
)

STEPS, SAVED = 10, 5
FAMILIES = {
    "tiny-deltanet": "{vocab_size: 2048, num_layers: 4, mixer.num_heads: 4, tie_embeddings: true}",
    "tiny-gated-deltanet": "{vocab_size: 2048, num_layers: 5, mixer.num_heads: 4}",
    # Chunks of more tokens than the fast heads are wide: shorter ones make gradients of less than
    # full rank, whose smallest singular values are rounding, and Muon makes all of them one size.
    "tiny-lact": (
        "{vocab_size: 2048, num_layers: 4, mixer.num_fast_heads: 4, mixer.chunk_size: 32}"
    ),
}
SAVING = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true")
RESUMING = {"tensor4": ("parallel.tensor=4",), "pipeline4": ("parallel.pipeline=4",)}


@pytest.mark.parametrize(
    "name",
    ["tiny-deltanet", *(pytest.param(n, marks=pytest.mark.slow) for n in list(FAMILIES)[1:])],
)
def test_resuming_at_other_layouts(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    run_distributed(_save_and_resume, 4, config, tmp_path, name, timeout=400)
    run_job(config, tmp_path / "one_rank", *_options(name))
    half = (f"training.steps={SAVED}", f"optimizer.lr_decay_steps={STEPS}")
    run_job(config, tmp_path / "alone", *_options(name), *half)
    whole = metrics(tmp_path / "whole")
    assert len(whole) == STEPS
    # Muon's Newton-Schulz iterations amplify rounding
    muon = name == "tiny-lact"
    expected = _export(tmp_path, "whole")
    for run in ("one_rank", *RESUMING):
        assert_same_metrics(metrics(tmp_path / run), whole, 1e-4 if muon else 1e-5)
        _assert_same_checkpoint(tmp_path, run, "whole", STEPS, 1e-3)
        exported = _export(tmp_path, run)
        assert exported.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(exported[key], value, rtol=0, atol=1e-4)
    # What a whole run at another layout comes to: through Muon within the 1e-2 of its gradients.
    _assert_same_checkpoint(tmp_path, "alone", "whole", SAVED, 1e-2 if muon else 1e-3)
    if not muon:
        assert_same_metrics(metrics(tmp_path / "alone"), whole[:SAVED])


def _save_and_resume(config: Path, directory: Path, name: str) -> None:
    save = ("checkpoint.save_interval=5", "checkpoint.async_save=true")
    run_here(config, directory / "whole", *_options(name), *SAVING, *save)
    if dist.get_rank() == 0:
        for run in ("one_rank", *RESUMING):
            shutil.copytree(directory / "whole", directory / run)
            shutil.rmtree(directory / run / "checkpoints" / f"iter_{STEPS:07d}")
            keep_until(directory / run, SAVED)
    dist.barrier()
    for run, layout in RESUMING.items():
        run_here(config, directory / run, *_options(name), *layout)


def _assert_same_checkpoint(case: Path, run: str, other: str, step: int, tolerance: float) -> None:
    """Weights and optimizer state of two layouts, but for the order of summation."""
    name = f"iter_{step:07d}"
    found, expected = (tensors_of(case / r / "checkpoints" / name) for r in (run, other))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        difference, norm = (found[key] - value).norm(), value.norm()
        assert difference <= tolerance * norm, f"{run}, {key}: {difference:.1e} of {norm:.1e}"


def _options(name: str) -> tuple[str, ...]:
    return (
        f"model.preset={name}",
        f"model.overrides={FAMILIES[name]}",
        f"training.steps={STEPS}",
        "training.micro_batch_size=2",
        "optimizer.use_distributed_optimizer=true",
    )


def _export(case: Path, run: str) -> dict[str, Tensor]:
    return load_file(to_hf(case / run / "checkpoints", case / f"{run}-hf") / WEIGHTS)
