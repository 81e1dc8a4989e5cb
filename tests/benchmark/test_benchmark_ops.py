"""The benchmark of single operations: its table, and that a form that is wrong gets no time."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from refine_kernels import dispatch

from refine_mcore.benchmark import ops
from refine_mcore.errors import UserError
from refine_mcore.models.presets import preset
from tools.benchmark_ops import main

CPU = torch.device("cpu")


def test_every_operation_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ops.json"
    options = ["--device", "cpu", "--tokens", "192", "--rounds", "1", "--dtype", "float32"]
    main(["--json", str(output), "--shapes", "tiny-deltanet,tiny-lact", *options])
    report = json.loads(output.read_text())
    assert {row["operation"] for row in report["rows"]} == set(ops.OPERATIONS)
    for row in report["rows"]:
        assert row["why"] is None and row["error"] == 0.0 and row["forward"] > 0
        assert (row["both"] is None) == (row["operation"] in ("decode", "branch_decode"))
    assert report["copy_bytes_per_second"] > 0 and "torch" in report["versions"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(report["rows"])
    assert all(line.count("|") == 10 for line in table)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_a_wrong_form_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from refine_kernels.swiglu import triton_swiglu

    monkeypatch.setattr(triton_swiglu, "refusal", lambda x: None)
    monkeypatch.setattr(triton_swiglu, "swiglu", lambda x: 1.01 * x[..., : x.shape[-1] // 2])
    case = ops.case_of("swiglu", preset("tiny-deltanet"), 8)
    assert case is not None
    rows = ops.measure(case, 8, torch.float32, CPU, ["torch", "triton", "fla"], 1)
    assert [row.form for row in rows] == ["torch", "triton"]  # fla has none
    assert rows[0].why is None and rows[0].forward is not None
    assert rows[1].why == "differs from torch's" and rows[1].forward is None
    assert dispatch.backend("swiglu", "cpu") == "torch"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--operations", "attends"], "--operations knows .*, not 'attends'"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--tokens", "some"], "--tokens takes whole numbers"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--shapes", "none"], "none"),
    ],
)
def test_what_it_does_not_take(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main(["--json", str(tmp_path / "ops.json"), "--device", "cpu", *options])
    assert list(tmp_path.iterdir()) == []
