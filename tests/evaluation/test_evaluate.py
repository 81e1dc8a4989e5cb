"""Evaluation from a checkpoint to tables: resumed after a kill, and what its figures are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.evaluate import main
from refine_mcore import platform
from refine_mcore.config import load_config
from refine_mcore.conversion.description import find_checkpoint
from refine_mcore.errors import UserError
from refine_mcore.evaluation import evaluate as evaluation
from refine_mcore.evaluation.next_token import next_token_scores
from refine_mcore.evaluation.report import (
    Mean,
    markdown,
    next_token_means,
    plot_needles,
    scores,
)
from refine_mcore.evaluation.runner import Results, run_rows
from refine_mcore.evaluation.tasks import Row
from refine_mcore.generation import NotFiniteError
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.models.whole_model import whole_model
from refine_mcore.training.loop import Run
from tests.distributed.harness import run_distributed
from tests.models import zoo
from tests.training.jobs import CORPUS, write_config

TASKS = ("--tasks", "niah_multikey_1,ruler_qa,ntp", "--lengths", "512", "--text-length", "300")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run from a preset, with the tokenizer it was trained with."""
    place = tmp_path_factory.mktemp("run")
    config = load_config(write_config(place), ["training.steps=2"])
    with platform.distributed(60):
        Run(config).train()
    newest = place / "run" / "checkpoints" / "iter_0000002" / "hf"
    (newest / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    return place / "run" / "checkpoints"


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path) -> list[str]:
    rows = [
        {"prompt": f"Who is number {i}?\nAnswer:", "answer": ["e"], "task": "ruler_squadqa"}
        for i in range(3)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(CORPUS.read_text().splitlines(keepends=True)[:2]))
    return [
        *("--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *TASKS),
        *("--data", str(data), "--texts", str(texts), "--rows", "2", "--batch-size", "3"),
    ]


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]


