"""score.py on several ranks gives the numbers of the Hugging Face originals too.

Three layers do not divide over two stages, 97 token ids not over any ranks, nor two texts of 83
tokens and their rollouts over four. `qwen35_vl_tied` on four ranks has two key/value heads.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from refine_mcore import platform
from refine_mcore.errors import UserError
from tests.conversion.helpers import HYBRIDS, MODELS, reference, to_checkpoint
from tests.distributed.harness import run_distributed
from tests.distributed.launcher import run_nodes
from tests.golden_scores import (
    TEXT_A,
    TEXT_B,
    Outputs,
    assert_text_a,
    assert_text_b,
    score_arguments,
)
from tests.training.jobs import ROOT
from tools.score import main as score

SEQUENCE_PARALLEL = "parallel.sequence_parallel=true"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "TP2": ("parallel.tensor=2",),
    "TP2+SP": ("parallel.tensor=2", SEQUENCE_PARALLEL),
    "PP2": ("parallel.pipeline=2",),
    "PP3": ("parallel.pipeline=3",),
    "TP3": ("parallel.tensor=3",),
    "TP3+SP": ("parallel.tensor=3", SEQUENCE_PARALLEL),
    "TP4": ("parallel.tensor=4",),
    "TP4+SP": ("parallel.tensor=4", SEQUENCE_PARALLEL),
    "TP2xPP2": ("parallel.tensor=2", "parallel.pipeline=2"),
    "TP2xPP2+SP": ("parallel.tensor=2", "parallel.pipeline=2", SEQUENCE_PARALLEL),
}
FOUR_HEADS = ("deltanet", "qwen35_vl_tied")  # the others have two or six of some kind
ALL = (*MODELS, *HYBRIDS)
Case = tuple[str, str]  # model, layout


def test_some_models_on_four_ranks(golden: Path, tmp_path: Path) -> None:
    cases = [
        ("deltanet_hybrid", "TP2xPP2+SP"),
        ("lact_lowrank_momentum", "TP2xPP2"),
        ("olmo_hybrid", "TP2xPP2"),
        ("qwen35_vl_tied", "TP4+SP"),
    ]
    _check(golden, tmp_path, 4, cases)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "ranks, cases",
    [
        (2, [(name, layout) for name in ALL for layout in ("TP2", "TP2+SP", "PP2")]),
        (3, [(name, "PP3") for name in ALL]),
        (3, [("olmo_hybrid", layout) for layout in ("TP3", "TP3+SP")]),
        (4, [(name, layout) for name in ALL for layout in ("TP2xPP2", "TP2xPP2+SP")]),
        (4, [(name, layout) for name in FOUR_HEADS for layout in ("TP4", "TP4+SP")]),
    ],
)
def test_all_models(ranks: int, cases: list[Case], golden: Path, tmp_path: Path) -> None:
    _check(golden, tmp_path, ranks, cases)


@pytest.mark.slow
def test_under_torchrun(golden: Path, tmp_path: Path) -> None:
    checkpoint = to_checkpoint(golden / "models" / "deltanet", tmp_path / "checkpoint")
    options = score_arguments(golden, "deltanet", checkpoint, tmp_path / "scores", *TEXT_B)
    program = (ROOT / "tools/score.py", *options, *LAYOUTS["TP2xPP2"])
    (done,) = run_nodes(1, 4, *program, timeout=120)
    assert done.code == 0, done.output
    assert_text_b(load_file(tmp_path / "scores"), golden, "deltanet")


def _check(golden: Path, directory: Path, ranks: int, cases: list[Case]) -> None:
    """Every case's scores of both texts, against the reference."""
    checkpoints = {name for name, _ in cases}
    for name in checkpoints:
        to_checkpoint(reference(golden, name), directory / name)
    run_distributed(_score_all, ranks, golden, directory, cases, timeout=1000)
    for name, layout in cases:
        for text, check in (("a", assert_text_a), ("b", assert_text_b)):
            scored: Outputs = load_file(directory / f"{name}-{layout}-{text}")
            try:
                check(scored, golden, name)
            except AssertionError as error:
                raise AssertionError(f"{name}, {layout}, text {text}") from error


def _score_all(golden: Path, directory: Path, cases: list[Case]) -> None:
    """The program again and again on ranks that stay."""
    with mock.patch.multiple(platform, init_distributed=mock.DEFAULT, shutdown=mock.DEFAULT):
        for name, layout in cases:
            for text, options in (("a", TEXT_A), ("b", TEXT_B)):
                output = directory / f"{name}-{layout}-{text}"
                score(
                    score_arguments(
                        golden, name, directory / name, output, *options, *LAYOUTS[layout]
                    )
                )
        _replicas_are_refused(golden, directory, cases[0][0])


def _replicas_are_refused(golden: Path, directory: Path, name: str) -> None:
    """Their gradients would add up."""
    output = directory / "refused"
    with pytest.raises(UserError, match="= 1 ranks, not the . started") as caught:
        score(score_arguments(golden, name, directory / name, output, *TEXT_B))
    assert "\n" not in str(caught.value) and not output.exists()
