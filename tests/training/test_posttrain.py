"""Post-training: the inner and the outer update against steps by hand, and the job with its
baselines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from examples.posttrain_refine import main as posttrain
from refine_mcore.config import Config, load_config
from refine_mcore.data import build_examples, load_tokenizer
from refine_mcore.errors import UserError
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.sharding import main_gradient
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.modes import parts_of_step
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.loop import Run
from refine_mcore.training.optimizer import wrap_data_parallel
from refine_mcore.training.phases import PostTraining
from refine_mcore.training.setup import training_model
from refine_mcore.training.step import TrainStep
from tests.distributed.harness import run_distributed
from tests.training.jobs import column, metrics, run_job, write_posttrain_config
from tests.training.test_answers import answer_loss
from tests.training.test_checkpointing import EVERY_STEP, keep_until, tensors_of

INNER = ("loss_ntp", "loss_policy", "reward_mean", "positions", "rollout_tokens", "grad_norm")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_posttrain_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def plain_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept a checkpoint of every step."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_job(config, run, EVERY_STEP, main=posttrain)
    return run


class ByHand:
    """Torch's AdamW on a model of the run's first weights."""

    def __init__(self, config: Config, groups: Any) -> None:
        self.config, self.model = config, training_model(config, groups)
        self._wrapped = wrap_data_parallel(self.model, config.optimizer, groups)
        self._adam = torch.optim.AdamW(self.model.parameters(), config.optimizer.lr, weight_decay=0)

    def descend(self, loss: Tensor) -> float:
        return self._step(loss.backward)

    def refine(self, prompts: list[TextBatch], step: int) -> list[float]:
        """Optimizer steps of the published schedule on copied prefixes."""
        groups = self.model.pg_collection
        engine = PipelineEngine(self._wrapped, groups)
        train = TrainStep(self._wrapped, None, self.config.refine, 0, groups, engine)
        randomness = Randomness(self.config.training.seed, step)
        context = StepContext(self.model, self.config.refine, randomness, groups.dp)
        norms = []
        for run in train.optimizer_steps("prefix_copy", context, prompts, StepAccumulator()):
            norms.append(self._step(run))
        return norms

    def _step(self, backward: Callable[[], None]) -> float:
        self._wrapped.zero_grad_buffer()
        backward()
        found = [main_gradient(p) for p in self.model.parameters()]
        for parameter, gradient in zip(self.model.parameters(), found, strict=True):
            parameter.grad = gradient.clone()
        self._adam.step()
        self._adam.zero_grad()
        return torch.stack([g.norm() for g in found]).norm().item()


def prompt_loss(model: FastWeightModel, batches: list[TextBatch]) -> Tensor:
    """Cross entropy of the prompts' tokens but the first, each prompt run alone."""
    losses = []
    for batch in batches:
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
            text = tokens[None, : int(mask.sum())]
            logits = model.logits(model(text).hidden)[0, :-1]
            losses.append(F.cross_entropy(logits, text[0, 1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("mode", ["fused", "ntp", "none"])
def test_a_batch_is_an_inner_and_an_outer_step(
    mode: str, config: Path, tmp_path: Path, single_rank: Any
) -> None:
    """Two batches, in float64: weights and gradient norms are those of steps by hand."""
    options = [
        f"run.directory={tmp_path / 'run'}",
        "posttrain.inner=false" if mode == "none" else f"refine.mode={mode}",
        "training.dtype=float64",
        "training.steps=2",
        "optimizer.clip_grad=0",
        "optimizer.weight_decay=0",
    ]
    settings = load_config(config, options)
    run = Run(settings, PostTraining)
    hand = ByHand(settings, single_rank)
    expected = []
    batches = run._batches(0)
    for step in range(2):
        texts = [next(batches), next(batches)]
        prompts = [batch.prompts() for batch in texts]
        inner = None
        if mode == "fused":
            (inner,) = hand.refine(prompts, step)
        elif mode == "ntp":  # an optimizer step per mini-batch, here a micro-batch
            *_, inner = (hand.descend(prompt_loss(hand.model, [part])) for part in prompts)
        expected.append((inner, hand.descend(answer_loss(hand.model, texts))))
    run.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for line, (inner, outer) in zip(lines, expected, strict=True):
        assert line["grad_norm"] == (None if inner is None else pytest.approx(inner, rel=1e-6))
        assert line["sft_grad_norm"] == pytest.approx(outer, rel=1e-6)
    for name, weight in hand.model.named_parameters():
        found = dict(run.model.named_parameters())[name]
        assert (found - weight).abs().max() < 1e-8, name  # of two to six steps of 1e-3


@pytest.mark.parametrize(
    "layout",
    ["parallel.pipeline=2", pytest.param("parallel.tensor=2", marks=pytest.mark.slow)],
)
def test_other_layouts_train_the_same(
    layout: str, config: Path, plain_run: Path, tmp_path: Path
) -> None:
    """In slices; prompts end within them."""
    options = [f"run.directory={tmp_path / 'run'}", layout, "parallel.slices=3"]
    run_distributed(_train, 2, config, options)
    for found, expected in zip(metrics(tmp_path / "run"), metrics(plain_run), strict=True):
        for name, value in expected.items():
            drawn = name in ("positions", "rollout_tokens")
            assert found[name] == (value if drawn else pytest.approx(value, rel=1e-4, abs=1e-6))


def _train(path: Path, options: list[str]) -> None:
    Run(load_config(path, options), PostTraining).train()
    dist.barrier()


def test_every_metric_of_every_step(plain_run: Path) -> None:
    for line in metrics(plain_run):
        assert None not in line.values()
        assert line["sft_loss"] == pytest.approx(torch.tensor(2048.0).log().item(), abs=0.5)
        assert line["skipped_steps"] == 0
    assert len(set(column(metrics(plain_run), "rollout_tokens"))) == len(metrics(plain_run))


def test_post_training_learns_the_answers(config: Path, tmp_path: Path) -> None:
    options = ("training.steps=12", "optimizer.lr=1e-2")
    losses = column(run_job(config, tmp_path / "run", *options, main=posttrain), "sft_loss")
    assert losses[-1] < losses[0] - 1


def watched_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[list[int]]]]:
    """The mode and the texts (their `sample_index`) of each optimizer step that is taken."""
    seen: list[tuple[str, list[list[int]]]] = []
    steps = TrainStep.optimizer_steps

    def watched(self: TrainStep, mode: str, *arguments: Any) -> Iterator[Callable[[], None]]:
        for run in steps(self, mode, *arguments):
            seen.append((mode, [batch.sample_index.tolist() for batch in arguments[1]]))
            yield run

    monkeypatch.setattr(TrainStep, "optimizer_steps", watched)
    return seen


def test_baselines_see_the_same_data_in_as_many_steps(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched_steps(monkeypatch)
    runs = {}
    for name, option in {
        "refine": "refine.mode=two_phase",
        "nested": "refine.mode=ntp",
        "sft": "posttrain.inner=false",
    }.items():
        seen.clear()
        run_job(config, tmp_path / name, "training.steps=2", option, main=posttrain)
        runs[name] = list(seen)
    inner, outer = 2, 1
    assert [mode for mode, _ in runs["refine"]] == (["two_phase"] * inner + ["sft"] * outer) * 2
    assert [mode for mode, _ in runs["nested"]] == (["ntp"] * inner + ["sft"] * outer) * 2
    assert [texts for _, texts in runs["refine"]] == [texts for _, texts in runs["nested"]]
    assert runs["sft"] == [step for step in runs["refine"] if step[0] == "sft"]
    for line in metrics(tmp_path / "sft"):
        assert all(line[name] is None for name in INNER)


def test_a_resumed_run_is_the_straight_one(config: Path, plain_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(plain_run, tmp_path / "stopped")
    keep_until(run, 2)
    assert run_job(config, run, EVERY_STEP, main=posttrain) == metrics(plain_run)
    assert_same_tensors(run, plain_run)


def test_packed_examples_are_trained_on_as_examples_are(config: Path, tmp_path: Path) -> None:
    """All examples in one batch, in rows of their own or in few: loss and gradient of the answers
    are the same. An inner update rolls out from the packed prompts, and a stopped run goes on."""
    once = ("training.steps=1", "posttrain.inner=false", "refine.mini_batch_size=null")
    alone = (*once, "training.global_batch_size=12")
    (expected,) = run_job(config, tmp_path / "alone", *alone, main=posttrain)
    rows = (
        "refine.mini_batch_size=null",
        "data.packing=documents",
        "data.sequence_length=128",
        "training.micro_batch_size=1",
    )
    batch = f"training.global_batch_size={_rows_of(config, *rows)}"
    together = (*rows, batch, *once)
    (found,) = run_job(config, tmp_path / "packed", *together, main=posttrain)
    assert found["sft_loss"] == pytest.approx(expected["sft_loss"], rel=1e-5)
    assert found["sft_grad_norm"] == pytest.approx(expected["sft_grad_norm"], rel=1e-4)

    inner = (*rows, batch, "training.steps=2", EVERY_STEP)
    straight = run_job(config, tmp_path / "inner", *inner, main=posttrain)
    assert all(step["reward_mean"] is not None for step in straight)
    keep_until(tmp_path / "inner", 1)
    assert run_job(config, tmp_path / "inner", *inner, main=posttrain) == straight


def _rows_of(config: Path, *options: str) -> int:
    """How many rows the examples make, fewer than they are."""
    loaded = load_config(config, options)
    assert loaded.data.tokenizer is not None
    rows = len(build_examples(loaded.data, load_tokenizer(loaded.data.tokenizer), 2048, 1))
    assert rows <= 6
    return rows


@pytest.mark.slow
def test_a_run_killed_within_a_batch_goes_on_from_the_batch_before(
    config: Path, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the inner and the outer update; nothing of the inner one is kept."""
    call = TrainStep.__call__

    def killed(self: TrainStep, batches: Any, step: int, mode: str) -> Any:
        if (step, mode) == (2, "sft"):
            raise KeyboardInterrupt
        return call(self, batches, step, mode)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", killed)
        run_job(config, tmp_path / "run", EVERY_STEP, main=posttrain)
    assert len(metrics(tmp_path / "run")) == 2
    steps = run_job(config, tmp_path / "run", EVERY_STEP, main=posttrain)
    assert steps == metrics(plain_run)
    assert_same_tensors(tmp_path / "run", plain_run)


def assert_same_tensors(run: Path, other: Path) -> None:
    """Weights and optimizer state of the newest checkpoints, bit for bit."""
    found, expected = (
        tensors_of(sorted((path / "checkpoints").glob("iter_*"))[-1]) for path in (run, other)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("data.answer_eos=true", "data.answer_eos"),
        ("data.max_answer_tokens=7", "data.max_answer_tokens"),
        ("data.seed=5", "data.seed"),
        ("data.packing=documents", "data.packing"),
    ],
)
def test_other_examples_are_refused(
    config: Path, plain_run: Path, tmp_path: Path, option: str, name: str
) -> None:
    run = shutil.copytree(plain_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"trained with another {name}: "):
        run_job(config, run, option, "training.steps=6", main=posttrain)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_mid_training_does_not_go_on_from_post_training(
    config: Path, plain_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"data\.max_answer_tokens"):
        load = f"checkpoint.load={plain_run / 'checkpoints'}"
        run_job(config, tmp_path / "run", load, "training.steps=6")


def test_only_the_baseline_takes_next_token_steps_per_mini_batch(config: Path) -> None:
    """A run that is not of mode ntp takes its next-token warm-up in one step, as ever."""
    refine = load_config(config).refine
    assert len(parts_of_step("ntp", refine, 4, 1)) == 1
    assert len(parts_of_step("ntp", replace(refine, mode="ntp"), 4, 1)) == 2
    assert len(parts_of_step("sft", replace(refine, mode="ntp"), 4, 1)) == 1
