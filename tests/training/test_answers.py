"""The loss on answers against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refine_mcore.config import RefineConfig
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.sharding import main_gradient
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.step import TrainStep
from tests.models.zoo import NAMES, assert_same_gradients, gradients, random_tokens, wrapped

PROMPTS, TEXTS = (14, 3, 20, 9), (22, 4, 21, 15)  # tokens without and with the answer


def answered(*sizes: int) -> list[TextBatch]:
    """Four texts whose last tokens are answers, in micro-batches of the given sizes."""
    place = torch.arange(22)
    mask = place < torch.tensor(TEXTS)[:, None]
    targets = mask & (place >= torch.tensor(PROMPTS)[:, None])
    parts = (random_tokens(4, 22), mask, torch.arange(4), targets)
    return [TextBatch(*cut) for cut in zip(*(x.split(sizes) for x in parts), strict=True)]


def answer_loss(model: FastWeightModel, batches: list[TextBatch]) -> Tensor:
    """Cross entropy of the answers' tokens, each text run alone and without padding."""
    losses = []
    for batch in batches:
        assert batch.targets is not None
        for tokens, mask, targets in zip(batch.tokens, batch.mask, batch.targets, strict=True):
            length, prompt = int(mask.sum()), int((mask & ~targets).sum())
            text = tokens[None, :length]
            logits = model.logits(model(text).hidden)[0, prompt - 1 : -1]
            losses.append(F.cross_entropy(logits, text[0, prompt:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("short_chunks")
def test_answers_alone_are_trained_on(
    name: str, model_of: Callable[[str], FastWeightModel]
) -> None:
    """However the batch is cut into micro-batches and slices; in one optimizer step."""
    model = model_of(name)
    loss = answer_loss(model, answered(4))
    expected = gradients(model, loss)
    config = RefineConfig(mode="ntp", mini_batch_size=1)
    for sizes, slices, recompute in (((4,), 1, False), ((2, 2), 3, False), ((1, 1, 2), 4, True)):
        batches = answered(*sizes)
        groups, accumulated = model.pg_collection, StepAccumulator()
        engine = PipelineEngine(wrapped(model), groups, slices=slices, recompute=recompute)
        train = TrainStep(wrapped(model), None, config, 1, groups, engine)
        context = StepContext(model, config, Randomness(1, 0), groups.dp)
        wrapped(model).zero_grad_buffer()
        (step,) = train.optimizer_steps("sft", context, batches, accumulated)
        step()
        found = {name: main_gradient(p) for name, p in model.named_parameters()}
        assert_same_gradients(found, expected)
        assert accumulated.reduce(groups, 1).loss_ntp == pytest.approx(loss.item(), rel=1e-12)


def test_prompts_are_texts_of_their_own() -> None:
    (batch,) = answered(4)
    prompts = batch.prompts()
    assert prompts.mask.sum(1).tolist() == list(PROMPTS)
    assert prompts.num_targets() == sum(PROMPTS) - 4
    assert batch.num_targets() == sum(TEXTS) - sum(PROMPTS)
