"""Several stages as one model against one rank: text, branches, rollouts, and gradients through all
of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from refine_mcore import platform
from refine_mcore.config import OptimizerConfig
from refine_mcore.models.fast_weight_model import FastWeightModel, build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.sharding import full_tensors, main_gradient
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.models.whole_model import WholeModel, whole_model
from refine_mcore.rollout.branches import Branches, Randomness
from refine_mcore.rollout.decode import decode
from refine_mcore.step.refine_loss import TextBatch, ntp_loss, text_pass
from refine_mcore.training.optimizer import wrap_data_parallel
from tests.distributed.harness import run_distributed
from tests.distributed.test_layouts import FAMILIES
from tests.models.zoo import score, short_chunks

# Odd numbers of tokens in all: no two ranks share them evenly.
TEXTS, LENGTH = 3, 41
BRANCHES = Branches.at([[7], [30], [LENGTH]])
K = 3


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False


TWO_RANKS = {Layout(pipeline=2): tuple(FAMILIES)}
FOUR_RANKS = {
    Layout(2, 2): ("gated-deltanet",),
    Layout(2, 2, True): ("deltanet-tied", "lact", "hybrid"),
    Layout(pipeline=4): ("deltanet-tied", "hybrid"),
}


@pytest.fixture
def one_rank(single_rank: Any, tmp_path: Path) -> Path:
    """A file per family: what one rank gives."""
    for family in FAMILIES:
        torch.save(_results(family, Layout()), tmp_path / f"{family}.pt")
    platform.shutdown()
    return tmp_path


def test_two_ranks_equal_one(one_rank: Path) -> None:
    run_distributed(_compare, 2, TWO_RANKS, one_rank)


def test_four_ranks_equal_one(one_rank: Path) -> None:
    run_distributed(_compare, 4, FOUR_RANKS, one_rank)


def _compare(cases: dict[Layout, tuple[str, ...]], one_rank: Path) -> None:
    """Rank 0 alone has gradients; the rest is the same on every rank."""
    for layout, families in cases.items():
        for family in families:
            expected = torch.load(one_rank / f"{family}.pt", weights_only=True)
            found = _results(family, layout)
            names = [name for name in expected if dist.get_rank() == 0 or "gradient" not in name]
            assert list(found) == names
            for name in names:
                _assert_same(found[name], expected[name], f"{family}, {layout}, {name}")


def _assert_same(found: Tensor, expected: Tensor, case: str) -> None:
    if "gradient" in case:
        found = found[: expected.shape[0]]  # a padded vocabulary is longer
    assert found.shape == expected.shape, case
    if not expected.is_floating_point():
        assert torch.equal(found, expected), case
        return
    assert found.dtype == torch.float64
    error, norm = float((found - expected).norm()), float(expected.norm())
    assert error <= 1e-9 * norm, f"{case}: {error:.1e} of {norm:.1e}"
    assert norm > 0, case


@short_chunks()
def _results(family: str, layout: Layout) -> dict[str, Tensor]:
    """Of a text with branches that decode and are scored from its states: what they give, and the
    gradients of the sum of all losses."""
    groups = platform.initialize_model_parallel(layout.tensor, layout.pipeline)
    config = transformer_config(
        FAMILIES[family],
        dtype=torch.float64,
        tensor_parallel=layout.tensor,
        pipeline_parallel=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
    )
    stage = build_model(config, groups)
    initialize(stage, seed=1)
    wrapped = wrap_data_parallel(stage, OptimizerConfig(), groups)
    results = _text_and_branches(stage)
    finalize_model_grads([wrapped])
    gradients = full_tensors(stage, main_gradient)
    results |= {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    return {name: value.detach().clone() for name, value in results.items()}


def _batch() -> TextBatch:
    tokens = torch.randint(61, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    return TextBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(TEXTS))


def _text_and_branches(stage: FastWeightModel) -> dict[str, Tensor]:
    batch, model = _batch(), whole_model(stage)
    assert isinstance(model, WholeModel) == (stage.pp_group.size() > 1)
    text = text_pass(model, batch, with_entropy=True, record=True)
    assert text.tape is not None
    states = text.tape.at(BRANCHES.batch_index, BRANCHES.position)
    assert len(states) == len(stage.decoder.layers)
    tokens, drawn = decode(
        model,
        states,
        model.logits(BRANCHES.rows_before(text.hidden)[:, None])[:, 0],
        K,
        Randomness(5, 0).token_keys(batch.sample_index, BRANCHES, 1, K),
    )
    scores = score(model, states, BRANCHES.rows_before(text.hidden), tokens)
    loss = ntp_loss(text, batch, batch.num_targets()) + scores.log_probs.square().sum()
    (loss + scores.hidden.square().mean()).backward()
    assert text.entropy is not None
    return {
        "log_probs": text.log_probs,
        "entropy": text.entropy,
        "hidden": text.hidden,
        "tokens": tokens,
        "drawn": drawn,
        "scores.log_probs": scores.log_probs,
        "scores.hidden": scores.hidden,
    }
