"""How a run meets what would end it: steps without a finite gradient, and signals."""

from __future__ import annotations

import logging
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from refine_mcore import platform
from refine_mcore.config import load_config
from refine_mcore.conversion.description import find_checkpoint
from refine_mcore.errors import UserError
from refine_mcore.pipeline import head
from refine_mcore.step import refine_loss
from refine_mcore.training import loop, setup
from refine_mcore.training.stop import SIGNALS
from tests.distributed.harness import run_distributed
from tests.training.jobs import STEPS, column, metrics, run_job, write_config
from tests.training.test_checkpointing import (
    EVERY_STEP,
    IN_BACKGROUND,
    assert_same_tensors,
    before_step,
    checkpoint_names,
    tensors_of,
)

MARKER = "latest_checkpointed_iteration.txt"
LAST = f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def plain_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that kept a checkpoint of every step."""
    run = tmp_path_factory.mktemp("plain") / "run"
    run_job(config, run, EVERY_STEP)
    return run


def spoil(patch: pytest.MonkeyPatch, steps: set[int], kind: str, call: int = 0) -> None:
    """In these steps call number `call` of the next-token loss gives a NaN; of the two, the other
    stays finite."""
    now = {"step": -1, "call": 0}
    before_step(patch, lambda number: now.update(step=number, call=0))
    ntp_loss = head.ntp_loss

    def spoilt(*args: Any) -> Tensor:
        loss, here = ntp_loss(*args), now["step"] in steps and now["call"] == call
        now["call"] += 1
        if not here:
            return loss
        if kind == "gradient":
            return loss + (loss - loss.detach()).sqrt()  # 0, of infinite slope
        return refine_loss._told_by_gradient(loss + torch.nan)

    patch.setattr(head, "ntp_loss", spoilt)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("optimizer.clip_grad=0", "optimizer.use_distributed_optimizer=true"),
        ("training.dtype=bfloat16", "training.micro_batch_size=4"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_step_without_a_finite_gradient_is_skipped(
    config: Path, tmp_path: Path, monkeypatch, caplog, kind: str, options: tuple[str, ...]
) -> None:
    """Weights and moments stay, Adam does not count; the data and the learning rate go on."""
    spoil(monkeypatch, {2}, kind)
    steps = run_job(config, tmp_path / "run", EVERY_STEP, *options)
    assert column(steps, "skipped_steps") == [0, 0, 1, 0]
    assert (steps[2]["loss_ntp"] is None) == (kind == "loss")
    assert steps[2]["grad_norm"] is None
    assert column(steps, "lr") == pytest.approx([0, 1e-3, 0.75e-3, 0.25e-3])
    before, skipped, after = (tmp_path / "run" / "checkpoints" / f"iter_{n:07d}" for n in (2, 3, 4))
    assert_same_tensors(skipped, before)
    assert adam_steps(before) == adam_steps(skipped) == {2.0}
    assert adam_steps(after) == {3.0}
    assert all(bool(t.isfinite().all()) for t in tensors_of(after).values())
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("step 2: ") and warning.endswith("samples 8 to 11")


def adam_steps(checkpoint: Path) -> set[float]:
    """What the optimizer has counted, of all parameters."""
    common = torch.load(checkpoint / "common.pt", weights_only=False)["optimizer"]
    found = set()

    def search(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("step", "common_step"):
                    found.add(float(item))
                search(item)
        elif isinstance(value, list | tuple):
            for item in value:
                search(item)

    search(common)
    return found


def test_every_optimizer_step_of_a_batch_is_judged(config: Path, tmp_path, monkeypatch) -> None:
    """Of two per batch the second of one and the first of the next are two in a row."""
    options = ("refine.mode=two_phase", "refine.mini_batch_size=2", "training.ntp_warmup_steps=0")
    with monkeypatch.context() as patch:
        spoil(patch, {1}, "loss", call=1)
        steps = run_job(config, tmp_path / "one", *options, "training.max_skipped_steps=1")
    assert column(steps, "skipped_steps") == [0, 1, 0, 0]
    spoil(monkeypatch, {1}, "loss", call=1)
    with pytest.raises(UserError, match=r"diverged: 1 optimizer steps in a row, up to step 1,"):
        run_job(config, tmp_path / "none", *options, "training.max_skipped_steps=0")


@pytest.mark.parametrize(
    "options", [(), ("optimizer.use_distributed_optimizer=true",)], ids=["whole", "sharded"]
)
def test_too_many_in_a_row_end_the_run(config, tmp_path, monkeypatch, options) -> None:
    """With a checkpoint of the weights as they were, from which the run goes on, be it that it
    never made a step."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, {0, 1, 2}, "gradient")
        with pytest.raises(UserError, match=r"3 optimizer steps in a row, up to step 2, .* saved"):
            run_job(config, run, "training.max_skipped_steps=2", *options)
    assert column(metrics(run), "skipped_steps") == [1, 1, 1]
    assert checkpoint_names(run) == {MARKER, "iter_0000003"}
    steps = run_job(config, run, *options)
    assert column(steps, "skipped_steps") == [1, 1, 1, 0]
    assert adam_steps(run / "checkpoints" / LAST) == {1.0}


