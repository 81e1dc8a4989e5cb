"""A resumed run is the uninterrupted one; a run's checkpoints survive crashes and serve others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from refine_mcore.conversion.description import find_checkpoint, read_description
from refine_mcore.conversion.torch_dist import CheckpointReader
from refine_mcore.errors import UserError
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.sharding import full_tensors
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.training.checkpointing import load_weights
from refine_mcore.training.step import TrainStep
from tests.conversion.helpers import WEIGHTS, to_hf
from tests.training.jobs import STEPS, column, metrics, run_job, write_config

EVERY_STEP = "checkpoint.save_interval=1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def plain_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept a checkpoint of every step."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_job(config, run, EVERY_STEP)
    return run


@pytest.fixture
def stopped_run(plain_run: Path, tmp_path: Path) -> Path:
    """The same run as it was after its second checkpoint, with metrics of more steps."""
    run = shutil.copytree(plain_run, tmp_path / "stopped")
    keep_until(run, 2)
    return run


def keep_until(run: Path, step: int) -> None:
    """Make `step` the run's newest checkpoint."""
    checkpoints = run / "checkpoints"
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(checkpoints / f"iter_{later:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")


def weights(run: Path, output: Path) -> bytes:
    return (to_hf(run / "checkpoints", output) / WEIGHTS).read_bytes()


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """Interrupt the job as Ctrl-C would, before its step `stop`."""
    step = TrainStep.__call__

    def interrupted(self: TrainStep, batches: list, number: int, mode: str | None = None):
        if number == stop:
            raise KeyboardInterrupt
        return step(self, batches, number, mode)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("model.preset=tiny-gated-deltanet",),
        ("model.preset=tiny-lact", "training.micro_batch_size=1"),
        ("optimizer.use_distributed_optimizer=true",),
        ("training.dtype=bfloat16",),
        ("training.dtype=bfloat16", "optimizer.use_distributed_optimizer=true"),
        ("refine.mode=two_phase", "refine.mini_batch_size=2"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_resuming_changes_nothing(config, tmp_path, monkeypatch, options: tuple[str, ...]) -> None:
    """Interrupted in step 3, between checkpoints: metrics, hashes and final weights bit for bit."""
    expected = run_job(config, tmp_path / "whole", *options)
    interrupted = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_job(config, interrupted, *options, "checkpoint.save_interval=2")
    assert column(metrics(interrupted), "step") == [0, 1, 2]
    assert find_checkpoint(interrupted / "checkpoints").name == "iter_0000002"

    assert run_job(config, interrupted, *options) == expected
    found = weights(interrupted, tmp_path / "found")
    assert found == weights(tmp_path / "whole", tmp_path / "expected")


def test_finished_run_is_left_alone(config, plain_run, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (plain_run / "checkpoints").rglob("*")}
    expected = metrics(plain_run)
    assert run_job(config, plain_run, EVERY_STEP) == expected
    assert f"{plain_run} has already run its {STEPS} steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (plain_run / "checkpoints").rglob("*")} == before


def test_half_written_checkpoint_is_ignored_and_replaced(config, plain_run, stopped_run) -> None:
    """What a crash while saving leaves does not count."""
    checkpoints = stopped_run / "checkpoints"
    (checkpoints / ".iter_0000003.partial").mkdir()
    (checkpoints / ".iter_0000003.partial" / "__0_0.distcp").write_bytes(b"half")
    (checkpoints / "iter_0000003").mkdir()  # renamed, but not recorded yet
    assert run_job(config, stopped_run, EVERY_STEP) == metrics(plain_run)
    assert {path.name for path in checkpoints.iterdir()} == {
        "latest_checkpointed_iteration.txt",
        *(f"iter_{step:07d}" for step in range(1, STEPS + 1)),
    }


def test_another_run_goes_on_from_a_checkpoint(config, plain_run, tmp_path) -> None:
    """checkpoint.load: the first run's steps continue in a directory of their own."""
    source = plain_run / "checkpoints" / "iter_0000002"
    steps = run_job(config, tmp_path / "run", f"checkpoint.load={source}")
    assert steps == metrics(plain_run)[2:]


def test_resuming_takes_the_learning_rate_and_length_of_its_configuration(
    config, stopped_run
) -> None:
    options = ("optimizer.lr=0.5", "optimizer.lr_decay_style=constant", "training.steps=6")
    steps = run_job(config, stopped_run, *options)
    assert column(steps, "step") == list(range(6))
    assert column(steps[2:], "lr") == [0.5] * 4


def test_resuming_with_another_batch_size_skips_no_text(config, stopped_run, monkeypatch) -> None:
    """Samples consumed are counted: 2 steps of 4 texts and one of 2, so the next is the 10th."""
    smaller = "training.global_batch_size=2"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_job(config, stopped_run, EVERY_STEP, smaller)
    seen: list[int] = []
    step = TrainStep.__call__

    def spy(self: TrainStep, batches: list, number: int, mode: str | None = None):
        seen.extend(index for batch in batches for index in batch.sample_index.tolist())
        return step(self, batches, number, mode)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    run_job(config, stopped_run, smaller)
    assert seen == [10, 11]


def test_checkpoint_holds_model_description_and_no_extra_tensors(plain_run: Path) -> None:
    checkpoint = find_checkpoint(plain_run / "checkpoints")
    names = {file.name for file in checkpoint.iterdir()}
    assert {".metadata", "metadata.json", "common.pt", "architecture.json"} <= names
    reader = CheckpointReader(checkpoint)
    for key in (
        "embedding.word_embeddings.weight",
        "decoder.layers.1.self_attention.k_proj.weight",
    ):
        assert key in reader
        assert f"optimizer.state.exp_avg.{key}" in reader


def test_resuming_another_model_is_refused(config, stopped_run) -> None:
    """Also one with the same shapes, which would load."""
    with pytest.raises(UserError, match=r"another model than the run asks for: norm_eps differ"):
        run_job(config, stopped_run, "model.overrides={vocab_size: 2048, norm_eps: 1e-3}")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_bfloat16_runs_are_read_from_their_float32_copies(
    config: Path, tmp_path: Path, request: pytest.FixtureRequest, sharded: str
) -> None:
    """An update below the precision of bfloat16 survives export and a new start."""
    run = tmp_path / "run"
    options = ("training.dtype=bfloat16", "training.steps=2", "optimizer.lr=1e-5")
    run_job(config, run, *options, f"optimizer.use_distributed_optimizer={sharded}")
    directory = find_checkpoint(run / "checkpoints")
    key = "decoder.layers.0.self_attention.q_proj.weight"
    reader = CheckpointReader(directory)
    assert reader.dtype(key) == torch.float32
    weight = torch.empty(reader.shape(key))
    reader.read_rows(key, 0, weight)
    assert not torch.equal(weight, weight.bfloat16().float())

    architecture = read_description(directory).architecture
    groups = request.getfixturevalue("single_rank")
    model = build_model(transformer_config(architecture), groups)
    load_weights(model, directory)
    assert torch.equal(full_tensors(model)[key], weight)
