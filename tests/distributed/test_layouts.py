"""Training steps at every layout against one rank: losses, rewards, positions, rollouts, every
weight gradient, and the weights some steps later.

The one-rank reference reads whole texts, which training/test_step_modes.py compares with prefix
copies and definitions; it is made here and handed to the ranks as a file. Layouts with a pipeline
run over three slices. Texts cross chunks of the delta rules and states kept on the tape, which lie
closer than in a real run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from refine_mcore import platform
from refine_mcore.config import Config, ParallelConfig, RefineConfig, config_from_dict
from refine_mcore.models.architecture import Architecture, AttentionOptions
from refine_mcore.models.fast_weight_model import FastWeightModel, build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.packing import Documents
from refine_mcore.models.presets import preset
from refine_mcore.models.sharding import full_tensors, main_gradient
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.optimizer import build_optimizer, wrap_data_parallel
from refine_mcore.training.step import TrainStep
from tests.distributed.harness import run_distributed
from tests.models.zoo import short_chunks

TEXTS, LENGTH = 4, 41
REFINE = RefineConfig(
    num_chunks=3, rollout_tokens=3, margin_left=3, margin_right=5, rollouts_per_position=2
)


@dataclass(frozen=True)
class Layout:
    """What is left of the ranks is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    first_stage_layers: int | None = None

    def parallel(self, layers: int) -> ParallelConfig:
        slices = 3 if self.pipeline > 1 or self.recompute else None
        first = self.first_stage_layers
        split = None if first is None else (first, layers - first)
        return ParallelConfig(self.tensor, self.pipeline, self.sequence_parallel, slices, split)


TWO_RANKS = {
    "TP2": Layout(tensor=2),
    "TP2+SP": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "PP2 of unlike stages": Layout(pipeline=2, first_stage_layers=1),
    "PP2+recompute": Layout(pipeline=2, recompute=True),
    "DP2": Layout(),
}
FOUR_RANKS = {
    "PP4+recompute": Layout(pipeline=4, recompute=True),
    "TP2xPP2+SP": Layout(tensor=2, pipeline=2, sequence_parallel=True),
}
MORE_OF_FOUR_RANKS = {
    "TP4": Layout(tensor=4),
    "TP4+SP": Layout(tensor=4, sequence_parallel=True),
    "PP4": Layout(pipeline=4),
    "TP2xPP2": Layout(tensor=2, pipeline=2),
    "TP2xDP2": Layout(tensor=2),
    "PP2xDP2": Layout(pipeline=2),
}


def _families() -> dict[str, Architecture]:
    """Odd vocabularies throughout; four layers, or five that no number of stages divides. The
    attention of hybrids has two key/value heads, which four ranks share."""
    base = {"initializer_range": 0.3, "num_layers": 4}
    delta_net = preset("tiny-deltanet").with_overrides(base | {"mixer.num_heads": 4})
    gated = preset("tiny-gated-deltanet").with_overrides(base | {"mixer.num_heads": 4})
    # Chunks of more tokens than the fast heads are wide: shorter ones make gradients of less than
    # full rank, and Muon amplifies what rounding puts into the rest.
    lact = preset("tiny-lact").with_overrides(
        base | {"mixer.num_fast_heads": 4, "mixer.chunk_size": 16}
    )
    window = AttentionOptions(layers=(1, 4), num_heads=4, num_kv_heads=2, window_size=9)
    # as in Qwen3.5 and in OLMo-Hybrid
    own_width = AttentionOptions(
        layers=(1, 3),
        num_heads=4,
        num_kv_heads=2,
        kv_channels=6,
        rotary_percent=0.7,
        qk_layernorm="per_head",
        attention_output_gate=True,
    )
    full_width = AttentionOptions((1,), 4, 2, rope_theta=None, qk_layernorm="full_width")
    return {
        "deltanet-tied": delta_net.with_overrides({"tie_embeddings": True}),
        "gated-deltanet": gated,
        "lact": lact,
        "lact-qk-norm": lact.with_overrides(
            {"mixer.qk_norm": True, "mixer.qkv_bias": True, "vocab_size": 62}
        ),
        "hybrid": replace(delta_net.with_overrides({"num_layers": 5}), attention=window),
        "gated-attention-tied": replace(
            gated.with_overrides({"mixer.num_value_heads": 8, "mixer.expand_v": 1.0}),
            attention=own_width,
            layernorm_zero_centered_gamma=True,
            tie_embeddings=True,
        ),
        "post-norm": replace(
            gated.with_overrides({"mixer.allow_neg_eigval": True}),
            attention=full_width,
            post_norm_layers=(1, 2),
        ),
    }


