"""Metrics of a run: one JSON line a step, exact on resume, and hashes that identify integers."""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refine_mcore.config import RunConfig, TrainingConfig
from refine_mcore.errors import UserError
from refine_mcore.training.metrics import MetricsWriter, StepMetrics, short_hash

NTP = StepMetrics(
    step=0, loss_ntp=3.25, grad_norm=1.5, lr=1e-3, tokens_per_second=12345.6, step_seconds=0.5
)
REFINE = replace(
    NTP,
    loss_policy=-0.1,
    reward_mean=0.5,
    reward_std=0.25,
    entropy_mean=2.0,
    clip_fraction=0.0,
    log_prob_drift=0.0,
    positions="0123456789ab",
    rollout_tokens="ba9876543210",
)


def read(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def writer_of(
    run: Path,
    steps: int,
    first_step: int = 0,
    *,
    tensorboard: bool = False,
    progress: bool = False,
    log_interval: int = 1,
) -> MetricsWriter:
    shown = RunConfig(tensorboard=tensorboard, progress=progress)
    training = TrainingConfig(steps=steps, log_interval=log_interval)
    return MetricsWriter(run, shown, training, first_step)


def quiet(run: Path, first_step: int = 0) -> closing[MetricsWriter]:
    return closing(writer_of(run, 9, first_step))


def test_a_line_a_step_with_nulls_before_refine(tmp_path):
    with quiet(tmp_path) as writer:
        writer.write(NTP)
        writer.write(replace(REFINE, step=1))
        assert len(read(tmp_path)) == 2  # on disk at once, for those who follow the file
    warm_up, refine = read(tmp_path)
    assert list(warm_up) == list(refine)
    assert set(warm_up) >= {
        *("step", "loss_ntp", "loss_policy", "reward_mean", "reward_std", "entropy_mean"),
        *("clip_fraction", "grad_norm", "lr", "tokens_per_second", "step_seconds"),
        *("positions", "rollout_tokens"),
    }
    assert (warm_up["loss_ntp"], warm_up["reward_mean"], warm_up["positions"]) == (3.25, None, None)
    assert (refine["step"], refine["reward_mean"]) == (1, 0.5)


def test_resume_drops_the_steps_that_are_done_again(tmp_path):
    with quiet(tmp_path) as writer:
        for step in range(5):
            writer.write(replace(NTP, step=step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss_n')  # as a crash leaves it
    with quiet(tmp_path, first_step=3) as writer:
        assert [line["step"] for line in read(tmp_path)] == [0, 1, 2]
        writer.write(replace(NTP, step=3, loss_ntp=1.0))
    assert [(line["step"], line["loss_ntp"]) for line in read(tmp_path)][2:] == [(2, 3.25), (3, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_crash_in_the_middle_of_a_line_costs_that_line_only(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "lo')
    with quiet(tmp_path, first_step=2) as writer:
        writer.write(replace(NTP, step=2))
    assert [line["step"] for line in read(tmp_path)] == [0, 2]


def test_tensorboard_holds_the_numbers_and_purges_on_resume(tmp_path):
    for first_step, steps, loss in ((0, range(4), 3.0), (2, range(2, 5), 1.0)):
        with closing(writer_of(tmp_path, 5, first_step, tensorboard=True)) as writer:
            for step in steps:
                writer.write(replace(REFINE, step=step, loss_ntp=loss))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss_ntp")]
    assert losses == [(0, 3.0), (1, 3.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    assert "reward_mean" in events.Tags()["scalars"]
    assert "positions" not in events.Tags()["scalars"]


def test_log_lines_where_there_is_no_terminal(tmp_path, capsys):
    with closing(writer_of(tmp_path, 5, progress=True, log_interval=2)) as writer:
        for step in range(5):
            held_out = {"evaluation/loss": 2.5, "evaluation/loss/64": 3.0} if step == 2 else None
            writer.write(replace(NTP if step < 3 else REFINE, step=step), held_out)
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop(1) == "evaluation after step 3 | loss 2.5000"
    assert [line.split(" | ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    assert lines[0].startswith("step 2/5 | NTP loss 3.2500 | 12,346 tokens/s | ETA 00:0")
    assert "| reward 0.5000 |" in lines[1]


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with closing(writer_of(tmp_path, 4, 2, progress=True)) as writer:
        writer.write(replace(REFINE, step=2))
        writer.write(replace(REFINE, step=3))
    text = capsys.readouterr().err
    assert "4/4" in text and "\n" not in text.strip()
    assert "NTP loss 3.2500 | reward 0.5000 | 12,346 tokens/s" in text


def test_silence_when_progress_is_off(tmp_path, capsys):
    with quiet(tmp_path) as writer:
        writer.write(NTP)
    assert capsys.readouterr().err == ""


def test_unwritable_directory(tmp_path):
    with pytest.raises(UserError, match="cannot write metrics in .*/absent: No such file"):
        quiet(tmp_path / "absent")


def test_full_disk_ends_a_run_with_a_sentence(tmp_path, caplog):
    """That of the write, which closing logs and does not cover."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sentence = f"cannot write metrics in {tmp_path}: File too large"
    writer = writer_of(tmp_path, 9)
    writer.write(NTP)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(UserError, match=sentence), closing(writer):
            writer.write(replace(NTP, step=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.messages == [sentence]


def test_events_that_cannot_be_written_end_a_run_with_a_sentence(tmp_path, monkeypatch):
    """They are written in another thread, whose error comes up in a later call."""
    writer = writer_of(tmp_path, 9, tensorboard=True)
    failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for call in ("add_scalar", "close"):
        monkeypatch.setattr(writer._events, call, mock.Mock(side_effect=failure))
    sentence = f"cannot write metrics in {tmp_path}: No space left"
    with pytest.raises(UserError, match=sentence), closing(writer):
        writer.write(NTP)


def test_short_hash_is_that_of_the_integers():
    values = torch.tensor([[1, 2, 3], [4, 5, 6]])
    # The first 12 digits of: printf of the six as little-endian int64 | sha256sum
    assert short_hash(values) == "5f544d51f461"
    assert short_hash(values.to(torch.int32)) == short_hash(values)
    assert short_hash(values.t().contiguous().t()) == short_hash(values)
    assert short_hash(values.flip(0)) != short_hash(values)
    assert short_hash(values + 2**40) != short_hash(values)
