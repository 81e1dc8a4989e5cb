"""The main job run inside a test: a tiny model on a little of the shipped text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from sentencepiece import SentencePieceTrainer

from examples.pretrain_refine import main as pretrain

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "data" / "tokenizer.model"
CORPUS = ROOT / "examples" / "data" / "public_domain.jsonl"
STEPS = 4
# Metrics that depend on the clock and not on the run.
TIMES = ("tokens_per_second", "step_seconds")


def write_config(directory: Path) -> Path:
    """A configuration and its text in `directory`: one next-token step, then ReFINE steps."""
    with CORPUS.open(encoding="utf-8") as file:
        text = json.loads(file.readline())["text"]
    (directory / "text.txt").write_text(text[:6000], encoding="utf-8")
    config = {
        "model": {"preset": "tiny-deltanet", "overrides": {"vocab_size": 2048}},
        "data": {
            "paths": [str(directory / "text.txt")],
            "tokenizer": str(TOKENIZER),
            "sequence_length": 64,
        },
        "refine": {"num_chunks": 3, "rollout_tokens": 4},
        "optimizer": {"lr": 1e-3, "lr_warmup_steps": 1, "lr_decay_style": "cosine"},
        "training": {
            "steps": STEPS,
            "ntp_warmup_steps": 1,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "dtype": "float32",
        },
        "run": {"directory": str(directory / "run"), "tensorboard": False, "progress": False},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_examples(directory: Path, count: int = 12) -> Path:
    """Prompts of unlike lengths with answers, in `directory`, out of the shipped text."""
    with CORPUS.open(encoding="utf-8") as file:
        words = json.loads(file.readline())["text"].split()
    rows = []
    for number in range(count):
        start, stop = 40 * number, 40 * number + 14 + number % 5
        answers = [" ".join(words[stop : stop + 1 + number % 3]), "another"]
        row = {"prompt": " ".join(words[start:stop]), "answers": answers, "task": "squad"}
        rows.append(json.dumps(row) + "\n")
    path = directory / "examples.jsonl"
    path.write_text("".join(rows), encoding="utf-8")
    return path


def write_posttrain_config(directory: Path) -> Path:
    """A configuration of post-training and its examples in `directory`: two optimizer steps on the
    prompts of a batch, one on their answers."""
    config = {
        "model": {"preset": "tiny-deltanet", "overrides": {"vocab_size": 2048}},
        "data": {
            "paths": [str(write_examples(directory))],
            "tokenizer": str(TOKENIZER),
            "sequence_length": 64,
            "max_answer_tokens": 8,
        },
        "refine": {
            "mode": "two_phase",
            "reward": "hybrid",
            "num_chunks": 3,
            "rollout_tokens": 4,
            "margin_left": 4,
            "margin_right": 6,
            "mini_batch_size": 2,
        },
        "optimizer": {"lr": 1e-3},
        "training": {
            "steps": STEPS,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "dtype": "float32",
        },
        "run": {"directory": str(directory / "run"), "tensorboard": False, "progress": False},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_letters(directory: Path) -> tuple[str, str]:
    """The settings of a text and a tokenizer of few pieces, for models of a small vocabulary."""
    text, model = directory / "letters.txt", directory / "letters.model"
    text.write_text("".join("abcdefg"[i * i % 7] for i in range(400)))
    with model.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["abcdefg"]),
            model_writer=file,
            model_type="char",
            vocab_size=11,  # with unknown, begin, end and space
            minloglevel=2,
        )
    return f"data.paths=[{text}]", f"data.tokenizer={model}"


def run_job(
    config: Path, run: Path, *overrides: str, main: Callable[[list[str]], None] = pretrain
) -> list[dict[str, Any]]:
    """Run (or resume) the job in directory `run`; its metrics without those that tell time."""
    main(["--config", str(config), f"run.directory={run}", *overrides])
    return metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps that `run` has recorded, without the metrics that tell time."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in s.items() if key not in TIMES} for s in steps]


def column(steps: list[dict[str, Any]], key: str) -> list[Any]:
    """One metric over the steps."""
    return [step[key] for step in steps]
