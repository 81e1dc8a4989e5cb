"""Evaluation between training steps: the run is the same with and without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from refine_mcore.config import load_config
from refine_mcore.conversion.description import find_checkpoint
from refine_mcore.data import load_tokenizer
from refine_mcore.errors import UserError
from refine_mcore.evaluation import in_training
from refine_mcore.generation import NotFiniteError
from refine_mcore.training.loop import Run
from tests.distributed.harness import run_distributed
from tests.training.jobs import CORPUS, TOKENIZER, metrics, run_job, write_config

OPTIONS = (
    "evaluation.every=2",
    f"evaluation.paths=[{CORPUS}]",
    "evaluation.texts=3",
    "evaluation.text_length=300",
    "evaluation.niah_length=400",
    "evaluation.niah_rows=1",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    config = write_config(tmp_path_factory.mktemp("config"))
    return config, run_job(config, tmp_path_factory.mktemp("plain") / "run")


def figures(steps: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {name: value for name, value in step.items() if name.startswith("evaluation/")}
        for step in steps
    ]


def without(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: x for name, x in step.items() if "evaluation/" not in name} for step in steps]


def test_the_run_is_the_same(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, expected = plain
    generate = in_training.generate

    def ending(*arguments: Any, **options: Any) -> Any:
        assert options["end_tokens"] == {2}
        return generate(*arguments, **options)

    monkeypatch.setattr(in_training, "generate", ending)
    steps = run_job(config, tmp_path / "run", *OPTIONS)
    assert without(steps) == expected
    first, second, third, last = figures(steps)
    assert first == third == {} and second.keys() == last.keys()
    assert second["evaluation/loss"] == pytest.approx(math.log(2048), abs=0.3)
    assert last["evaluation/loss"] < second["evaluation/loss"]
    assert {"evaluation/loss/0-256", "evaluation/loss/256-300"} < second.keys()
    weighted = (
        255 * second["evaluation/loss/0-256"] + 44 * second["evaluation/loss/256-300"]
    ) / 299
    assert second["evaluation/loss"] == pytest.approx(weighted)
    assert second["evaluation/niah_multivalue"] == 0


@pytest.mark.slow
def test_other_layouts_find_the_same(plain: Any, tmp_path: Path) -> None:
    config, expected = plain
    wanted = figures(run_job(config, tmp_path / "one", *OPTIONS))
    for name, options in {
        "stages": ["parallel.pipeline=2"],
        "overlap": [
            "optimizer.use_distributed_optimizer=true",
            "optimizer.overlap_grad_reduce=true",
            "optimizer.overlap_param_gather=true",
        ],
    }.items():
        run = tmp_path / name
        run_distributed(_train, 2, config, [f"run.directory={run}", *OPTIONS, *options])
        steps = metrics(run)
        for found, same in zip(without(steps), expected, strict=True):
            assert found["positions"] == same["positions"]
            assert found["loss_ntp"] == pytest.approx(same["loss_ntp"], rel=1e-5)
        for values, others in zip(figures(steps), wanted, strict=True):
            assert values == pytest.approx(others, rel=1e-5)


def _train(config: Path, options: list[str]) -> None:
    Run(load_config(config, options)).train()
    dist.barrier()


def test_bad_generation_settings_end_a_run_before_it_begins(plain: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    run_job(plain[0], source, "training.steps=2")
    newest = find_checkpoint(source / "checkpoints")
    (newest / "hf" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match="eos_token_id must be a token id or a list of them"):
        run_job(plain[0], tmp_path / "run", f"model.checkpoint={source / 'checkpoints'}", *OPTIONS)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_needles_without_finite_logits_end_no_run(
    plain: Any, monkeypatch: pytest.MonkeyPatch, single_rank: Any
) -> None:
    def generate(*_: Any, **__: Any) -> Any:
        raise NotFiniteError(0, 0)

    monkeypatch.setattr(in_training, "generate", generate)
    config = load_config(plain[0], list(OPTIONS))
    held_out = in_training.HeldOut(config, load_tokenizer(TOKENIZER), None)
    found = held_out._scores(None, held_out._rows[:2])  # type: ignore[arg-type]
    assert len(found) == 2 and all(map(math.isnan, found))


def test_nothing_to_evaluate_is_refused(plain: Any) -> None:
    with pytest.raises(UserError, match=r"evaluation.every needs evaluation.paths or"):
        load_config(plain[0], ["evaluation.every=2"])