@pytest.mark.parametrize("mode", ["fused", "two_phase", "prefix_copy", "fused in slices"])
def test_activations_that_overflow_are_met_in_every_mode(
    config: Path, tmp_path: Path, monkeypatch, mode: str
) -> None:
    """Positions, rollouts and rewards of nothing but NaNs break nothing else."""
    number = {"step": -1}
    before_step(monkeypatch, lambda step: number.update(step=step))
    logits = setup.training_model

    def model(*args: Any) -> Any:
        built = logits(*args)
        built.register_forward_hook(
            lambda module, inputs, out: spoil_output(out) if number["step"] == 2 else None
        )
        return built

    monkeypatch.setattr(setup, "training_model", model)
    slices = ("parallel.slices=2",) if "slices" in mode else ()
    steps = run_job(config, tmp_path / "run", f"refine.mode={mode.split()[0]}", *slices)
    assert column(steps, "skipped_steps") == [0, 0, 1, 0]


def spoil_output(out: Any) -> None:
    out.hidden.data.fill_(torch.nan)


@pytest.mark.parametrize("options", [(), (IN_BACKGROUND,)], ids=["", "background"])
def test_signal_ends_a_run_after_its_step(
    config, plain_run, tmp_path, monkeypatch, caplog, options
) -> None:
    """It saves, and goes on later as if it had not been stopped. Helper processes get SIGTERM too,
    as torchrun sends it. Handlers are put back."""
    caplog.set_level(logging.INFO, "refine_mcore")
    run = tmp_path / "run"
    kept = {number: signal.getsignal(number) for number in SIGNALS}

    def tell(number: int) -> None:
        if number == stop:
            helpers = psutil.Process().children(recursive=True) if sent == signal.SIGTERM else ()
            for process in (*helpers, psutil.Process()):
                process.send_signal(sent)

    for stop, sent, interval in ((1, signal.SIGTERM, 1), (2, signal.SIGUSR1, STEPS)):
        with monkeypatch.context() as patch:
            before_step(patch, tell)
            run_job(config, run, *options, f"checkpoint.save_interval={interval}")
        assert find_checkpoint(run / "checkpoints").name == f"iter_{stop + 1:07d}"
        assert f"{sent.name}: ended with {stop + 1} of {STEPS} steps done" in caplog.text
        assert {number: signal.getsignal(number) for number in SIGNALS} == kept
    assert run_job(config, run) == metrics(plain_run)


def test_second_signal_does_what_it_did_before(config, tmp_path, monkeypatch) -> None:
    received: list[int] = []
    kept = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in SIGNALS
    }
    try:
        before_step(monkeypatch, lambda step: list(map(signal.raise_signal, SIGNALS)))
        run_job(config, tmp_path / "run")
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert len(metrics(tmp_path / "run")) == 1
    assert received == [SIGNALS[1]]


def test_ranks_agree(config: Path, plain_run: Path, tmp_path: Path) -> None:
    """On a signal that one of them got, on the checkpoint to resume, which they see differently,
    and on a loss that is not finite on one of them alone."""
    run_distributed(_train_together, 2, config, tmp_path)
    found = metrics(tmp_path / "run")
    for one, two in zip(metrics(plain_run), found, strict=True):
        assert (one["positions"], one["lr"]) == (two["positions"], two["lr"])
        assert two["loss_ntp"] == pytest.approx(one["loss_ntp"], abs=1e-5)
    for run in ("whole", "sharded", "tensor"):
        assert column(metrics(tmp_path / run), "skipped_steps") == [0, 0, 1, 0]


def _train_together(config: Path, directory: Path) -> None:
    second = dist.get_rank() == 1
    run = directory / "run"
    with pytest.MonkeyPatch.context() as patch:
        if second:
            before_step(patch, lambda n: signal.raise_signal(signal.SIGTERM) if n == 1 else None)
        train_here(config, run)
    assert checkpoint_names(run) == {MARKER, "iter_0000002"}
    with pytest.MonkeyPatch.context() as patch:
        if second:
            patch.setattr("refine_mcore.training.setup.latest_checkpoint", lambda directory: None)
        train_here(config, run)
    for name, option in (
        ("whole", "parallel.tensor=1"),
        ("sharded", "optimizer.use_distributed_optimizer=true"),
        ("tensor", "parallel.tensor=2"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if second or name == "tensor":
                spoil(patch, {2}, "loss" if name == "sharded" else "gradient")
            train_here(config, directory / name, option)


def train_here(config: Path, run: Path, *overrides: str) -> None:
    """The whole job, on ranks that have met already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "distributed", lambda timeout: nullcontext())
        loop.train(load_config(config, [f"run.directory={run}", *overrides]))
    dist.barrier()
