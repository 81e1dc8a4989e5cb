"""The main job, from its command line to its files, for every mode and layout one machine runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from refine_mcore import platform
from refine_mcore.config import Config, load_config
from refine_mcore.models.sharding import full_tensors, main_gradient
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.micro_batch import MicroBatch
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.loop import Run
from refine_mcore.training.metrics import StepMetrics
from refine_mcore.training.optimizer import wrap_data_parallel
from refine_mcore.training.setup import training_model
from tests.conversion.helpers import WEIGHTS, copy_model, files, to_checkpoint, to_hf
from tests.distributed.harness import run_distributed
from tests.models.zoo import short_chunks
from tests.training.jobs import STEPS, column, metrics, run_job, write_config, write_letters

FAMILIES = ("tiny-deltanet", "tiny-gated-deltanet", "tiny-lact")
# Two-rank layouts. Micro-batches of one text interleave the data-parallel ranks' samples.
LAYOUTS = {
    "data-parallel": ("training.micro_batch_size=1",),
    "sharded-optimizer": ("optimizer.use_distributed_optimizer=true",),
    "tensor-parallel": ("parallel.tensor=2",),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def plain_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the configuration as it is."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_job(config, run)
    return run


@pytest.fixture
def job(config: Path, tmp_path: Path) -> Callable[..., list]:
    """`job(*overrides)`: the metrics of another run of it."""
    number = itertools.count()
    return lambda *overrides: run_job(config, tmp_path / str(next(number)), *overrides)


def weights(run: Path, output: Path) -> dict[str, Tensor]:
    """The final weights of a run."""
    return load_file(to_hf(run / "checkpoints", output) / WEIGHTS)


def recorded(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_metric_of_every_step(plain_run: Path) -> None:
    steps = recorded(plain_run)
    assert column(steps, "step") == list(range(STEPS))
    for step in steps:
        assert next(iter(step)) == "step"
        assert step.keys() == {field.name for field in fields(StepMetrics)}
        assert step["tokens_per_second"] == pytest.approx(4 * 64 / step["step_seconds"])
        assert step["grad_norm"] > 0
    warm_up, *refining = steps
    assert {key for key, value in warm_up.items() if value is None} == {
        "loss_policy",
        "reward_mean",
        "reward_std",
        "entropy_mean",
        "clip_fraction",
        "rollout_length",
        "log_prob_drift",
        "positions",
        "rollout_tokens",
    }
    for step in refining:
        assert None not in step.values()
        assert step["entropy_mean"] == pytest.approx(torch.tensor(2048.0).log().item(), abs=0.2)
        assert -1 <= step["reward_mean"] <= 1
        assert step["reward_std"] > 0
        assert step["rollout_length"] == 4
        assert step["clip_fraction"] == 0  # the one step per batch is on-policy
        assert len(step["positions"]) == len(step["rollout_tokens"]) == 12
    assert len(set(column(refining, "rollout_tokens"))) == STEPS - 1
    # Warm-up from 0, then a cosine over the rest.
    assert column(steps, "lr") == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3])


def test_training_learns_the_text(job) -> None:
    losses = column(job("training.steps=25", "optimizer.lr=1e-2", "refine.mode=ntp"), "loss_ntp")
    assert losses[-1] < losses[0] - 1


def test_files_of_a_run(config: Path, tmp_path: Path, capsys) -> None:
    run_job(config, tmp_path / "run", "run.tensorboard=true", "run.progress=true")
    run = tmp_path / "run"
    assert {file.name for file in run.iterdir()} == {
        ".claim",
        "config.yaml",
        "kernels.json",
        "metrics.jsonl",
        "checkpoints",
        "data",
        "description",
        "tensorboard",
    }
    assert load_config(run / "config.yaml") == load_config(
        config, [f"run.directory={run}", "run.tensorboard=true", "run.progress=true"]
    )
    assert any((run / "tensorboard").iterdir())
    ran = json.loads((run / "kernels.json").read_text())
    assert ran["kernels"]["rms_norm on cpu"] == ran["kernels"]["chunk_delta_rule on cpu"] == "torch"
    assert ran["kernels"]["decode passes"] == "one by one"
    assert "torch" in ran["versions"]
    assert ran["linear"].startswith("megatron.core.tensor_parallel.")
    assert ran["optimizer"].startswith("torch.optim.")
    shown = capsys.readouterr()
    assert shown.err.count("ETA") == STEPS  # no terminal here: a line a step
    # Three rollouts beside the text, and where everything lies.
    assert shown.out.count("rollout  ") == shown.out.count("text     ") == 3
    for path in (run / "metrics.jsonl", run / "checkpoints" / f"iter_{STEPS:07d}"):
        assert str(path) in shown.out
    assert f"tensorboard --logdir {run}" in shown.out


def test_runs_share_tokens(config: Path, plain_run: Path, tmp_path: Path) -> None:
    cache, written = tmp_path / "cache", []
    for length in (48, 64):
        run = tmp_path / str(length)
        run_job(config, run, f"data.cache={cache}", f"data.sequence_length={length}")
        assert not (run / "data").exists()
        [tokens] = cache.iterdir()
        written.append(tokens.stat().st_mtime_ns)
    assert written[0] == written[1]
    assert metrics(run) == metrics(plain_run)


@pytest.mark.parametrize("preset", FAMILIES)
def test_modes_agree_on_a_first_step(job, preset: str) -> None:
    """At equal weights all modes draw and score the same rollouts. LaCT's chunks of 8 and 64 tokens
    leave its copies on the same grid."""
    options = ("training.steps=1", "training.ntp_warmup_steps=0", "optimizer.lr_warmup_steps=0")
    [fused] = job(*options, f"model.preset={preset}")
    hashes = ("positions", "rollout_tokens", "step", "lr")
    for mode in ("two_phase", "prefix_copy"):
        [other] = job(*options, f"model.preset={preset}", f"refine.mode={mode}")
        assert {k: fused[k] for k in hashes} == {k: other[k] for k in hashes}, mode
        for key in fused.keys() - set(hashes) - {"log_prob_drift"}:
            assert other[key] == pytest.approx(fused[key], rel=1e-4, abs=1e-6), (mode, key)


def test_mini_batches_take_their_own_steps(job, plain_run: Path) -> None:
    """Two optimizer steps a batch: the second starts from other weights, so ratios leave 1."""
    steps = job("refine.mode=two_phase", "refine.mini_batch_size=2", "optimizer.lr=3e-2")
    assert column(steps, "step") == list(range(STEPS))
    assert max(column(steps[1:], "clip_fraction")) > 0
    assert column(steps, "lr") == pytest.approx([0, 3e-2, 0.75 * 3e-2, 0.25 * 3e-2])


def test_micro_batches_add_up(job, plain_run: Path) -> None:
    whole, split = job("training.micro_batch_size=4"), job("training.micro_batch_size=1")
    for a, b in zip(whole, split, strict=True):
        assert (a["positions"], a["rollout_tokens"]) == (b["positions"], b["rollout_tokens"])
        for key in ("loss_ntp", "loss_policy", "reward_mean", "entropy_mean", "grad_norm"):
            assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=0, abs=2e-6))


def test_distributed_optimizer_changes_nothing_on_one_rank(
    config: Path, plain_run: Path, tmp_path: Path
) -> None:
    run_job(config, tmp_path / "run", "optimizer.use_distributed_optimizer=true")
    expected = weights(plain_run, tmp_path / "expected")
    for name, weight in weights(tmp_path / "run", tmp_path / "found").items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_starts_from_a_converted_model_and_exports_it(
    golden: Path, config: Path, tmp_path: Path
) -> None:
    """Import, train without learning, export: the same files. Then with learning: other weights,
    which import again."""
    original = copy_model(golden, "gated_deltanet", tmp_path / "original")
    checkpoint = to_checkpoint(original, tmp_path / "imported")
    options = (
        f"model.checkpoint={checkpoint}",
        "model.preset=null",
        "model.overrides={}",
        *write_letters(tmp_path),
        "training.steps=2",
        "optimizer.weight_decay=0",
    )

    run_job(config, tmp_path / "frozen", *options, "optimizer.lr=1e-30")
    same = files(to_hf(tmp_path / "frozen" / "checkpoints", tmp_path / "same"))
    # and the run's tokenizer, as the original has none
    assert same.pop("tokenizer.model") == (tmp_path / "letters.model").read_bytes()
    assert b"LlamaTokenizer" in same.pop("tokenizer_config.json")
    assert same == files(original)

    run_job(config, tmp_path / "trained", *options)
    exported = to_hf(tmp_path / "trained" / "checkpoints", tmp_path / "exported")
    before, after = load_file(original / WEIGHTS), load_file(exported / WEIGHTS)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    again = to_checkpoint(exported, tmp_path / "again")
    assert files(to_hf(again, tmp_path / "back")) == files(exported)


def test_bfloat16_trains_with_float32_gradients(config: Path, single_rank) -> None:
    """Micro-batches add up as those of each alone do: in bfloat16 the sum is off by 3e-3."""
    settings = load_config(config, ["training.dtype=bfloat16"])
    model = training_model(settings, single_rank)
    wrapped = wrap_data_parallel(model, settings.optimizer, single_rank)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert {p.dtype for p in matrices} == {torch.bfloat16}

    def gradient(work: list[MicroBatch]) -> Tensor:
        wrapped.zero_grad_buffer()
        engine.forward_backward(context, work, StepAccumulator())
        assert {main_gradient(p).dtype for p in model.parameters()} == {torch.float32}
        return torch.cat([main_gradient(p).flatten().double() for p in model.parameters()])

    tokens = torch.randint(2048, (8, 1, 64))
    batches = [TextBatch(t, torch.ones_like(t, dtype=torch.bool), torch.zeros(1)) for t in tokens]
    context = StepContext(model, settings.refine, Randomness(0, 0), single_rank.dp)
    engine = PipelineEngine(wrapped, single_rank)
    work = [MicroBatch(batch, rolls_out=False) for batch in batches]
    # of so many targets each has its share
    expected = torch.stack([gradient([item]) for item in work]).mean(0)
    assert (gradient(work) - expected).norm() < 1e-5 * expected.norm()


def test_bfloat16_moves_the_weights_as_float32_does(
    config: Path, tmp_path: Path, single_rank
) -> None:
    """Their float32 copies, by steps that Adam's eps makes proportional to the gradients, and far
    longer than what float32 rounds gains of about 1 to."""
    options = ("optimizer.eps=1", "optimizer.lr=0.1")
    single, half = (
        _movements(
            load_config(
                config,
                [f"run.directory={tmp_path / dtype}", f"training.dtype={dtype}", *options],
            )
        )
        for dtype in ("float32", "bfloat16")
    )
    errors = {name: (half[name] - moved).norm() for name, moved in single.items()}
    for name, moved in single.items():
        assert errors[name] < 0.15 * moved.norm(), name
    total = torch.stack([moved.norm() for moved in single.values()]).norm()
    assert 0 < torch.stack(list(errors.values())).norm() < 0.03 * total


def test_two_ranks_give_the_run_of_one(config: Path, plain_run: Path, tmp_path: Path) -> None:
    """Data- and tensor-parallel: the same hashes, losses and weights, from the same start."""
    run_distributed(_run_on_two_ranks, 2, config, tmp_path)
    expected_weights = weights(plain_run, tmp_path / "expected")
    for layout in LAYOUTS:
        for one, two in zip(recorded(plain_run), recorded(tmp_path / layout), strict=True):
            assert (one["positions"], one["rollout_tokens"]) == (
                two["positions"],
                two["rollout_tokens"],
            )
            for key in ("loss_ntp", "loss_policy", "reward_mean", "entropy_mean", "grad_norm"):
                assert two[key] == (None if one[key] is None else pytest.approx(one[key], abs=1e-5))
        found = weights(tmp_path / layout, tmp_path / f"{layout}-weights")
        for name, weight in expected_weights.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)
    initial = torch.load(tmp_path / "initial.pt")
    for preset in FAMILIES:
        one, two = (initial[preset, tensor] for tensor in (1, 2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


@short_chunks()  # the one rank takes each text as one chunk
def _run_on_two_ranks(config: Path, directory: Path) -> None:
    for layout, overrides in LAYOUTS.items():
        _run(load_config(config, [f"run.directory={directory / layout}", *overrides]))
    initial = {
        (preset, size): _initial_weights(
            load_config(config, [f"model.preset={preset}", f"parallel.tensor={size}"])
        )
        for preset in FAMILIES
        for size in (1, 2)
    }
    if dist.get_rank() == 0:
        torch.save(initial, directory / "initial.pt")


def _run(config: Config) -> None:
    Run(config).train()


def _movements(config: Config) -> dict[str, Tensor]:
    """How far a run moves each of the weights that its optimizer holds."""
    run = Run(config)
    held = {name: getattr(p, "main_param", p) for name, p in run.model.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in held.items()}
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    run.train()
    return {name: weight.detach() - before[name] for name, weight in held.items()}


def _initial_weights(config: Config) -> dict[str, Tensor]:
    groups = platform.initialize_model_parallel(config.parallel.tensor)
    return full_tensors(training_model(config, groups))
