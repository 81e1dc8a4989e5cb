"""What the benchmarks report, on models too small for the figures to mean anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refine_mcore.benchmark import pipeline, whole_texts
from refine_mcore.config import Config, load_config
from refine_mcore.errors import UserError
from tests.distributed.harness import run_distributed
from tests.training.jobs import write_config
from tools.benchmark_step import main


def test_modes_of_the_step_on_whole_texts(tmp_path: Path, capsys: Any, single_rank: Any) -> None:
    config = load_config(write_config(tmp_path), ["training.global_batch_size=2"])
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
    for mode, row in rows.items():
        passes = {"ntp": {"forward", "backward"}, "prefix_copy": set()}.get(
            mode, {"forward", "decode", "score", "backward"}
        )
        assert row["parts"].keys() == passes | {"rest"}
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert all(spent > 0 for spent in row["parts"].values())


def test_recomputation_beside_the_plain_step(tmp_path: Path, single_rank: Any) -> None:
    """Compared at the same weights: each setting trains its own in the rounds."""
    learns = ["optimizer.lr_warmup_steps=0", "optimizer.lr=1e-2"]
    overrides = ["training.global_batch_size=2", "parallel.slices=4", *learns]
    config = load_config(write_config(tmp_path), overrides)
    variants = ["ntp", "fused", "fused/selective", "fused/full"]
    benches = whole_texts._benches(config, variants)
    assert len({id(bench.groups) for bench in benches.values()}) == 1  # none has closed another's
    rows = whole_texts.measure(config, variants, rounds=1)["modes"]
    assert rows["fused/selective"]["gradient_difference"] == 0.0
    assert rows["fused/full"]["gradient_difference"] < 1e-5
    assert rows["fused"]["gradient_difference"] is None


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, single_rank: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(tmp_path), ["training.global_batch_size=2"])
    calls, measured = [], whole_texts.pass_seconds

    def interrupted(*arguments: Any) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 6:  # two first steps, one round, half of the next
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(whole_texts, "pass_seconds", interrupted)
    rows = whole_texts.measure(config, ["ntp", "fused"], rounds=5)["modes"]
    assert [row["rounds"] for row in rows.values()] == [2, 1]


def test_the_curve_over_lengths(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out.json"
    options = ["--json", str(output), "--modes", "ntp,fused", "--rounds", "1"]
    lengths = ["--sequence-lengths", "48,64"]
    main(["--config", str(write_config(tmp_path)), *options, *lengths])
    curve = json.loads(output.read_text())["curve"]
    assert [point["sequence_length"] for point in curve] == [48, 64]
    assert all(point["modes"]["fused"]["peak_memory_bytes"] > 1e6 for point in curve)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown[2:]] == ["48", "64"]


def test_the_command_on_one_rank(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "out.json"
    options = ["--json", str(output), "--modes", "ntp,fused", "--rounds", "1"]
    main(["--config", str(write_config(tmp_path)), *options])
    report = json.loads(output.read_text())
    assert list(report["modes"]) == ["ntp", "fused"]
    # of a process of its own: the other mode's and what was there before the model do not count
    assert all(1e6 < row["peak_memory_bytes"] < 1e9 for row in report["modes"].values())
    assert report["config"]["data"]["sequence_length"] == 64
    assert {"python", "torch", "megatron-core"} <= report["versions"].keys()
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--modes", "fused"], "--modes must include ntp"),
        (["--modes", "ntp,nope"], "unknown mode 'nope', known: ntp, fused, two_phase, prefix_copy"),
        (
            ["model.preset=null", "model.overrides={}", "checkpoint.load=nowhere"],
            "model.preset or model.checkpoint must be given",
        ),
        (["parallel.tensor=2"], "measures one rank, or a pipeline"),
        (["training.recompute=full"], "recomputation by mode, as --modes ntp,fused,fused/full"),
        (
            ["--sequence-lengths", "64,8"],
            r"sequence_length \(8\) is shorter than refine.margin",
        ),
        (
            ["refine.mode=ntp", "refine.rollout_tokens=30", "refine.margin_right=20"],
            r"refine.rollout_tokens \(30\) exceeds refine.margin_right \(20\)",
        ),
        (["--sequence-lengths", "64,no"], "must be whole numbers above 0, not '64,no'"),
        (["--json", "nowhere/out.json"], "nowhere is no directory to write out.json to"),
    ],
)
def test_what_the_command_refuses(options: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(UserError, match=message):
        main(["--config", str(write_config(tmp_path)), "--json", str(output), *options])
    assert not output.exists()


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
