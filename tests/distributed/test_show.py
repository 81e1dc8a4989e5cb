"""The main job on two stages: metrics of the run, and the rollouts shown at its end, are those of a
single process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launcher import MAIN_JOB, run_nodes
from tests.training.jobs import metrics, run_job, write_config


def test_two_stages_give_the_run_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, steps = write_config(tmp_path), "training.steps=2"
    expected = run_job(config, tmp_path / "one", steps)
    shown, _, _ = capsys.readouterr().out.partition("metrics  ")
    assert shown.count("    rollout  ") == 3
    job = (MAIN_JOB, "--config", config, f"run.directory={tmp_path / 'two'}", steps)
    (done,) = run_nodes(1, 2, *job, "parallel.pipeline=2", timeout=120)
    assert done.code == 0, done.output
    assert done.output.count(shown) == 1
    for one, two in zip(expected, metrics(tmp_path / "two"), strict=True):
        for key, value in one.items():
            assert two[key] == (pytest.approx(value, abs=1e-5) if type(value) is float else value)
