"""The engine on two stages: against Megatron's 1F1B, with micro-batches of both kinds, under
Megatron's overlaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from refine_mcore import platform
from refine_mcore.benchmark.megatron_1f1b import megatron_1f1b
from refine_mcore.config import OptimizerConfig, RefineConfig, config_from_dict
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.sharding import full_tensors
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.pipeline import slices as slicing
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.micro_batch import MicroBatch
from refine_mcore.pipeline.stage import StageWork, made_up_positions
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import ReducedMetrics, StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.optimizer import build_optimizer, wrap_data_parallel
from refine_mcore.training.step import TrainStep
from tests.distributed.harness import run_distributed

LENGTH = 45
REFINE = RefineConfig(num_chunks=3, rollout_tokens=3, margin_left=3, margin_right=5)
Gradients = dict[str, Tensor]


def test_two_stages() -> None:
    run_distributed(_two_stages, 2)


def _two_stages() -> None:
    _check_next_token_steps_equal_megatrons_schedule()
    _check_one_plan_runs_both_kinds_of_micro_batches()
    _check_the_number_of_slices_is_chosen()
    _check_a_rehearsal_changes_nothing()


def test_overlapping_reductions_change_nothing() -> None:
    run_distributed(_overlaps, 4)


class _Stage:
    """This rank's stage of a tiny model under Megatron's data parallelism."""

    def __init__(
        self,
        architecture: Architecture,
        dtype: torch.dtype,
        pipeline: int = 2,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        self.groups = platform.initialize_model_parallel(pipeline=pipeline)
        config = transformer_config(architecture, dtype=dtype, pipeline_parallel=pipeline)
        self.model = build_model(config, self.groups)
        initialize(self.model, seed=1)
        self.wrapped = wrap_data_parallel(self.model, optimizer or OptimizerConfig(), self.groups)
        self.context = StepContext(self.model, REFINE, Randomness(1, 2), self.groups.dp)

    def step(self, run: Callable[[StepAccumulator], None]) -> tuple[ReducedMetrics, Gradients]:
        self.wrapped.zero_grad_buffer()
        metrics = StepAccumulator()
        run(metrics)
        gradients = {name: p.main_grad.clone() for name, p in self.model.named_parameters()}
        return metrics.reduce(self.groups, 1), gradients

    def engine(self, slices: int | None) -> PipelineEngine:
        return PipelineEngine(
            self.wrapped, self.groups, slices=slices, recompute=False, timeout_s=60
        )

    def sliced(
        self,
        batches: list[TextBatch],
        rolls_out: list[bool],
        slices: int | None,
        config: RefineConfig = REFINE,
    ) -> tuple[ReducedMetrics, Gradients]:
        engine = self.engine(slices)
        work = [MicroBatch(*item) for item in zip(batches, rolls_out, strict=True)]
        context = replace(self.context, config=config)
        return self.step(partial(engine.forward_backward, context, work))


def _batches(count: int, texts: int = 1) -> list[TextBatch]:
    tokens = torch.randint(61, (count, texts, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(texts, LENGTH, dtype=torch.bool)
    return [TextBatch(t, mask, torch.arange(texts) + i * texts) for i, t in enumerate(tokens)]


def _check_next_token_steps_equal_megatrons_schedule() -> None:
    """One slice bit for bit; several within rounding."""
    for name in ("tiny-deltanet", "tiny-gated-deltanet", "tiny-lact"):
        architecture = preset(name).with_overrides({"num_layers": 3, "initializer_range": 0.3})
        stage = _Stage(architecture, torch.float64)
        batches = _batches(5, texts=2)
        expected, gradients = stage.step(
            partial(megatron_1f1b, stage.wrapped, stage.context, batches)
        )
        for slices in (1, 4):
            found, sliced = stage.sliced(batches, [False] * 5, slices)
            tolerance = 0.0 if slices == 1 else 1e-12
            assert abs(found.loss_ntp - expected.loss_ntp) <= tolerance * expected.loss_ntp
            tolerance = 0.0 if slices == 1 else 1e-2 if "lact" in name else 1e-10  # Muon
            _assert_close(sliced, gradients, tolerance, f"{name}, {slices} slices")


def _check_one_plan_runs_both_kinds_of_micro_batches() -> None:
    """The sum of two steps of one kind each, over the same denominators."""
    stage = _Stage(preset("tiny-deltanet").with_overrides({"tie_embeddings": True}), torch.float64)
    batches, kinds = _batches(4), [True, False, False, True]
    mixed, gradients = stage.sliced(batches, kinds, 3)
    summed = {name: torch.zeros_like(g) for name, g in gradients.items()}
    for kind in (True, False):
        part = [batch for batch, k in zip(batches, kinds, strict=True) if k == kind]
        alone, of_part = stage.sliced(part, [kind] * 2, 2)
        # half of the targets; the policy loss is over the two texts that roll out in both
        policy = _policy_gradient(stage, part) if kind else dict.fromkeys(of_part, 0.0)
        for name, g in of_part.items():
            summed[name] += (g - policy[name]) / 2 + policy[name]
        if kind:
            assert mixed.positions is not None and alone.positions is not None
            assert mixed.rollout_tokens is not None and alone.rollout_tokens is not None
            assert torch.equal(mixed.positions, alone.positions)
            assert torch.equal(mixed.rollout_tokens, alone.rollout_tokens)
    _assert_close(gradients, summed, 1e-9, "both kinds")


def _check_the_number_of_slices_is_chosen() -> None:
    """The same on all stages, and what a step computes does not depend on it."""
    stage = _Stage(preset("tiny-gated-deltanet"), torch.float64)
    batches, kinds = _batches(3), [True] * 3
    _, whole = stage.sliced(batches, kinds, 1)
    # these texts are shorter than a real slice
    with mock.patch.multiple(slicing, _SHORTEST=4, KERNEL_CHUNK=4):
        assert stage.engine(None).plan(REFINE, LENGTH, kinds).shape.slices > 4
        _, sliced = stage.sliced(batches, kinds, None)
    _assert_close(sliced, whole, 1e-9, "slices of the engine's choice")


def _check_a_rehearsal_changes_nothing() -> None:
    """As on a GPU, where the passes run on made-up messages before the first receive is posted."""
    for name, recompute in (("tiny-deltanet", False), ("tiny-lact", True)):
        stage = _Stage(preset(name).with_overrides({"tie_embeddings": True}), torch.float64)
        expected, found = (_phases(stage, recompute, rehearses) for rehearses in (False, True))
        for (metrics, gradients), (others, of_others) in zip(found, expected, strict=True):
            assert metrics.loss_ntp == others.loss_ntp
            assert metrics.reward_mean == others.reward_mean
            _assert_close(gradients, of_others, 0.0, f"{name}, rehearsed")


def _phases(stage: _Stage, recompute: bool, rehearses: bool) -> list[Any]:
    """A fused step of both kinds of micro-batches, one in two phases, the first once more."""
    engine = PipelineEngine(stage.wrapped, stage.groups, slices=3, recompute=recompute)
    engine._rehearses = rehearses
    batches = _batches(4, texts=2)

    def fused(metrics: StepAccumulator) -> None:
        work = [MicroBatch(x, i != 1) for i, x in enumerate(batches)]
        engine.forward_backward(stage.context, work, metrics)

    def two_phase(metrics: StepAccumulator) -> None:
        stored = engine.roll_out(stage.context, batches, metrics)
        work = [MicroBatch(x, True, s) for x, s in zip(batches, stored, strict=True)]
        engine.forward_backward(stage.context, work, metrics)

    leave, left = StageWork._leave, []

    def noting(self: StageWork) -> Any:
        assert self._branched_at is not None
        left.append(self._branched_at.position)
        return leave(self)

    with (
        mock.patch.object(engine, "_rehearse", wraps=engine._rehearse) as rehearsal,
        mock.patch.object(StageWork, "_leave", noting),
    ):
        found = [stage.step(run) for run in (fused, two_phase, fused)]
    sets = made_up_positions(stage.model.config.arch, REFINE, LENGTH)
    assert rehearsal.call_count == (3 * len(sets) + 1 if rehearses else 0) and len(sets) > 1
    # of a fused step, of rollouts, of training on them
    assert all(left.count(2 * tuple(x)) == (3 if rehearses else 0) for x in sets)
    return found


def _policy_gradient(stage: _Stage, batches: list[TextBatch]) -> Any:
    policy_only = replace(REFINE, ntp_weight=0.0)
    return stage.sliced(batches, [True] * len(batches), 1, policy_only)[1]


def _overlaps() -> None:
    """Three steps on two stages with two replicas each; a LaCT text of one chunk uses no rate."""
    lact = preset("tiny-lact").with_overrides({"mixer.chunk_size": 64})
    for architecture in (preset("tiny-gated-deltanet"), lact):
        plain, overlapped = (_three_steps(architecture, overlap) for overlap in (False, True))
        _assert_close(overlapped, plain, 0.0, "overlapping")


def _three_steps(architecture: Architecture, overlap: bool) -> dict[str, Tensor]:
    """The losses and final weights of bfloat16 steps under the distributed optimizer."""
    options = OptimizerConfig(
        lr=1e-2,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    stage = _Stage(architecture, torch.bfloat16, optimizer=options)
    config = config_from_dict({"model": {"preset": "tiny-lact"}}, "this test")
    optimizer, _ = build_optimizer(stage.wrapped, replace(config, optimizer=options))
    train = TrainStep(stage.wrapped, optimizer, REFINE, 1, stage.groups, stage.engine(3))
    batches = _batches(4)[stage.groups.dp.rank() :: 2]
    losses = [train(batches, step)[0].loss_ntp for step in range(3)]
    assert losses[2] < losses[0]
    stage.wrapped.start_param_sync(force_sync=True)
    return {"losses": torch.tensor(losses)} | full_tensors(stage.model)


def _assert_close(found: Gradients, expected: Gradients, tolerance: float, case: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference, norm = float((found[name] - value).norm()), float(value.norm())
        assert difference <= tolerance * norm, f"{case}, {name}: {difference:.1e} of {norm:.1e}"
