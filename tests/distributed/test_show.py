"""The main job on two stages: metrics of the run, and the rollouts shown at its end, are those of a
single process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from refine_mcore import platform
from tests.distributed.harness import run_distributed
from tests.training.jobs import metrics, run_job, write_config

STEPS = "training.steps=2"


def test_two_stages_give_the_run_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    expected = run_job(config, tmp_path / "one", STEPS)
    shown, _, _ = capsys.readouterr().out.partition("metrics  ")
    assert shown.count("    rollout  ") == 3
    run_distributed(_job_on_two_stages, 2, config, tmp_path)
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(2)]
    assert "".join(said).count(shown) == 1
    for one, two in zip(expected, metrics(tmp_path / "two"), strict=True):
        for key, value in one.items():
            assert two[key] == (pytest.approx(value, abs=1e-5) if type(value) is float else value)


def _job_on_two_stages(config: Path, directory: Path) -> None:
    """The job on the ranks that run already, and what each of them says."""
    said = io.StringIO()
    with (
        mock.patch.multiple(platform, init_distributed=mock.DEFAULT, shutdown=mock.DEFAULT),
        contextlib.redirect_stdout(said),
    ):
        run_job(config, directory / "two", STEPS, "parallel.pipeline=2")
    (directory / f"said{dist.get_rank()}").write_text(said.getvalue())