FAMILIES = _families()
MODE_FAMILIES = ("gated-deltanet", "lact")
# Modes beside the fused one, with texts one by one, in two optimizer steps or four.
MODES = {
    "two_phase": replace(REFINE, mode="two_phase", mini_batch_size=2),
    "two_phase, four steps": replace(REFINE, mode="two_phase", mini_batch_size=1),
    "two_phase, half": replace(REFINE, mode="two_phase", mini_batch_size=2, rollout_fraction=0.5),
    "fused, half": replace(REFINE, rollout_fraction=0.5),
    "ntp": replace(REFINE, mode="ntp"),
    "future": replace(REFINE, reward="future", future_tokens=2),
    "two_phase, future": replace(
        REFINE, mode="two_phase", mini_batch_size=2, reward="future", future_tokens=2
    ),
    "groups of positions": replace(
        REFINE, grouping="position", rollouts_per_position=4, selection="uniform"
    ),
    "lengths by entropy": replace(REFINE, rollout_entropy=6.0),
    "packed": REFINE,
    "two_phase, packed": replace(REFINE, mode="two_phase", mini_batch_size=2),
}
MODE_LAYOUTS = {
    "two_phase": ("DP2", "TP2+SP", "PP2", "PP2+recompute"),
    "two_phase, four steps": ("PP2",),
    "fused, half": ("DP2", "PP2"),
    "two_phase, future": ("PP2",),
    "packed": ("DP2", "PP2+recompute"),
}


