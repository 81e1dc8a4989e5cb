"""Test-time training: what a reset brings back, and that order does not matter with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from examples.ttt_refine import main
from refine_mcore import platform
from refine_mcore.config import Config, load_config
from refine_mcore.data import load_tokenizer
from refine_mcore.errors import UserError
from refine_mcore.evaluation.tasks import Row
from refine_mcore.evaluation.ttt import AdaptingModel, _groups, _tensors, answer_rows
from refine_mcore.training.loop import Run
from tests.distributed.harness import run_distributed
from tests.fused_adam import use_fused_adam
from tests.training.jobs import TOKENIZER, write_config, write_examples


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of adaptation, two optimizer steps a batch, by a checkpoint of a run of two steps."""
    place = tmp_path_factory.mktemp("ttt")
    with platform.distributed(60):
        Run(load_config(write_config(place), ["training.steps=2"])).train()
    rows = [json.loads(line) for line in write_examples(place, 5).read_text().splitlines()]
    for row in rows:
        row |= {"task": "ruler_squadqa"}
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"checkpoint": str(place / "run" / "checkpoints")},
        "data": {"paths": [str(place / "rows.jsonl")], "sequence_length": 64},
        "refine": {
            "mode": "two_phase",
            "reward": "binary",
            "num_chunks": 3,
            "rollout_tokens": 4,
            "margin_left": 4,
            "margin_right": 6,
            "mini_batch_size": 2,
        },
        # large steps: an adapted model answers otherwise
        "optimizer": {"lr": 0.05},
        "training": {"micro_batch_size": 1, "global_batch_size": 4, "dtype": "float32"},
        "run": {"directory": str(place / "answers"), "progress": False},
    }
    path = place / "ttt.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def rows_of(config: Config) -> list[Row]:
    tokenizer = load_tokenizer(TOKENIZER)
    lines = [json.loads(line) for line in Path(config.data.paths[0]).read_text().splitlines()]
    return [
        Row(
            "ruler_squadqa",
            str(i),
            tokenizer.text_to_ids(x["prompt"]),
            ("a",),
            6,
            {},
            origin=f"row {i}",
        )
        for i, x in enumerate(lines)
    ]


SHARDED = ["optimizer.use_distributed_optimizer=true", "training.dtype=bfloat16"]


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ([], False),
        pytest.param(["training.dtype=bfloat16"], False, marks=pytest.mark.slow),
        (SHARDED, False),
        (SHARDED, True),
    ],
    ids=["float32", "bfloat16", "sharded", "fused Adam"],
)
def test_a_reset_brings_back_every_bit(
    options: list[str],
    fused: bool,
    config: Path,
    single_rank: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if fused:
        use_fused_adam(monkeypatch)
    settings = load_config(config, options)
    rows = rows_of(settings)
    adapted = AdaptingModel(settings, single_rank)
    before = [x.clone() for x in _tensors(adapted.stage, adapted.optimizer)]
    steps = []
    assert adapted._begin is not None
    restore = adapted._begin.restore

    def watched() -> None:
        steps.append([x.clone() for x in _tensors(adapted.stage, adapted.optimizer)])
        restore()

    adapted._begin.restore = watched  # type: ignore[method-assign]
    counts = [group.get("step") for group in _groups(adapted.optimizer)]
    first = adapted.answer(rows, ())
    assert [group.get("step") for group in _groups(adapted.optimizer)] == counts
    after = list(_tensors(adapted.stage, adapted.optimizer))
    assert len(after) == len(before) > 3 * len(list(adapted.stage.parameters()))
    assert all(map(torch.equal, after, before))
    moved = sum(not torch.equal(x, y) for x, y in zip(steps[0], before, strict=True))
    assert moved > 0.9 * len(before)
    assert adapted.answer(rows, ()) == first
    plain = load_config(config, [*options, "optimizer.lr=1e-30"])
    assert AdaptingModel(plain, single_rank).answer(rows, ()) != first


def test_without_a_reset_adaptation_adds_up(config: Path, single_rank: Any) -> None:
    settings = load_config(config, ["ttt.reset=none", "training.global_batch_size=2"])
    rows, adapted = rows_of(settings), AdaptingModel(settings, single_rank)
    together = [adapted.answer(rows[:2], ()), adapted.answer(rows[2:4], ())]
    alone = AdaptingModel(settings, single_rank).answer(rows[2:4], ())
    assert together[1] != alone


def responses(directory: Path) -> dict[str, str]:
    lines = [json.loads(x) for x in (directory / "responses.jsonl").read_text().splitlines()]
    return {tuple(x["answers"]): x["response"] for x in lines}  # type: ignore[misc]


def test_the_order_of_examples_does_not_matter(config: Path, tmp_path: Path) -> None:
    settings = load_config(config)
    lines = Path(settings.data.paths[0]).read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines[i] for i in (3, 0, 4, 1, 2)))
    found = {}
    for reset in ("example", "batch"):
        for name, path in (("plain", settings.data.paths[0]), ("shuffled", str(shuffled))):
            run = tmp_path / f"{reset}-{name}"
            options = [f"ttt.reset={reset}", f"data.paths=[{path}]", f"run.directory={run}"]
            main(["--config", str(config), *options])
            found[reset, name] = responses(run)
    assert found["example", "plain"] == found["example", "shuffled"]
    assert found["batch", "plain"] != found["batch", "shuffled"]


