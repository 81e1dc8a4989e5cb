"""What the benchmarks report, on models too small for the figures to mean anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from refine_mcore.benchmark import pipeline, whole_texts
from refine_mcore.config import Config, load_config
from tests.distributed.harness import run_distributed
from tests.training.jobs import write_config


def test_modes_of_the_step_on_whole_texts(tmp_path: Path, capsys: Any, single_rank: Any) -> None:
    config = load_config(write_config(tmp_path), [])
    modes = list(whole_texts.MODES)
    report = whole_texts.measure(config, modes, rounds=2)
    for mode in modes:
        report["modes"][mode]["peak_memory_bytes"] = 1
    whole_texts.print_table(report)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == modes
    rows = report["modes"]
    assert rows["ntp"]["ratio_to_ntp"] == 1.0 and rows["ntp"]["gradient_difference"] is None
    assert rows["two_phase"]["gradient_difference"] < 1e-5
    assert 0 < rows["prefix_copy"]["gradient_difference"] < 1e-4
    assert {"text forward", "decode", "score"} <= rows["fused"]["parts"].keys()


def test_pipeline_beside_its_plan(tmp_path: Path) -> None:
    overrides = ["parallel.pipeline=2", "parallel.slices=4", "training.micro_batch_size=1"]
    run_distributed(_measure_pipeline, 2, load_config(write_config(tmp_path), overrides))


def _measure_pipeline(config: Config) -> None:
    rows = pipeline.measure(config, list(pipeline.MODES), rounds=2)["modes"]
    assert [rows[mode]["slices"] for mode in pipeline.MODES] == [1, 4, 4]
    assert rows["1f1b"]["gradient_difference"] == 0.0  # the engine on whole sequences
    assert all(row["gradient_difference"] < 1e-5 for row in rows.values())
    assert rows["1f1b"]["ratio_to_1f1b"] == rows["1f1b"]["predicted_ratio"] == 1.0
    for mode, row in rows.items():
        costs = row["pass_seconds"]
        assert (costs["decode"] > 0 and costs["scoring"] > 0) == (mode == "fused")
        assert 0 < 2 * costs["forward"] < row["predicted_seconds"]
        assert all(0 <= bubble < 1 for bubble in row["predicted_bubble"])
