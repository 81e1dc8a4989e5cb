"""The checks for a GPU machine, here in tiny on the CPU: that they pass, and that what is broken
makes them fail."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from refine_kernels import dispatch

from refine_mcore import platform
from refine_mcore.benchmark.gpu_check import host_waits, run
from refine_mcore.benchmark.gpu_check.cost import layers_that_fit
from refine_mcore.benchmark.gpu_check.jobs import PLANNED_WAITS, Texts
from refine_mcore.benchmark.gpu_check.op_cases import TINY, op_cases
from refine_mcore.benchmark.gpu_check.ops import differences_of, operations
from refine_mcore.benchmark.gpu_check.results import FAIL, PASS, Result, compared
from refine_mcore.benchmark.gpu_check.worker import Workers
from refine_mcore.errors import UserError
from refine_mcore.models.delta_rule_state import DeltaRuleTape
from refine_mcore.rollout import decode
from tests.distributed.launcher import run_programs
from tests.training.jobs import ROOT
from tools.gpu_check import SECTIONS, main

DEVICE = platform.device().type


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The command hides GPUs from a check on the CPU, for good."""
    with mock.patch.dict(os.environ):
        yield


def test_everything_passes_in_tiny_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "check.json"
    command = (sys.executable, "tools/gpu_check.py", "--device", "cpu", "--json", output)
    (finished,) = run_programs([command], timeout=250)
    assert finished.code == 0, finished.output
    report = json.loads(output.read_text())
    results = report["results"]
    assert {result["section"] for result in results} == set(SECTIONS) == set(report["seconds"])
    absent = [result for result in results if result["status"] not in (PASS, FAIL)]
    # libraries that are not installed, and what only a GPU has
    elsewhere = [result["check"] for result in absent if result["section"] != "machine"]
    assert elsewhere == ["decode passes as CUDA graphs"]
    checks = [result["check"] for result in results]
    assert set(operations()) <= set(checks)
    assert checks.count("lact") == 3 and {"TP 2, lact", "PP 2, lact", "DP 2, lact"} <= set(checks)
    assert sum(result["section"] == "models" for result in results) == 9
    table = [line for line in finished.output.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(results)  # under its heading
    assert report["versions"]["torch"] == torch.__version__


def _failing_run(tmp_path: Path, section: str) -> list[dict[str, Any]]:
    """The failed results of a run of one section that must exit with 1."""
    output = tmp_path / "check.json"
    with pytest.raises(SystemExit) as ended:
        main(["--device", DEVICE, "--only", section, "--json", str(output)])
    assert ended.value.code == 1
    report = json.loads(output.read_text())
    failed = [result for result in report["results"] if result["status"] == FAIL]
    assert len(failed) == report["failed"]
    return failed


def test_a_wrong_operation_fails(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    right = dispatch.rms_norm

    def without_gain_in_the_gate(
        x: Any, weight: Any, eps: float, gate: Any = None, base: Any = None
    ) -> Any:
        return right(x, weight, eps, None if gate is None else gate * 1.05, base)

    monkeypatch.setattr(dispatch, "rms_norm", without_gain_in_the_gate)
    (failed,) = _failing_run(tmp_path, "operations")
    assert failed["check"] == "rms_norm" and "gate" in failed["found"]
    assert "| operations | rms_norm | fail | off: " in capsys.readouterr().out


def test_an_operation_without_a_case_fails(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "__all__", [*dispatch.__all__, "new_operation"])
    monkeypatch.setattr(dispatch, "new_operation", torch.relu, raising=False)
    (failed,) = _failing_run(tmp_path, "operations")
    assert failed["found"] == "no case in op_cases.py for new_operation"


def _wrong_gradient(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation with the same values and gradients of 1.01 times the size."""

    def grown(x: Any) -> Any:
        if isinstance(x, tuple | list):
            return getattr(x, "_make", tuple)(map(grown, x))
        traced = isinstance(x, torch.Tensor) and x.requires_grad
        return x + 0.01 * (x - x.detach()) if traced else x

    return lambda *args, **options: grown(operation(*args, **options))


@pytest.mark.parametrize("break_it", [_wrong_gradient, torch.no_grad()], ids=["wrong", "none"])
@pytest.mark.parametrize(
    "name", ["chunk_delta_rule", "recurrent_gated_delta_rule", "swiglu", "causal_conv1d"]
)
def test_a_wrong_gradient_fails(name: str, break_it: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, name, break_it(getattr(dispatch, name)))
    for case in op_cases(TINY)[name]:
        if case.without_gradient:
            continue
        for dtype in case.dtypes:
            differences = differences_of(case, dtype, platform.device())
            assert any("gradient" in d.what for d in differences if not d.holds), (case, dtype)


def test_every_case_has_a_limit_that_tells_right_from_wrong() -> None:
    for cases in op_cases(TINY).values():
        for case in cases:
            assert case.limit(torch.float32) < 1e-2
            assert case.limit(torch.bfloat16) < 0.1


def test_other_rollouts_than_the_cpu_draws_fail(tmp_path: Path, monkeypatch: Any) -> None:
    right = decode.sample_tokens
    monkeypatch.setattr(
        decode, "sample_tokens", lambda logits, keys, **options: right(logits, None, **options)
    )
    failed = _failing_run(tmp_path, "steps")
    assert [result["check"] for result in failed] == [
        "deltanet",
        "gated-deltanet",
        "lact",
        "hybrid",
    ]
    assert all("metric.rollout_tokens" in result["found"] for result in failed)


def test_branches_from_the_wrong_state_fail(tmp_path: Path, monkeypatch: Any) -> None:
    right = DeltaRuleTape.at
    monkeypatch.setattr(
        DeltaRuleTape,
        "at",
        lambda tape, texts, offsets: right(tape, texts, [offsets[0]] * len(offsets)),
    )
    failed = _failing_run(tmp_path, "branching")
    assert [result["check"] for result in failed] == ["deltanet", "gated-deltanet", "hybrid"]
    assert all("gradient.decoder.layers" in result["found"] for result in failed)


def test_a_wait_that_is_not_planned_fails(tmp_path: Path, monkeypatch: Any) -> None:
    right = decode.sample_tokens

    def waiting(logits: Any, keys: Any, **options: Any) -> Any:
        tokens = right(logits, keys, **options)
        assert tokens.max().item() >= 0
        return tokens

    monkeypatch.setattr(decode, "sample_tokens", waiting)
    failed = _failing_run(tmp_path, "waits")
    assert len(failed) == 4
    # four tokens in each of two micro-batches; of the stack the project's own line is named
    assert "waits that are not planned: 8 x " in failed[0]["found"]
    assert "rollout/decode.py:" in failed[0]["found"]


def _bring_to_host(function: str) -> host_waits.Wait:
    """The stack of a read within `function` of a file that plans one."""
    plan = next(plan for plan in PLANNED_WAITS if plan.function == function)
    code = compile(f"def {function}(x): return x.item()", f"/refine_mcore/{plan.file}", "exec")
    names: dict[str, Any] = {}
    exec(code, names)
    with host_waits.host_waits() as waits:
        names[function](torch.ones((), device=platform.device()))
    (wait,) = waits
    return wait


def test_planned_waits_are_counted() -> None:
    wait = _bring_to_host("choose_branches")
    assert host_waits.judged("x", [wait] * 3, 3).status == PASS
    more = host_waits.judged("x", [wait] * 4, 3)
    assert more.status == FAIL and "step/refine_loss.py:1" in more.found
    # who does not see the wait that is always there sees none
    fewer = host_waits.judged("x", [wait] * 2, 3)
    assert fewer.status == FAIL and "did not see every wait for positions" in fewer.found


def test_picking_by_a_mask_is_a_wait() -> None:
    x = torch.arange(4, device=platform.device())
    with host_waits.host_waits() as waits:
        x.masked_fill(x > 1, 0).sum()
        assert not waits
        x[x > 1]
    assert len(waits) == 1 and waits[0][-1].filename == __file__


def test_what_torch_says_of_waits_is_noted_with_its_place() -> None:
    waits: list[host_waits.Wait] = []
    with warnings.catch_warnings(record=True) as shown:
        with host_waits.noting_warnings(waits):
            for _ in range(2):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert len(shown) == 1
    assert [wait[-1].name for wait in waits] == [
        "test_what_torch_says_of_waits_is_noted_with_its_place"
    ] * 2


def test_a_rank_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    texts = Texts(ROOT, tmp_path)
    with (
        Workers(texts, ["no such layout"], ranks=1, hide_gpus=True) as ranks,
        pytest.raises(RuntimeError, match="rank 0 failed: .*KeyError: 'no such layout'"),
    ):
        ranks.join()


def test_a_section_that_raises_has_failed_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def raising() -> Iterator[Result]:
        yield Result("first", PASS, "here")
        raise RuntimeError("out of luck\nand more")

    def fine() -> Iterator[Result]:
        yield Result("last", PASS, "a | b")

    found = {"steps": raising, "cost": fine}
    monkeypatch.setattr(run, "sections", lambda root, scratch: found)
    assert not run.run_checks(ROOT, list(found), tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["check"], row["status"]) for row in rows] == [
        ("first", PASS),
        ("did not end", FAIL),
        ("last", PASS),
    ]
    assert rows[1]["found"] == "RuntimeError: out of luck"
    assert "| cost | last | pass | a \\| b |" in capsys.readouterr().out


def test_nothing_compared_is_no_pass() -> None:
    assert compared("x", []).status == FAIL


def test_as_many_layers_as_fit() -> None:
    # 10 for what is not a layer, 5 for each layer
    assert layers_that_fit(15, 20, 61, 24) == 10
    assert layers_that_fit(15, 20, 1000, 24) == 24
    assert layers_that_fit(15, 20, 16, 24) == 1


def test_torchrun_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run it without torchrun"):
        main(["--device", DEVICE, "--json", str(tmp_path / "out.json")])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--only", "steps,nope"], "--only: unknown section 'nope', known: machine, operations"),
        (["--json", "nowhere/out.json"], "nowhere is no directory to write out.json to"),
        pytest.param(
            [],
            "torch finds no CUDA device here: with --device cpu the checks run",
            marks=pytest.mark.skipif(DEVICE == "cuda", reason="there is one"),
        ),
    ],
)
def test_what_the_command_refuses(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main(["--json", str(tmp_path / "out.json"), *options])
    assert not (tmp_path / "out.json").exists()
