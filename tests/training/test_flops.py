"""Floating-point operations by formula against those that torch counts; baselines of as many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.posttrain_refine import main as posttrain
from refine_mcore.config import Config, config_from_dict, load_config
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture, AttentionOptions
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.flops import ModelFlops, step_flops, with_equal_flops
from refine_mcore.training.optimizer import wrap_data_parallel
from refine_mcore.training.step import TrainStep
from tests.training.jobs import metrics, run_job, write_config, write_posttrain_config

LENGTH = 512
SIZES = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128, "vocab_size": 512}


def _architectures() -> dict[str, Architecture]:
    attention = AttentionOptions((1,), num_heads=2, window_size=64)
    delta_net = preset("demo-deltanet").with_overrides(SIZES | {"mixer.num_heads": 2})
    gated = preset("demo-gated-deltanet").with_overrides(
        SIZES | {"mixer.num_heads": 2, "mixer.head_dim": 32, "mixer.expand_v": 2.0}
    )
    lact = preset("demo-lact").with_overrides(
        SIZES
        | {
            "mixer.num_attention_heads": 2,
            "mixer.num_fast_heads": 1,
            "mixer.chunk_size": 64,
            "mixer.window_size": 16,
        }
    )
    return {
        "deltanet": delta_net,
        "gated-deltanet": gated,
        "lact": lact,
        "hybrid": replace(gated, attention=attention),
    }


ARCHITECTURES = _architectures()


def _baddbmm(_: Any, a: Any, b: Any, **options: Any) -> int:
    """Floating-point operations by the shapes of the operands."""
    batch, rows, inner = a
    return 2 * batch * rows * inner * b[-1]


IN_PLACE = {torch.ops.aten.baddbmm_: _baddbmm}  # which torch does not count by itself


def counted(architecture: Architecture, config: Config, groups: Any) -> Counter[str]:
    """Of a step, by the kinds of its passes."""
    options = transformer_config(architecture, dtype=torch.float32, tape_interval=64)
    model = build_model(options, groups)
    initialize(model, 0)
    wrapped = wrap_data_parallel(model, config.optimizer, groups)
    engine = PipelineEngine(wrapped, groups)
    found: Counter[str] = Counter()

    @contextmanager
    def observe(item: Any) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            yield
        found[item.op] += counter.get_total_flops()

    engine.observe = observe
    tokens = torch.randint(512, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = TextBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(1))
    train = TrainStep(wrapped, None, config.refine, 1, groups, engine)
    context = StepContext(model, config.refine, Randomness(1, 2), groups.dp)
    wrapped.zero_grad_buffer()
    for run in train.optimizer_steps(config.refine.mode, context, [batch], StepAccumulator()):
        run()
    return found


def _config(**refine: Any) -> Config:
    return config_from_dict(
        {
            "model": {"preset": "demo-deltanet"},
            "data": {"sequence_length": LENGTH},
            "training": {"tape_interval": 64},
            # torch counts no products that add to their result
            "optimizer": {"gradient_accumulation_fusion": False},
            "refine": {"num_chunks": 4} | refine,
        },
        "this test",
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_next_token_step_takes_what_torch_counts(name: str, single_rank: Any) -> None:
    """The forward but for padding and masked parts of products. Torch also counts what is made
    again for the backward, and leaves out gradients that nobody asks for."""
    arch = ARCHITECTURES[name]
    ntp = counted(arch, _config(mode="ntp"), single_rank)
    masked = 0.06 if name in ("lact", "hybrid") else 1e-3
    layers = build_model(transformer_config(arch), single_rank).decoder.layers
    columns = sum(layer.self_attention.in_proj.padding for layer in layers)
    padding = 2 * LENGTH * arch.hidden_size * columns
    model = ModelFlops(arch, LENGTH, 64)
    unread = 64 * model._of_writes()  # torch's form makes no state after a text that nobody reads
    assert model.text + padding - unread == pytest.approx(ntp["F"], rel=masked)
    assert step_flops(arch, _config(), "ntp") == pytest.approx(ntp.total(), rel=0.1)


@pytest.mark.parametrize("name", ["deltanet", "gated-deltanet"])
def test_a_step_of_refine_takes_as_much_more_as_torch_counts(name: str, single_rank: Any) -> None:
    """(Where branches attend to a text, torch counts all of its keys.)"""
    arch = ARCHITECTURES[name]
    own = step_flops(arch, _config(), "ntp")
    by_torch = counted(arch, _config(mode="ntp"), single_rank).total()
    for options in ({}, {"rollouts_per_position": 4}, {"reward": "future"}, {"mode": "two_phase"}):
        config = _config(**options)
        expected = counted(arch, config, single_rank).total() / by_torch
        found = step_flops(arch, config, config.refine.mode) / own
        assert found == pytest.approx(expected, rel=0.03), options


def test_a_baseline_takes_the_steps_of_as_many_operations(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    loaded = load_config(config, ["refine.mode=ntp", "training.equal_flops=fused"])
    arch = preset("tiny-deltanet").with_overrides(dict(loaded.model.overrides))
    ratio = step_flops(arch, loaded, "fused") / step_flops(arch, loaded, "ntp")
    assert 1.1 < ratio < 3  # texts of 64 tokens
    resolved = with_equal_flops(loaded, arch, ["ntp"])
    # the warm-up of one step stays
    assert resolved.training.steps == 1 + -int(-3 * ratio // 1)
    assert resolved.training.equal_flops is None
    steps = run_job(config, tmp_path / "run", "refine.mode=ntp", "training.equal_flops=fused")
    assert len(steps) == resolved.training.steps
    # the same command again finds the run done
    again = run_job(config, tmp_path / "run", "refine.mode=ntp", "training.equal_flops=fused")
    assert again == metrics(tmp_path / "run") == steps


def test_a_baseline_of_post_training(tmp_path: Path) -> None:
    """Plain SFT goes on for the operations of the inner update too."""
    config = write_posttrain_config(tmp_path)
    options = ["refine.mode=ntp", "training.equal_flops=two_phase"]
    loaded = load_config(config, options)
    arch = preset("tiny-deltanet").with_overrides(dict(loaded.model.overrides))
    inner, outer = (step_flops(arch, loaded, mode) for mode in ("two_phase", "sft"))
    nested = with_equal_flops(loaded, arch, ["ntp", "sft"]).training.steps
    assert nested == -int(-4 * (inner + outer) / (2 * outer) // 1)
    run = tmp_path / "run"
    steps = run_job(config, run, *options, "posttrain.inner=false", main=posttrain)
    assert len(steps) == -int(-4 * (inner + outer) / outer // 1)


def test_equal_flops_are_of_a_baseline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of a baseline, of refine.mode ntp"):
        load_config(write_config(tmp_path), ["training.equal_flops=fused"])