class Run:
    """Some training steps of a family at a layout, on the same texts whatever the layout."""

    @short_chunks()
    def __init__(
        self, family: str, layout: Layout, dtype: str, steps: int, mode: str | None = None
    ) -> None:
        refine = REFINE if mode is None else MODES[mode]
        self.config = replace(_config(layout, dtype, FAMILIES[family].num_layers), refine=refine)
        parallel = self.config.parallel
        groups = platform.initialize_model_parallel(parallel.tensor, parallel.pipeline)
        self.model = self._build(FAMILIES[family], groups)
        wrapped = wrap_data_parallel(self.model, self.config.optimizer, groups)
        optimizer, _ = build_optimizer(wrapped, self.config)
        engine = PipelineEngine(
            wrapped,
            groups,
            slices=parallel.slices,
            recompute=self.config.training.recompute == "full",
        )
        train = TrainStep(wrapped, optimizer, self.config.refine, 1, groups, engine)
        self.results: dict[str, Tensor] = {}
        for step in range(steps):
            texts = _texts(step, groups.dp, 2 if mode is None else 1)
            if mode is not None and "packed" in mode:
                texts = [packed(text) for text in texts]
            metrics, _ = train(texts, step)
            self._keep(f"metric.{step}.", vars(metrics))
            if step == 0:
                self._keep("gradient.", full_tensors(self.model, main_gradient))
            self._keep(f"weight.{step}.", full_tensors(self.model))

    def _build(self, architecture: Architecture, groups: Any) -> FastWeightModel:
        parallel = self.config.parallel
        config = transformer_config(
            architecture,
            dtype=getattr(torch, self.config.training.dtype),
            tensor_parallel=parallel.tensor,
            pipeline_parallel=parallel.pipeline,
            layers_per_stage=parallel.layers_per_stage,
            sequence_parallel=parallel.sequence_parallel,
        )
        model = build_model(config, groups)
        initialize(model, seed=1)
        return model

    def _keep(self, prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if value is not None:
                self.results[prefix + name] = torch.as_tensor(value).clone()


def _config(layout: Layout, dtype: str, layers: int) -> Config:
    config = config_from_dict(
        {
            "model": {"preset": "tiny-deltanet"},  # for the checks only
            "data": {"sequence_length": LENGTH},
            "training": {"dtype": dtype, "recompute": "full" if layout.recompute else None},
            "optimizer": {"lr": 1e-3, "clip_grad": 0.0},
        },
        "this test",
    )
    return replace(config, parallel=layout.parallel(layers))


def _texts(step: int, dp_group: dist.ProcessGroup, at_a_time: int) -> list[TextBatch]:
    """This rank's share of a step's texts, one at a time with data parallelism."""
    tokens = torch.randint(61, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(step))
    mine = torch.arange(dp_group.rank(), TEXTS, dp_group.size())
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    return [
        TextBatch(tokens[index], mask.expand(len(index), -1), index)
        for index in mine.split(1 if dp_group.size() > 1 else at_a_time)
    ]


def packed(batch: TextBatch) -> TextBatch:
    """The texts as documents of lengths of their own, one of which lies in all three slices and one
    begins with a slice; the last are padded."""
    starts = [
        ((0, 2, 14, 30), (0, 9, 10, 11), (0, 36), (0, 1, 28))[i % 4] for i in batch.sample_index
    ]
    mask = batch.mask.clone()
    mask[:, -2:] = False
    return replace(batch, mask=mask, documents=Documents(tuple(starts), LENGTH))


def _compare(case: str, run: Run, expected: dict[str, Tensor], tolerance: float) -> None:
    """The same things, and the same values."""
    assert run.results.keys() == expected.keys()
    for name, value in expected.items():
        found = run.results[name]
        if not value.is_floating_point():  # positions and rollout tokens
            assert torch.equal(found, value), f"{case} {name}"
            continue
        actual = found[: value.shape[0]] if value.dim() else found  # a padded vocabulary is longer
        difference, norm = (actual.double() - value.double()).norm(), value.double().norm()
        # Adam's first steps divide by gradients, of zero too: less sharp
        limit = 100 * tolerance if name.startswith("weight.") else tolerance
        # on-policy the policy loss and the drift of log-probs are zero but for rounding
        floor = (1e-2 if name.startswith("metric.") else 1e-4) * tolerance
        assert difference <= limit * norm + floor, f"{case} {name}: {difference:.1e} of {norm:.1e}"


def _all_layouts(layouts: dict[str, Layout], steps: int, reference: Path) -> None:
    for family in FAMILIES:
        expected = _load(reference, family, f"float64-{steps}")
        _all_layouts_of(family, layouts, "float64", steps, expected, 1e-9)


def _all_layouts_of(
    family: str,
    layouts: dict[str, Layout],
    dtype: str,
    steps: int,
    expected: dict[str, Tensor],
    tolerance: float,
) -> None:
    for name, layout in layouts.items():
        run = Run(family, layout, dtype, steps)
        if dist.get_rank() == 0:
            _compare(f"{family} {name} {dtype}", run, expected, tolerance)


def _load(reference: Path, family: str, name: str) -> dict[str, Tensor]:
    return torch.load(reference / f"{family}-{name}.pt", weights_only=True)


def _modes(
    layouts: dict[str, Layout], of_mode: dict[str, Sequence[str]], steps: int, reference: Path
) -> None:
    for mode, names in of_mode.items():
        for family in MODE_FAMILIES if steps == 1 else FAMILIES:
            expected = _load(reference, family, f"{mode}-{steps}")
            for name in names:
                run = Run(family, layouts[name], "float64", steps, mode)
                if dist.get_rank() == 0:
                    _compare(f"{family} {name} {mode}", run, expected, 1e-9)


def _single_precision(layouts: dict[str, Layout], reference: Path) -> None:
    for family in FAMILIES:
        expected = _load(reference, family, "float32-1")
        # Muon's Newton-Schulz iterations amplify rounding
        tolerance = 1e-2 if "lact" in family else 1e-4
        _all_layouts_of(family, layouts, "float32", 1, expected, tolerance)


@contextmanager
def _one_rank() -> Iterator[None]:
    platform.initialize()
    platform.init_distributed(timeout_s=60)
    try:
        yield
    finally:
        platform.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file per family and kind of run: what one rank gives."""
    directory = tmp_path_factory.mktemp("reference")
    with _one_rank():
        for family in FAMILIES:
            for dtype in ("float64", "float32"):
                run = Run(family, Layout(), dtype, 1)
                torch.save(run.results, directory / f"{family}-{dtype}-1.pt")
        for family in MODE_FAMILIES:
            for mode in MODE_LAYOUTS:
                run = Run(family, Layout(), "float64", 1, mode)
                torch.save(run.results, directory / f"{family}-{mode}-1.pt")
    return directory


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `reference`, of runs that only slow tests make."""
    directory = tmp_path_factory.mktemp("five_steps")
    with _one_rank():
        for family in FAMILIES:
            run = Run(family, Layout(), "float64", 5)
            torch.save(run.results, directory / f"{family}-float64-5.pt")
            for mode in MODES:
                run = Run(family, Layout(), "float64", 2, mode)
                torch.save(run.results, directory / f"{family}-{mode}-2.pt")
    return directory


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks, layouts", [(2, TWO_RANKS), (4, FOUR_RANKS)])
def test_layouts_equal_one_rank(reference: Path, ranks: int, layouts: dict[str, Layout]) -> None:
    run_distributed(_all_layouts, ranks, layouts, 1, reference, timeout=800)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks, layouts", [(2, TWO_RANKS), (4, FOUR_RANKS | MORE_OF_FOUR_RANKS)])
def test_five_steps_equal_one_rank(
    five_steps: Path, ranks: int, layouts: dict[str, Layout]
) -> None:
    run_distributed(_all_layouts, ranks, layouts, 5, five_steps, timeout=3500)


def test_modes_equal_one_rank(reference: Path) -> None:
    """The weights after the last optimizer step of a batch too."""
    run_distributed(_modes, 2, TWO_RANKS, MODE_LAYOUTS, 1, reference)


def test_packed_documents_equal_one_rank(reference: Path) -> None:
    layouts = {"packed": ("TP2xPP2+SP",)}
    run_distributed(_modes, 4, FOUR_RANKS, layouts, 1, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks, layouts", [(2, TWO_RANKS), (4, FOUR_RANKS | MORE_OF_FOUR_RANKS)])
def test_all_modes_equal_one_rank(five_steps: Path, ranks: int, layouts: dict[str, Layout]) -> None:
    """Two batches each; a single text cannot be shared by two ranks."""
    one_by_one = ("two_phase, four steps", "two_phase, half")
    of_mode = {
        mode: [name for name in layouts if "DP2" not in name or mode not in one_by_one]
        for mode in MODES
    }
    run_distributed(_modes, ranks, layouts, of_mode, 2, five_steps, timeout=3500)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "ranks, layouts",
    [
        (4, {"TP2xPP2+SP": FOUR_RANKS["TP2xPP2+SP"]}),
        pytest.param(2, TWO_RANKS, marks=pytest.mark.slow),
        pytest.param(4, FOUR_RANKS | MORE_OF_FOUR_RANKS, marks=pytest.mark.slow),
    ],
)
def test_single_precision_equals_one_rank(
    reference: Path, ranks: int, layouts: dict[str, Layout]
) -> None:
    run_distributed(_single_precision, ranks, layouts, reference, timeout=800)
