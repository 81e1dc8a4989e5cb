"""A resumed run is the uninterrupted one; a run's checkpoints survive crashes and serve others."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from refine_mcore.config import CheckpointConfig, claim_run_directory, load_config
from refine_mcore.conversion.description import find_checkpoint, read_description
from refine_mcore.conversion.torch_dist import CheckpointReader, read_metadata
from refine_mcore.errors import UserError
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.sharding import full_tensors
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.training.checkpointing import CheckpointWriter, latest_checkpoint, load_weights
from refine_mcore.training.loop import Run
from refine_mcore.training.progress import Progress
from refine_mcore.training.step import TrainStep
from tests.conversion.helpers import WEIGHTS, copy_model, files, to_checkpoint, to_hf
from tests.distributed.harness import run_distributed
from tests.fused_adam import use_fused_adam
from tests.training.jobs import STEPS, column, metrics, run_job, write_config, write_letters

MARKER = "latest_checkpointed_iteration.txt"
EVERY_STEP = "checkpoint.save_interval=1"
EVERY_SECOND_STEP = "checkpoint.save_interval=2"
IN_BACKGROUND = "checkpoint.async_save=true"
NO_LEARNING = ("optimizer.lr=1e-30", "optimizer.weight_decay=0", "training.steps=2")
OVERLAP = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
OF_ITS_CHECKPOINT = ("model.preset=null", "model.overrides={}")
# Two-rank layouts (tensor, pipeline) whose checkpoints go on at other layouts.
LAYOUTS = [(2, 1)]


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
        shutil.rmtree(checkpoints / f"iter_{later:07d}", ignore_errors=True)
    (checkpoints / MARKER).write_text(f"{step}\n")


def weights(run: Path, output: Path) -> bytes:
    return (to_hf(run / "checkpoints", output) / WEIGHTS).read_bytes()


def before_step(patch: pytest.MonkeyPatch, action: Callable[[int], object]) -> None:
    """Call `action(number)` before every step of a job."""
    step = TrainStep.__call__

    def acting(self: TrainStep, batches: list, number: int, mode: str | None = None):
        action(number)
        return step(self, batches, number, mode)

    patch.setattr(TrainStep, "__call__", acting)


def stop_at(patch: pytest.MonkeyPatch, stop: int) -> None:
    """Interrupt the job as Ctrl-C would, before its step `stop`."""

    def interrupt(number: int) -> None:
        if number == stop:
            raise KeyboardInterrupt

    before_step(patch, interrupt)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("model.preset=tiny-gated-deltanet",),
        ("model.preset=tiny-lact", "training.micro_batch_size=1"),
        ("optimizer.use_distributed_optimizer=true",),
        ("training.dtype=bfloat16",),
        ("training.dtype=bfloat16", "optimizer.use_distributed_optimizer=true"),
        ("training.dtype=bfloat16", "model.preset=tiny-gated-deltanet"),
        (
            "training.dtype=bfloat16",
            "model.preset=tiny-gated-deltanet",
            "optimizer.use_distributed_optimizer=true",
        ),
        (
            "training.dtype=bfloat16",
            "model.preset=tiny-lact",
            "training.micro_batch_size=1",
            "optimizer.use_distributed_optimizer=true",
        ),
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
            run_job(config, interrupted, *options, EVERY_SECOND_STEP)
    assert column(metrics(interrupted), "step") == [0, 1, 2]
    assert find_checkpoint(interrupted / "checkpoints").name == "iter_0000002"

    assert run_job(config, interrupted, *options) == expected
    found = weights(interrupted, tmp_path / "found")
    assert found == weights(tmp_path / "whole", tmp_path / "expected")


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_resuming_changes_nothing_with_a_fused_adam(config, tmp_path, monkeypatch, sharded) -> None:
    use_fused_adam(monkeypatch)
    options = ("training.dtype=bfloat16", f"optimizer.use_distributed_optimizer={sharded}")
    test_resuming_changes_nothing(config, tmp_path, monkeypatch, options)
    made = json.loads((tmp_path / "whole" / "kernels.json").read_text())
    assert made["optimizer"] == "tests.fused_adam.FusedAdam"


def test_finished_run_is_left_alone(config, plain_run, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (plain_run / "checkpoints").rglob("*")}
    expected = metrics(plain_run)
    assert run_job(config, plain_run, EVERY_STEP) == expected
    assert f"{plain_run} has run {STEPS} steps: nothing is left to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (plain_run / "checkpoints").rglob("*")} == before


def test_half_written_checkpoint_is_ignored_and_replaced(config, plain_run, stopped_run) -> None:
    """What a crash while saving leaves does not count."""
    checkpoints = stopped_run / "checkpoints"
    (checkpoints / ".iter_0000003.partial").mkdir()
    (checkpoints / ".iter_0000003.partial" / "__0_0.distcp").write_bytes(b"half")
    (checkpoints / "iter_0000003").mkdir()  # renamed, but not recorded yet
    assert run_job(config, stopped_run, EVERY_STEP) == metrics(plain_run)
    assert {path.name for path in checkpoints.iterdir()} == {
        MARKER,
        *(f"iter_{step:07d}" for step in range(1, STEPS + 1)),
    }


def test_checkpoints_without_marker_are_not_begun_over(config, plain_run, stopped_run) -> None:
    """But for one that no marker ever named, of a first save that was interrupted."""
    checkpoints, before = stopped_run / "checkpoints", metrics(stopped_run)
    (checkpoints / MARKER).unlink()
    for failed_later in (False, True):
        if failed_later:
            (checkpoints / f".{MARKER}.partial").write_text("4\n")
        with pytest.raises(UserError, match=rf"{checkpoints} holds iter_0000002 but no {MARKER}: "):
            run_job(config, stopped_run)
    assert metrics(stopped_run) == before

    patch = pytest.MonkeyPatch()
    for interrupted in ("os.replace", "pathlib.Path.rename"):
        run = stopped_run.with_name(interrupted)
        writer = writer_of(run)
        writer._prepare()
        with patch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(interrupted, mock.Mock(side_effect=KeyboardInterrupt))
            writer._publish()
        assert latest_checkpoint(run / "checkpoints") is None
    assert (run.with_name("os.replace") / "checkpoints" / "iter_0000002").is_dir()


@pytest.mark.parametrize("broken", ["file", "link", "failing"])
def test_checkpoints_that_cannot_be_seen_are_not_begun_over(
    tmp_path: Path, monkeypatch, broken: str
) -> None:
    """None are where no directory is, and in an empty one."""
    directory = tmp_path / "checkpoints"
    assert latest_checkpoint(directory) is None
    if broken == "file":
        directory.touch()
    elif broken == "link":
        directory.symlink_to(tmp_path / "not mounted")
    else:
        directory.mkdir()
        assert latest_checkpoint(directory) is None
        stat = os.stat

        def failing(path: Any, **options: Any) -> os.stat_result:
            if Path(path).is_relative_to(directory):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return stat(path, **options)

        monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(UserError, match=rf"cannot read {directory}: (Not a d|No such|Stale)"):
        latest_checkpoint(directory)


def writer_of(run: Path, step: int = 2, **config: Any) -> CheckpointWriter:
    """Of a start that has just claimed `run`, before it saves `step`."""
    description = run / "description"
    description.mkdir(parents=True, exist_ok=True)
    (description / "architecture.json").touch()
    writer = CheckpointWriter(
        run, claim_run_directory(run), description, CheckpointConfig(**config)
    )
    writer._step = step
    return writer


def test_newest_start_has_the_run(tmp_path: Path) -> None:
    """Of two on one RUN the older neither publishes what the newer writes nor removes anything."""
    directory = tmp_path / "checkpoints"
    first = writer_of(tmp_path, keep_last=1)
    first._prepare()
    first._publish()
    first._step = 4
    first._prepare()
    second = writer_of(tmp_path, step=4)
    with pytest.raises(UserError, match=f"another start has taken over {tmp_path}"):
        first._publish()  # as complete as it is
    second._prepare()  # removes what the first was writing
    before = set(directory.rglob("*"))
    for late in (first._prepare, first._publish):
        with pytest.raises(UserError, match=f"another start has taken over {tmp_path}"):
            late()
        assert set(directory.rglob("*")) == before
    assert latest_checkpoint(directory) == directory / "iter_0000002"
    second._publish()
    assert checkpoint_names(tmp_path) == {MARKER, "iter_0000002", "iter_0000004"}


def test_start_that_is_taken_over_ends_at_its_next_save(config, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    before_step(monkeypatch, lambda step: claim_run_directory(run) if step == 2 else None)
    with pytest.raises(UserError, match=f"another start has taken over {run}"):
        run_job(config, run, EVERY_SECOND_STEP, "checkpoint.keep_last=1")
    assert checkpoint_names(run) == {MARKER, "iter_0000002"}


def test_old_checkpoint_that_cannot_be_removed_stays(tmp_path, monkeypatch, caplog) -> None:
    """As one that a process still reads over NFS. It is tried again at the next save."""
    remove, busy = shutil.rmtree, OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def rmtree(path: Path, **options: Any) -> None:
        if "iter_0000002" in path.name:
            raise busy
        remove(path, **options)

    writer = writer_of(tmp_path, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        for writer._step in (2, 4, 6):
            writer._prepare()
            writer._publish()
    assert checkpoint_names(tmp_path) == {MARKER, ".iter_0000002.old.partial", "iter_0000006"}
    assert len(caplog.messages) == 2
    assert all(re.fullmatch(r"cannot remove \S+: .* busy", text) for text in caplog.messages)
    writer._step = 8
    writer._prepare()
    writer._publish()
    assert checkpoint_names(tmp_path) == {MARKER, "iter_0000008"}


def test_checkpoint_is_on_disk_before_older_ones_are_removed(tmp_path, monkeypatch) -> None:
    writer = writer_of(tmp_path, keep_last=1)
    writer._prepare()
    writer._publish()
    writer._step = 4
    writer._prepare()
    (writer._partial / "common.pt").touch()
    done: list[str] = []

    def watched(module: Any, name: str, path_of: Callable[[Any], Any] = Path) -> None:
        call = getattr(module, name)

        def watch(first: Any, *rest: Any, **options: Any) -> Any:
            path = re.sub(r"\.[0-9a-f]{32}", "", str(path_of(first)))
            done.append(f"{name} {Path(path).relative_to(tmp_path)}")
            return call(first, *rest, **options)

        monkeypatch.setattr(module, name, watch)

    watched(os, "fsync", lambda descriptor: os.readlink(f"/proc/self/fd/{descriptor}"))
    watched(os, "replace")
    watched(Path, "rename")
    watched(shutil, "rmtree")
    writer._publish()
    new, marker = "checkpoints/.iter_0000004.partial", f"checkpoints/.{MARKER}.partial"
    parts = {f"fsync {new}/common.pt", f"fsync {new}/architecture.json", f"fsync {new}"}
    assert set(done[:3]) == parts
    assert done[2:] == [
        f"fsync {new}",
        f"fsync {marker}",
        f"rename {new}",
        f"replace {marker}",
        "fsync checkpoints",
        "rename checkpoints/iter_0000002",
        "rmtree checkpoints/.iter_0000002.old.partial",
    ]


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
    smaller = ("training.global_batch_size=2", "checkpoint.allow_other_data=true")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_job(config, stopped_run, EVERY_STEP, *smaller)
    seen: list[int] = []
    step = TrainStep.__call__

    def spy(self: TrainStep, batches: list, number: int, mode: str | None = None):
        seen.extend(index for batch in batches for index in batch.sample_index.tolist())
        return step(self, batches, number, mode)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    run_job(config, stopped_run, *smaller)
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
    with pytest.raises(UserError, match=r"another model than the run asks for: norm_eps "):
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


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_bfloat16_runs_begin_from_float32_weights(config, plain_run, tmp_path, sharded) -> None:
    """Not from what the model's bfloat16 weights have left of them: a run that learns nothing
    exports what `model.checkpoint` holds."""
    run_job(
        config,
        tmp_path / "run",
        f"model.checkpoint={plain_run / 'checkpoints'}",
        "training.dtype=bfloat16",
        f"optimizer.use_distributed_optimizer={sharded}",
        *OF_ITS_CHECKPOINT,
        *NO_LEARNING,
    )
    assert weights(tmp_path / "run", tmp_path / "found") == weights(plain_run, tmp_path / "source")
    newest = find_checkpoint(plain_run / "checkpoints")  # not what that run may save later
    kept = load_config(tmp_path / "run" / "config.yaml", [])
    assert kept.model.checkpoint == str(newest) and newest.name.startswith("iter_")


def test_original_is_not_needed_once_training_runs(golden, config, tmp_path, monkeypatch) -> None:
    """Its Hugging Face files travel on from the run's own copy, and a run begun goes on without it,
    in its own directory or another."""
    original = copy_model(golden, "gated_deltanet", tmp_path / "original")
    imported = to_checkpoint(original, tmp_path / "imported")
    before_step(monkeypatch, lambda number: shutil.rmtree(imported, ignore_errors=True))
    options = (*OF_ITS_CHECKPOINT, *write_letters(tmp_path), *NO_LEARNING)
    begun = (f"model.checkpoint={imported}", *options)
    run_job(config, tmp_path / "run", *begun)
    assert not imported.exists()
    steps = run_job(config, tmp_path / "run", *begun, f"training.steps={STEPS + 1}")
    load = f"checkpoint.load={tmp_path / 'run' / 'checkpoints'}"
    steps += run_job(config, tmp_path / "other", load, *options, f"training.steps={STEPS + 2}")
    assert column(steps, "step") == list(range(STEPS + 2))
    for run in ("run", "other"):
        exported = files(to_hf(tmp_path / run / "checkpoints", tmp_path / f"{run}-hf"))
        # the original has no tokenizer: the run's own travels with it
        assert exported.pop("tokenizer.model") == (tmp_path / "letters.model").read_bytes()
        assert b"LlamaTokenizer" in exported.pop("tokenizer_config.json")
        assert exported == files(original)


def test_saving_in_the_background(config, plain_run, tmp_path, monkeypatch) -> None:
    """Training goes on while step 2 is written, does not show in what is written, and publishes it
    once it is complete."""
    run = tmp_path / "run"
    gate = hold_writers(monkeypatch, tmp_path)
    seen = []

    def on_step(number: int) -> None:
        seen.append((f"step {number}", checkpoint_names(run)))
        if number == 3:
            gate.touch()
            wait_for_writers()

    save = CheckpointWriter.save

    def on_save(self: CheckpointWriter, progress: Progress, *parts: Any) -> None:
        seen.append((f"save {progress.step}", checkpoint_names(run)))
        save(self, progress, *parts)

    before_step(monkeypatch, on_step)
    monkeypatch.setattr(CheckpointWriter, "save", on_save)
    run_job(config, run, EVERY_SECOND_STEP, IN_BACKGROUND)
    assert seen == [
        ("step 0", set()),
        ("step 1", set()),
        ("save 2", set()),
        ("step 2", {".iter_0000002.partial"}),
        ("step 3", {".iter_0000002.partial"}),
        ("save 4", {MARKER, "iter_0000002"}),
    ]
    assert checkpoint_names(run) == {MARKER, "iter_0000002", "iter_0000004"}
    for name in ("iter_0000002", "iter_0000004"):
        assert_same_tensors(run / "checkpoints" / name, plain_run / "checkpoints" / name)


def test_run_that_ends_while_saving_leaves_nothing_to_load(
    config, plain_run, tmp_path, monkeypatch
) -> None:
    """Nor does it disturb another model's run in the same process."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        gate = hold_writers(patch, tmp_path)

        def end(number: int) -> None:
            if number == 3:
                gate.touch()
                raise KeyboardInterrupt

        before_step(patch, end)
        with pytest.raises(KeyboardInterrupt):
            run_job(
                config, run, "model.preset=tiny-gated-deltanet", EVERY_SECOND_STEP, IN_BACKGROUND
            )
    assert checkpoint_names(run) == {".iter_0000002.partial"}
    wait_for_writers(seconds=0)
    run_job(config, run)
    assert checkpoint_names(run) == {MARKER, "iter_0000004"}
    last = Path("checkpoints", "iter_0000004")
    assert_same_tensors(run / last, plain_run / last)