def test_goes_on_where_it_was_killed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answer, calls = AdaptingModel.answer, []

    def killed(self: Any, rows: Any, ends: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, rows, ends)

    monkeypatch.setattr(AdaptingModel, "answer", killed)
    command = ["--config", str(config), f"run.directory={tmp_path / 'run'}"]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    main(command)
    assert calls == [4, 1, 1]
    straight = ["--config", str(config), f"run.directory={tmp_path / 'straight'}"]
    main(straight)
    assert responses(tmp_path / "run") == responses(tmp_path / "straight")
    assert capsys.readouterr().out.count("| ruler_squadqa |") == 2
    for change in ("ttt.reset=none", "training.dtype=bfloat16", "model.overrides={norm_eps: 1e-3}"):
        with pytest.raises(UserError, match="holds results of another model or of other settings"):
            main([*command, change])
    none = ["--config", str(config), f"run.directory={tmp_path / 'none'}", "ttt.reset=none"]
    main(none)
    with pytest.raises(UserError, match="a run with ttt.reset none cannot go on"):
        main(none)


def test_every_file_begins_anew(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a batch, and with the weights of the checkpoint though nothing else resets them."""
    answer, calls = AdaptingModel.answer, []

    def counted(self: Any, rows: Any, ends: Any) -> Any:
        calls.append((len(rows), ends))
        return answer(self, rows, ends)

    monkeypatch.setattr(AdaptingModel, "answer", counted)
    lines = Path(load_config(config).data.paths[0]).read_text().splitlines(keepends=True)
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("".join(lines[:2]))
    second.write_text("".join(lines[2:]))
    options = ["ttt.reset=none", "training.global_batch_size=2"]
    for name, paths in (("both", f"{first}, {second}"), ("alone", str(second))):
        files = [f"data.paths=[{paths}]", f"run.directory={tmp_path / name}"]
        main(["--config", str(config), *options, *files])
    assert calls == [(size, {2}) for size in (2, 2, 1, 2, 1)]
    both, alone = responses(tmp_path / "both"), responses(tmp_path / "alone")
    assert alone.items() <= both.items() and len(both) == 5


def test_what_is_not_finite_is_told_of(
    config: Path, single_rank: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_config(config)
    rows, adapted = rows_of(settings)[:4], AdaptingModel(settings, single_rank)
    adapted.optimizer.get_grad_norm = lambda: math.nan
    assert all(adapted.answer(rows, ()))
    (record,) = (x for x in caplog.records if x.name.startswith("refine_mcore"))
    assert "2 update(s) by row 0 to row 3 skipped" in record.getMessage()
    next(adapted.stage.parameters()).data[:] = math.inf
    with pytest.raises(UserError, match=r"^row 0: the logits of token 1 .* not finite, after ada"):
        adapted.answer(rows, ())


def test_stages_answer_the_same(config: Path, tmp_path: Path) -> None:
    main(["--config", str(config), f"run.directory={tmp_path / 'one'}"])
    options = [f"run.directory={tmp_path / 'two'}", "parallel.pipeline=2", "parallel.slices=2"]
    run_distributed(_answer, 2, config, options)
    assert responses(tmp_path / "one") == responses(tmp_path / "two")


def _answer(path: Path, options: list[str]) -> None:
    config = load_config(path, options)
    groups = platform.initialize_model_parallel(1, config.parallel.pipeline, config.training.seed)
    answer_rows(config, load_tokenizer(TOKENIZER), groups)
    dist.barrier()


def test_bad_input(config: Path, tmp_path: Path) -> None:
    for options, complaint in (
        (["refine.margin_left=50"], r"rows.jsonl:1: the prompt has .* tokens, rollouts need 56"),
        (["data.sequence_length=12"], "more than the 11 allowed"),
        (["optimizer.lr_warmup_steps=2"], "optimizer.lr_warmup_steps must be 0, not 2"),
        (["data.packing=documents"], "data.packing documents is of training"),
        ([f"data.paths=[{tmp_path / 'no.jsonl'}]"], "cannot read"),
    ):
        with pytest.raises(UserError, match=complaint):
            main(["--config", str(config), f"run.directory={tmp_path / 'run'}", *options])
