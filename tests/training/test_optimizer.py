"""Gradients on their way into Megatron's buffers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from refine_kernels.sums import multiplies_into
from torch import Tensor

from refine_mcore.config import load_config
from refine_mcore.models.sharding import main_gradient
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.micro_batch import MicroBatch
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.optimizer import wrap_data_parallel
from refine_mcore.training.setup import training_model
from tests.training.jobs import write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


LAYERS = ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


def gradients(
    config: Path, groups: Any, dtype: str, preset: str, fused: bool, *given: str
) -> tuple[dict[str, Tensor], set[str]]:
    """Of a step of two micro-batches with rollouts; the weights that layers added themselves."""
    options = [f"training.dtype={dtype}", f"model.preset={preset}"]
    settings = load_config(config, [*options, *given])
    model = training_model(settings, groups)
    optimizer = replace(settings.optimizer, gradient_accumulation_fusion=fused)
    wrapped = wrap_data_parallel(model, optimizer, groups)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (2, 1, 96), generator=generator)
    batches = [
        TextBatch(t, torch.ones_like(t, dtype=torch.bool), torch.tensor([i]))
        for i, t in enumerate(tokens)
    ]
    context = StepContext(model, settings.refine, Randomness(0, 0), groups.dp)
    work = [MicroBatch(batch, rolls_out=True) for batch in batches]
    recompute = settings.training.recompute == "full"
    engine = PipelineEngine(wrapped, groups, slices=settings.parallel.slices, recompute=recompute)
    engine.forward_backward(context, work, StepAccumulator())
    found = {name: main_gradient(p).clone() for name, p in model.named_parameters()}
    added = {
        name for name, p in model.named_parameters() if getattr(p, "grad_added_to_main_grad", False)
    }
    return found, added


def names_of_weights(config: Path, groups: Any, preset: str, *given: str) -> set[str]:
    """Of the layers that can add their gradients themselves."""
    model = training_model(load_config(config, [f"model.preset={preset}", *given]), groups)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, LAYERS) and module.weight is not None
    }


@pytest.mark.parametrize("run", ["", "training.recompute=selective", "training.recompute=full"])
@pytest.mark.parametrize("tied", ["false", "true"])
@pytest.mark.parametrize("preset", ["tiny-deltanet", "tiny-qwen3.5", "tiny-lact"])
def test_layers_add_the_gradients_of_weights(
    config: Path, single_rank: Any, preset: str, tied: str, run: str
) -> None:
    """Text, branches, micro-batches and slices, as separate tensors for each do; also where hooks
    make another tensor of a saved weight."""
    model = f"model.overrides={{tie_embeddings: {tied}}}"
    options = [model, "parallel.slices=2"]
    plain, none = gradients(config, single_rank, "float32", preset, False, *options)
    found, added = gradients(config, single_rank, "float32", preset, True, *options, *run.split())
    assert not none and added == names_of_weights(config, single_rank, preset, model)
    for name, expected in plain.items():
        assert expected.any(), name
        torch.testing.assert_close(found[name], expected, rtol=2e-5, atol=1e-7 * expected.norm())


def test_where_torch_has_no_such_product_they_are_added_after_it(
    config: Path, single_rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A CPU multiplies no bfloat16 into float32; rows of embeddings are no products."""
    multiplies_into.cache_clear()
    ours = "refine_kernels.sums", "refine_mcore.compat"
    with caplog.at_level("INFO", ours[0]), caplog.at_level("INFO", ours[1]):
        found, added = gradients(
            config, single_rank, "bfloat16", "tiny-deltanet", True, "model.overrides={}"
        )
    assert added == {"embedding.word_embeddings.weight"}
    assert all(g.dtype == torch.float32 and g.any() for g in found.values())
    assert [r.getMessage() for r in caplog.records if r.name in ours] == [
        "torch has no product of torch.bfloat16 added to torch.float32 on cpu",
        "weight gradients are added to the buffers after their products",
    ]


def test_a_weight_gets_its_gradient_in_one_way(config: Path, single_rank: Any) -> None:
    """An embedding adds nothing by itself where the output layer that has its weight cannot."""
    options = "bfloat16", "tiny-deltanet"
    tied = "model.overrides={tie_embeddings: true}"
    found, added = gradients(config, single_rank, *options, True, tied)
    plain, _ = gradients(config, single_rank, *options, False, tied)
    assert not added
    assert all(torch.equal(found[name], expected) for name, expected in plain.items())