def test_checkpoint_directory_that_cannot_be_written(config, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    before_step(monkeypatch, lambda step: (run / "checkpoints").write_text("in the way"))
    with pytest.raises(UserError, match=r"cannot write checkpoint \S+/iter_0000004: Not a dir"):
        run_job(config, run)


def test_full_disk_of_one_rank_ends_all(config: Path, tmp_path: Path) -> None:
    run_distributed(_save_on_full_disk, 2, config, tmp_path)


def _save_on_full_disk(config: Path, directory: Path) -> None:
    rank = dist.get_rank()
    for full, size, reason in ((0, 300, r": common.pt"), (1, 20_000, r"")):
        for background in ("false", "true"):
            run = directory / f"{full}-{background}"
            with pytest.MonkeyPatch.context() as patch:
                if rank == full:
                    limit_files_while_saving(patch, size)
                with pytest.raises(UserError, match=rf"cannot write \S+ \S+/iter_0000002{reason}"):
                    run_here(
                        config,
                        run,
                        "parallel.tensor=2",
                        EVERY_SECOND_STEP,
                        f"checkpoint.async_save={background}",
                    )
            dist.barrier()
            assert checkpoint_names(run) == set()
    # There is room again.
    run_here(config, run)
    dist.barrier()
    assert checkpoint_names(run) == {MARKER, f"iter_{STEPS:07d}"}


def test_resuming_at_other_layouts(config: Path, tmp_path: Path) -> None:
    """What two ranks write, in the background or not, goes on as data parallel and on one rank,
    and begins another run with its fp32 values. Saving waits for parameters to be gathered."""
    run_distributed(_save_and_resume, 2, config, tmp_path, LAYOUTS)
    for layout in LAYOUTS:
        for sharded in (False, True):
            case = tmp_path / case_name(layout, sharded)
            run_job(config, case / "one_rank", optimizer_option(sharded))
            for run in ("data_parallel", "one_rank"):
                assert_same_metrics(metrics(case / run), metrics(case / "whole"))
    assert_same_metrics(metrics(tmp_path / "overlap"), metrics(case / "whole"))
    started, source = tmp_path / "bfloat16", tmp_path / case_name(LAYOUTS[-1], True) / "whole"
    assert weights(started, tmp_path / "found") == weights(source, tmp_path / "source")


def _save_and_resume(config: Path, directory: Path, layouts: list[tuple[int, int]]) -> None:
    for layout, sharded in itertools.product(layouts, (False, True)):
        case = directory / case_name(layout, sharded)
        tensor, pipeline = layout
        options = (
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            optimizer_option(sharded),
            EVERY_SECOND_STEP,
        )
        run_here(config, case / "whole", *options)
        run_here(config, case / "background", *options, IN_BACKGROUND)
        if dist.get_rank() == 0:
            for name in ("iter_0000002", "iter_0000004"):
                assert_same_tensors(
                    case / "background" / "checkpoints" / name,
                    case / "whole" / "checkpoints" / name,
                )
            keep_until(case / "background", 2)
            for run in ("data_parallel", "one_rank"):
                shutil.copytree(case / "background", case / run)
        dist.barrier()
        run_here(config, case / "data_parallel", optimizer_option(sharded))
    overlap = directory / "overlap"
    run_here(config, overlap, optimizer_option(True), *OVERLAP, EVERY_SECOND_STEP)
    if dist.get_rank() == 0:
        keep_until(overlap, 2)
    dist.barrier()
    run_here(config, overlap, optimizer_option(True))
    run_here(
        config,
        directory / "bfloat16",
        f"model.checkpoint={case / 'whole' / 'checkpoints'}",
        "training.dtype=bfloat16",
        optimizer_option(True),
        *OF_ITS_CHECKPOINT,
        *NO_LEARNING,
    )


def test_bfloat16_state_passes_through_other_layouts(config: Path, tmp_path: Path) -> None:
    """Saved at tensor 2, loaded at another layout and saved again: weights, float32 copies and
    moments of every family are what they were, bit for bit."""
    run_distributed(_pass_through_layouts, 2, config, tmp_path)


def _pass_through_layouts(config: Path, directory: Path) -> None:
    families = ("deltanet", "gated-deltanet", "lact")
    for family, sharded in itertools.product(families, (False, True)):
        options = (
            f"model.preset=tiny-{family}",
            "training.dtype=bfloat16",
            "training.steps=2",
            "training.micro_batch_size=1",
            optimizer_option(sharded),
        )
        first = directory / f"{family}-{sharded}"
        run_here(config, first, *options, "parallel.tensor=2")
        for layout in ("parallel.pipeline=2", "parallel.tensor=1"):
            again = directory / f"{family}-{sharded}-{layout}"
            if dist.get_rank() == 0:
                shutil.copytree(first, again)
            dist.barrier()
            run = Run(load_config(config, [f"run.directory={again}", *options, layout]))
            run._save()
            dist.barrier()
            last = Path("checkpoints", "iter_0000002")
            names = {key.rpartition(".")[2] for key in tensors_of(again / last)}
            assert {"A_log", "dt_bias"} <= names or family != "gated-deltanet"
            assert_same_tensors(again / last, first / last)
            dist.barrier()


def case_name(layout: tuple[int, int], sharded: bool) -> str:
    return f"tensor{layout[0]}-pipeline{layout[1]}-{'sharded' if sharded else 'whole'}"


def optimizer_option(sharded: bool) -> str:
    return f"optimizer.use_distributed_optimizer={str(sharded).lower()}"


def run_here(config: Path, run: Path, *overrides: str) -> None:
    """The job on the ranks that run already."""
    Run(load_config(config, [f"run.directory={run}", *overrides])).train()


def assert_same_metrics(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], of_gradients: float = 1e-5
) -> None:
    """The same draws, and the rest but for the order of summation: losses and rewards within 1e-5,
    the norm of the gradient within `of_gradients`."""
    assert column(found, "step") == column(expected, "step")
    for one, two in zip(found, expected, strict=True):
        for key in ("positions", "rollout_tokens", "lr"):
            assert one[key] == two[key], key
        for key in ("loss_ntp", "loss_policy", "reward_mean", "grad_norm"):
            limit = of_gradients if key == "grad_norm" else 1e-5
            close = None if two[key] is None else pytest.approx(two[key], rel=limit, abs=1e-6)
            assert one[key] == close, key


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same weights and optimizer state, bit for bit."""
    one, two = tensors_of(found), tensors_of(expected)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in two)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(checkpoint)
    tensors = {}
    for key, stored in read_metadata(checkpoint).state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            tensors[key] = torch.empty(reader.shape(key), dtype=reader.dtype(key))
            reader.read_rows(key, 0, tensors[key])
    return tensors


def checkpoint_names(run: Path) -> set[str]:
    """Without the claims in the names of partial ones."""
    directory = run / "checkpoints"
    found = directory.iterdir() if directory.exists() else ()
    return {re.sub(r"\.[0-9a-f]{32}\.", ".", path.name) for path in found}


def hold_writers(patch: pytest.MonkeyPatch, directory: Path) -> Path:
    """Let no process write tensors before the file exists that this returns."""
    gate = directory / "gate"
    write = FileSystemWriterAsync.write_preloaded_data

    def held(*args: Any, **options: Any) -> None:
        wait_until(gate.exists, 30)
        write(*args, **options)

    patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(held))
    return gate


def wait_for_writers(seconds: float = 30) -> None:
    """Until no process is writing a checkpoint; the manager of Megatron's results stays."""
    wait_until(
        lambda: all(
            child.name.startswith("SyncManager") for child in multiprocessing.active_children()
        ),
        seconds,
    )


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def limit_files_while_saving(patch: pytest.MonkeyPatch, size: int) -> None:
    """Let no file of a checkpoint grow beyond `size` bytes, as if the disk were full."""
    save = CheckpointWriter.save

    def limited(*args: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(CheckpointWriter, "save", limited)
