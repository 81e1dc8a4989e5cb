"""The command line of the planner: what it prints, draws and refuses."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from refine_mcore.errors import UserError
from refine_mcore.pipeline.plan import main

SIZE = ["--stages", "3", "--microbatches", "4", "--slices", "4", "--rollout-tokens", "2"]


def test_json_stands_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SIZE, "--ntp-only", "0,2", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["stages"]) == 3
    assert {p["op"] for p in plan["stages"][1]} == {"F", "D", "S", "W"}
    assert {p["microbatch"] for p in plan["stages"][1] if p["op"] == "D"} == {1, 3}
    assert {tuple(p) for s in plan["stages"] for p in s} == {("op", "microbatch", "slice", "step")}
    assert plan["shape"]["decode_passes"] == 2  # as many as tokens, unless told otherwise
    assert plan["shape"]["ntp_only"] == [0, 2] and plan["shape"]["in_flight"] == 5
    assert plan["costs"]["scoring_backward"] == 0.04


def test_figures_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--stages", "4", "--microbatches", "8", "--slices", "1", "--rollout-tokens", "0"])
    printed = capsys.readouterr().out
    assert "step time 33.0000, where the forward of a micro-batch takes 1 on a stage" in printed
    assert "1.3750 x ideal (24.0000" in printed
    assert "held per stage: 4 3 2 1 (limit 6)" in printed


def test_slices_auto(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SIZE, "--slices", "auto", "--overhead-cost", "0.05", "--json"])
    assert 1 < json.loads(capsys.readouterr().out)["shape"]["slices"] < 64


def test_the_drawing_has_every_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SIZE, "--draw", str(tmp_path / "timeline.svg")])
    root = ElementTree.parse(tmp_path / "timeline.svg").getroot()
    paths = [e.attrib["d"] for e in root if e.tag.endswith("path")]
    assert sum(d.count("M") for d in paths) == 3 * 4 * (4 + 2 + 1 + 4)
    assert list(tmp_path.iterdir()) == [tmp_path / "timeline.svg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slices", "many"], "--slices must be a number or auto, not 'many'"),
        (["--slices", "0"], "slices must be at least 1, not 0"),
        (["--in-flight", "0"], "--in-flight must be at least 1, not 0"),
        (["--ntp-only", "x"], "--ntp-only must be whole numbers, not 'x'"),
        (["--decode-cost", "-1"], "the cost decode must be a number of at least 0"),
        (["--stages", "two"], "invalid int value: 'two'"),
        (["--stagez", "2"], "unrecognized arguments: --stagez 2"),
        (["--draw", "nowhere/x.svg"], "nowhere is no directory to draw x.svg in"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*SIZE, *arguments])


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "refine_mcore.pipeline.plan"]
    done = subprocess.run([*command, *SIZE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "--stages", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the following arguments are required: --microbatches\n"


def test_planning_needs_no_torch() -> None:
    code = "import refine_mcore.pipeline.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