def test_a_killed_evaluation_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[int] = []
    generate = evaluation.generate

    def killed(model: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(model, prompts, *rest, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "generate", killed)
        main(command)
    assert len(lines(tmp_path)) == 2  # a batch is of one task
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"task": "ruler_squ')  # as a kill cuts it off
    asked.clear()

    def counted(model: Any, prompts: Any, *rest: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        assert options["end_tokens"] == {2, 7}
        return generate(model, prompts, *rest, **options)

    monkeypatch.setattr(evaluation, "generate", counted)
    main(command)
    assert asked == [2]
    found = lines(tmp_path)
    assert [x["task"] for x in found] == ["niah_multikey_1"] * 2 + ["ruler_squadqa"] * 2 + [
        "ntp"
    ] * 2
    main(command)
    assert asked == [2] and lines(tmp_path) == found
    assert capsys.readouterr().out.count("| niah_multikey_1 |") == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["scores"]["ruler_squadqa"]["all"]["count"] == 2
    buckets = report["next_token"]
    assert [x["positions"] for x in buckets] == ["0 to 256", "256 to 300", "all"]
    assert [x["tokens"] for x in buckets] == [2 * 255, 2 * 44, 2 * 299]
    assert report["seeds"] == [0]
    assert report["settings"]["arithmetic"] == {"training.dtype": "float32"}
    newest = find_checkpoint(Path(command[1]))
    assert report["checkpoint"] == str(newest) and newest.name == "iter_0000002"
    told = f"Checkpoint {newest}, computed with training.dtype float32.\n"
    assert (tmp_path / "out" / "report.md").read_text().endswith(told)
    assert (tmp_path / "out" / "needles.png").stat().st_size > 1000
    rows = tmp_path / "rows.jsonl"
    written = rows.read_text()
    for change, content in (
        (["--temperature", "1"], written),
        (["training.dtype=bfloat16"], written),
        ([], written.replace("number 1", "number 7")),
    ):
        rows.write_text(content)
        with pytest.raises(UserError, match="holds results of another model or of other settings"):
            main([*command, *change])
    assert lines(tmp_path) == found


def test_only_the_seeds_asked_for_are_reported(command: list[str], tmp_path: Path) -> None:
    command = [*command, "--tasks", "ruler_squadqa", "--seeds"]
    main([*command, "0"])
    results = tmp_path / "out" / "results.jsonl"
    results.write_text(results.read_text().replace('"score": ', '"score": 1'))
    main([*command, "1"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seeds"] == [1]
    mean = report["scores"]["ruler_squadqa"]["all"]
    assert mean["mean"] <= 1 and mean["count"] == 2


def test_a_sampled_response_does_not_depend_on_what_else_is_asked(
    command: list[str], tmp_path: Path
) -> None:
    asked = [*command, "--temperature", "1", "--rows", "3"]
    main([*asked, "--tasks", "ruler_squadqa"])
    alone = {line["key"]: line["response"] for line in lines(tmp_path)}
    main([*asked, "--tasks", "niah_multikey_1,ruler_squadqa", "--output", str(tmp_path / "both")])
    both = (tmp_path / "both" / "results.jsonl").read_text().splitlines()
    found = [line for line in map(json.loads, both) if line["task"] == "ruler_squadqa"]
    assert {line["key"]: line["response"] for line in found} == alone
    assert len(set(alone.values())) == 3


def test_a_row_without_finite_logits_is_named(tmp_path: Path) -> None:
    rows = [Row("trec", str(number), [1], ("a",), 4, {}) for number in range(3)]

    def generate(*_: Any) -> Any:
        raise NotFiniteError(1, 2)

    with pytest.raises(UserError, match="^trec 1: the logits of token 3 of the answer are not fin"):
        run_rows(
            rows,
            [0],
            generate,
            lambda *_: "",
            Results(tmp_path / "results.jsonl", {}, writer=True),
            batch_size=4,
            progress=lambda _: None,
        )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--tasks", "mmlu"], "unknown task 'mmlu'; known: ruler_niah, ruler_qa, longbench, ntp"),
        (["--tasks", "trec"], r"rows.jsonl: no rows of trec"),
        (["--rows", "0"], "the number of rows must be at least 1, not 0"),
        (["--seeds", "a"], "--seeds must be whole numbers separated by commas, not 'a'"),
        (["--longest-prompt", "3"], "more than the 3 allowed"),
        (["--temperature", "-1"], "a temperature must be 0 or more"),
        (["--tokenizer", "missing.model"], r"missing.model does not exist"),
    ],
)
def test_bad_input(command: list[str], change: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        main([*command, *change])
    assert not (tmp_path / "out" / "report.json").exists()


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"results\.jsonl:1 is not a line of results"):
        Results(path, {}, writer=True)


NAMES = ("delta_net", "lact", "delta_net-full_attention")
TOKENS = zoo.random_tokens(1, 41)[0].tolist()


def _scored(name: str, pipeline: int) -> list[Any]:
    groups = platform.initialize_model_parallel(1, pipeline)
    config = transformer_config(
        zoo.ARCHITECTURES[name], dtype=torch.float64, pipeline_parallel=pipeline
    )
    stage = build_model(config, groups)
    initialize(stage, seed=1)
    return next_token_scores(whole_model(stage), TOKENS, [0, 5, 30, 41], seed=2)


def test_next_tokens_against_one_forward(single_rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refine_mcore.evaluation.next_token._SLICE", 7)
    expected = {}
    for name in NAMES:
        model = zoo.make_model(name, single_rank)
        text = torch.tensor([TOKENS])
        with torch.no_grad():
            logits = model.logits(model(text).hidden)[0, :-1, : zoo.VOCAB]
        losses = torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="none")
        hits = logits.argmax(-1) == text[0, 1:]
        found = next_token_scores(model, TOKENS, [0, 5, 30, 41], seed=2)
        assert [x.tokens for x in found] == [4, 25, 11]
        for bucket in found:
            span = slice(max(bucket.start, 1) - 1, bucket.stop - 1)
            assert bucket.loss == pytest.approx(losses[span].sum().item(), rel=1e-9)
            assert bucket.argmax_hits == hits[span].sum()
        expected[name] = _scored(name, 1)
    platform.shutdown()
    run_distributed(_compare, 2, expected)


def _compare(expected: dict[str, list[Any]]) -> None:
    for name, buckets in expected.items():
        for found, wanted in zip(_scored(name, 2), buckets, strict=True):
            assert vars(found) == vars(wanted) | {"loss": pytest.approx(wanted.loss, rel=1e-9)}


def test_means_are_over_rows() -> None:
    assert Mean.of([1.0, 0.0, 0.0, 1.0]) == Mean(0.5, math.sqrt(1 / 12), 4)
    assert Mean.of([0.25]).percent() == "25.0"
    found = scores(
        {"task": "t", "key": key, "seed": seed, "score": value, "group": {"length": length}}
        for key, seed, value, length in (
            *(("a", 0, 1.0, 512), ("a", 1, 0.0, 512)),  # one row, twice
            *(("b", 0, 1.0, 512), ("c", 0, 0.0, 1024)),
        )
    )
    assert found["t"]["512"] == Mean(0.75, 0.25, 2)
    assert found["t"]["all"].count == 3
    shown = markdown(found, [], Path("iter_1"), {"training.dtype": "float32"})
    assert "| t | 75.0 ± 25.0 | 0.0 | 50.0 ± 28.9 | 3 |" in shown
    assert not plot_needles([{"task": "t", "group": {}, "score": 1.0}], Path("none.png"))


def test_columns_are_by_length() -> None:
    lengths = (8192, 512, 16384, 4096)
    rows = [{"length": x} for x in lengths] + [{}]
    lines = [
        {"task": "t", "key": str(i), "seed": 0, "score": 0.0, "group": group}
        for i, group in enumerate(rows)
    ]
    found = scores(lines)["t"]
    assert list(found) == ["512", "4096", "8192", "16384", "all"] and found["all"].count == 5


def test_next_tokens_weigh_alike_whatever_their_text() -> None:
    def text(*buckets: tuple[int, float]) -> dict[str, Any]:
        return {
            "buckets": [
                {"start": start, "stop": stop, "tokens": tokens, "loss": loss}
                | {"argmax_hits": tokens, "sampled_hits": 0}
                for (start, stop), (tokens, loss) in zip(
                    [(0, 256), (256, 512)], buckets, strict=False
                )
            ]
        }

    first, second, whole = next_token_means([text((255, 255.0), (200, 800.0)), text((100, 300.0))])
    assert (first["tokens"], second["tokens"], whole["tokens"]) == (355, 200, 555)
    assert first["positions"] == "0 to 256" and whole["positions"] == "all"
    mean = 555 / 355  # of loss, with residuals of opposite signs
    residual = 255 - 255 * mean
    assert first["loss"] == {
        "mean": pytest.approx(mean),
        "standard_error": pytest.approx(2 * abs(residual) / 355),
        "count": 2,
    }
    assert second["loss"] == {"mean": 4.0, "standard_error": None, "count": 1}
    assert whole["loss"]["mean"] == pytest.approx(1355 / 555)
    assert whole["accuracy_argmax"] == {"mean": 1.0, "standard_error": 0.0, "count": 2}
