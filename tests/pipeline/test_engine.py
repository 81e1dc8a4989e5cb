"""The engine on one stage: slices and recomputation against the step in one slice, in every mode.

What the step in one slice computes is tested in training/test_step_modes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from refine_mcore.config import OptimizerConfig, RefineConfig
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.packing import Documents
from refine_mcore.models.presets import preset
from refine_mcore.models.state import map_tensors
from refine_mcore.pipeline.cut import Cut, run_backward
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.slices import default_slices, slice_spans
from refine_mcore.pipeline.stage import StageWork
from refine_mcore.rollout.branches import Randomness
from refine_mcore.rollout.decode import draw_tokens
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.optimizer import wrap_data_parallel
from refine_mcore.training.step import TrainStep
from tests.models.zoo import ARCHITECTURES, NAMES, assert_same_gradients, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("short_chunks")
CONFIG = RefineConfig(num_chunks=3, rollout_tokens=4, margin_left=2, margin_right=5)
LENGTH = 22


def make_batches(*sizes: int) -> list[TextBatch]:
    tokens, index = random_tokens(sum(sizes), LENGTH), torch.arange(sum(sizes))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[-1, 19:] = False
    cuts = [x.split(sizes) for x in (tokens, mask, index)]
    return [TextBatch(*part) for part in zip(*cuts, strict=True)]


def make_packed(*sizes: int) -> list[TextBatch]:
    """Each text of documents of its own."""
    rows = ((0, 8, 9, 20), (0, 1), (0, 15))
    documents = [
        Documents(rows[sum(sizes[:i]) : sum(sizes[: i + 1])], LENGTH) for i in range(len(sizes))
    ]
    return [
        replace(batch, documents=of)
        for batch, of in zip(make_batches(*sizes), documents, strict=True)
    ]


class Outcome:
    """Metrics and summed gradients of one step."""

    def __init__(self, model: FastWeightModel, run: Any, groups: Any) -> None:
        metrics = StepAccumulator()
        run(metrics)
        self.texts = metrics.texts
        self.metrics: Any = metrics.reduce(groups, 1)
        self.gradients = {n: p.main_grad.clone() for n, p in model.named_parameters()}


class Bench:
    """A model under Megatron's data parallelism, ready for steps of any kind."""

    def __init__(self, name: str, groups: Any, config: RefineConfig = CONFIG) -> None:
        self.groups, self.model = groups, make_model(name, groups)
        self.wrapped = wrap_data_parallel(self.model, OptimizerConfig(), groups)
        self.context = StepContext(self.model, config, Randomness(1, 2), groups.dp)

    def engine(self, **options: Any) -> PipelineEngine:
        return PipelineEngine(self.wrapped, self.groups, **options)

    def step(
        self,
        mode: str,
        batches: Sequence[TextBatch],
        slices: int = 1,
        recompute: bool = False,
        *,
        engine: PipelineEngine | None = None,
        decode_graphs: bool = True,
        **options: Any,
    ) -> Outcome:
        """All optimizer steps of a mode, without moving the weights between them."""
        config = replace(self.context.config, **options)
        if engine is None:
            engine = self.engine(slices=slices, recompute=recompute, decode_graphs=decode_graphs)
        train = TrainStep(self.wrapped, None, config, 1, self.groups, engine)
        self.wrapped.zero_grad_buffer()

        def run(metrics: StepAccumulator) -> None:
            context = replace(self.context, config=config)
            for backward in train.optimizer_steps(mode, context, batches, metrics):
                backward()

        return self._outcome(run)

    def _outcome(self, run: Any) -> Outcome:
        return Outcome(self.model, run, self.groups)


def assert_same_outcome(actual: Outcome, expected: Outcome) -> None:
    for name, value in vars(expected.metrics).items():
        found = getattr(actual.metrics, name)
        if isinstance(value, Tensor):
            assert torch.equal(found, value), name
        else:
            expectation = None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)
            assert found == expectation, name
    assert_same_gradients(actual.gradients, expected.gradients)


@pytest.mark.parametrize("name", NAMES)
def test_slices_do_not_show(name: str, process_groups: Any) -> None:
    config = replace(CONFIG, rollouts_per_position=1 + NAMES.index(name) % 2)
    bench, batches = Bench(name, process_groups, config), make_batches(2, 2)
    whole = bench.step("fused", batches)
    for slices in (2, 5, LENGTH):
        assert_same_outcome(bench.step("fused", batches, slices), whole)
    assert_same_outcome(bench.step("fused", batches, 3, recompute=True), whole)


@pytest.mark.parametrize("name", NAMES)
def test_slices_do_not_show_in_two_phases(name: str, process_groups: Any) -> None:
    """Nor in a mix of texts that roll out and texts that do not."""
    config = replace(CONFIG, rollouts_per_position=1 + NAMES.index(name) % 2, mini_batch_size=2)
    bench, batches = Bench(name, process_groups, config), make_batches(1, 1, 1, 1)
    for fraction in (1.0, 0.5):
        whole = bench.step("two_phase", batches, rollout_fraction=fraction)
        for slices, recompute in ((1, True), (3, False), (4, True)):
            sliced = bench.step("two_phase", batches, slices, recompute, rollout_fraction=fraction)
            assert_same_outcome(sliced, whole)


@pytest.mark.parametrize(
    "options",
    [
        {"rollout_tokens": 1, "reward": "hybrid"},  # no decode pass
        {"margin_left": 1, "margin_right": 4, "selection": "argmin", "num_chunks": 6},
        {"rollout_temperature": 0.6, "grouping": "position", "rollouts_per_position": 3},
        {"ntp_weight": 0.3, "policy_weight": 2.0},
        {"reward": "future", "future_tokens": 5, "margin_right": 9},
        {"grouping": "position", "rollouts_per_position": 4, "selection": "uniform"},
        {"rollout_entropy": 6.0},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("name", ["delta_net-window_attention", "lact"])
def test_options_mean_the_same_in_slices(
    name: str, options: dict[str, Any], process_groups: Any
) -> None:
    bench, batches = Bench(name, process_groups, replace(CONFIG, **options)), make_batches(1, 1)
    for mode in ("fused", "two_phase"):
        whole = bench.step(mode, batches)
        for recompute in (False, True):
            assert_same_outcome(bench.step(mode, batches, 4, recompute), whole)


@pytest.mark.parametrize("name", ["gated_delta_net", "lact-full_rank"])
def test_next_token_steps_in_slices(name: str, process_groups: Any) -> None:
    bench, batches = Bench(name, process_groups), make_batches(2, 1)
    whole = bench.step("ntp", batches)
    for recompute in (False, True):
        assert_same_outcome(bench.step("ntp", batches, 3, recompute), whole)


@pytest.mark.parametrize("name", NAMES)
def test_slices_do_not_show_in_packed_texts(name: str, process_groups: Any) -> None:
    """Packed of documents, which slices cut where it comes; nor do they in two phases."""
    bench, batches = Bench(name, process_groups), make_packed(2, 1)
    for mode in ("fused", "two_phase"):
        whole = bench.step(mode, batches)
        for slices, recompute in ((2, False), (5, False), (4, True)):
            assert_same_outcome(bench.step(mode, batches, slices, recompute), whole)


def test_drift_is_what_decoding_and_scoring_disagree_by(
    process_groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices as over whole texts (training/test_step_modes.py)."""
    errors = cycle((0.5, -0.5))

    def off(*arguments: Any) -> tuple[Tensor, Tensor]:
        tokens, log_probs = draw_tokens(*arguments)
        return tokens, log_probs + next(errors)

    monkeypatch.setattr("refine_mcore.pipeline.head.draw_tokens", off)
    bench = Bench("delta_net", process_groups)
    outcome = bench.step("fused", make_batches(1, 2), slices=3)
    assert outcome.metrics.log_prob_drift == pytest.approx(0.5)


def test_slices_end_with_chunks_and_leave_no_token_out() -> None:
    lact, delta_net = ARCHITECTURES["lact"], ARCHITECTURES["delta_net"]
    assert slice_spans(22, 3, lact) == [(0, 8), (8, 16), (16, 22)]
    assert slice_spans(22, 20, lact) == [(i, i + 2) for i in range(0, 22, 2)]  # within chunks
    assert slice_spans(300, 3, delta_net) == [(0, 128), (128, 256), (256, 300)]
    assert slice_spans(5, 1, delta_net) == [(0, 5)]


def test_default_slices_are_long_enough() -> None:
    delta_net, lact = ARCHITECTURES["delta_net"], preset("lact-760m")  # chunks of 2048
    assert default_slices(10_000, delta_net, 1, 8, recompute=False) == 1
    assert default_slices(600, delta_net, 4, 8, recompute=False) == 1
    assert 8 <= default_slices(16_384, delta_net, 4, 8, recompute=False) <= 32
    assert default_slices(16_384, lact, 4, 8, recompute=False) == 8
    assert default_slices(16_384, delta_net, 1, 8, recompute=True) == 32
    assert default_slices(16_384, lact, 1, 8, recompute=True) == 8


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "lact"])
def test_recomputation_keeps_states_and_inputs_only(name: str, process_groups: Any) -> None:
    """Handing a state on does not keep the slice alive that it is a view of."""
    model = make_model(name, process_groups)
    with torch.no_grad():
        out = model(random_tokens(1, 64), output_states=True)
        cut = Cut(out.states)
    needed, kept = 0, {}

    def weigh(x: Tensor) -> Tensor:
        nonlocal needed
        needed += x.nbytes
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    map_tensors(weigh, cut.handed)
    assert sum(kept.values()) <= needed


@pytest.mark.parametrize("name", ["delta_net", "lact"])
def test_tapes_are_let_go_slice_by_slice(
    name: str, process_groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no graph is kept: chunks of 3 tokens in slices of 2, pooled with the token behind, are
    known when the third slice is read that they depend on."""
    tapes: list[int] = []
    run = StageWork.run

    def watched(self: StageWork, item: Any, message: Any, **options: Any) -> Any:
        handed_on = run(self, item, message, **options)
        if item.op == "F":
            tapes.append(sum(piece.out is not None for piece in self._slices.values()))
        return handed_on

    monkeypatch.setattr(StageWork, "run", watched)
    bench = Bench(name, process_groups, replace(CONFIG, num_chunks=6, smoothing_window=3))
    bench.step("fused", make_batches(1), slices=LENGTH // 2, recompute=True)
    assert len(tapes) > 6 and max(tapes) <= 3 and tapes[-1] == 0
    tapes.clear()
    bench.step("fused", make_batches(1), slices=LENGTH // 2)
    assert max(tapes) == len(tapes) - 1 and tapes[-1] == 0


def test_a_closed_cut_keeps_gradients_alone() -> None:
    x = torch.ones(3, requires_grad=True)
    cut = Cut([2 * x, torch.zeros(2)])
    (cut.handed[0] * torch.arange(3)).sum().backward()
    cut.close()
    assert cut.handed is None
    ((_, gradient),) = cut.roots()
    assert gradient is not None and gradient.tolist() == [0, 1, 2]
    run_backward(cut.roots())
    assert x.grad is not None and x.grad.tolist() == [0, 2, 4]
