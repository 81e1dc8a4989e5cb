"""Runs the study of study.yaml: ReFINE against next-token training at equal steps and equal FLOPs.

    python examples/studies/refine_vs_ntp/run.py --output RUNS [--seeds 0,1] [--families deltanet]
        [--jobs 2] [--check]

For each family and seed: pre-training by next-token loss, then one run for each arm from there, all
by examples/pretrain_refine.py, then the measurement of every model. Each run takes one thread, and
`--jobs` run at a time. What is there already is not run again. results.jsonl gets a line for each
measured model; with `--check` nothing is written there, and the lines of results.jsonl must come
out again to the last bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from corpus import Corpus, write_texts
from sentencepiece import SentencePieceProcessor

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1]
DOCUMENTS, TOKENIZER = (EXAMPLES / "data" / x for x in ("public_domain.jsonl", "tokenizer.model"))
# Steps between checkpoints of the next-token arm, to which equal FLOPs are rounded up.
EVERY = 3
TIMES = ("seconds", "seconds_per_step")


def main() -> None:
    arguments = _parse()
    study = yaml.safe_load((HERE / "study.yaml").read_text())
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = SentencePieceProcessor(model_file=str(TOKENIZER))
    for part, kinds in study["texts"].items():
        if not (output / f"{part}.jsonl").exists():
            corpus = Corpus(DOCUMENTS, tokenizer, held_out=False)
            write_texts(output / f"{part}.jsonl", corpus, kinds, seed=len(part))
    seeds = [int(x) for x in arguments.seeds.split(",")] if arguments.seeds else study["seeds"]
    families = arguments.families.split(",") if arguments.families else list(study["families"])
    work = [(family, seed) for seed in seeds for family in families]
    with ThreadPoolExecutor(arguments.jobs) as jobs:
        begun = [jobs.submit(_pretrained, study, output, family) for family in families]
        for job in begun:
            job.result()
        done = [jobs.submit(_one, study, output, family, seed) for family, seed in work]
        lines = [line for job in done for line in job.result()]
    stored = HERE / "results.jsonl"
    if arguments.check:
        _check(lines, [json.loads(line) for line in stored.read_text().splitlines()])
        return
    (output / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"results: {output / 'results.jsonl'}")


def _pretrained(study: dict[str, Any], output: Path, family: str) -> None:
    """The model that all runs of a family begin from, and what a step of each arm costs."""
    place = output / family
    steps = {"training": {"steps": study["families"][family]["pretrain_steps"]}}
    texts = output / "pretrain.jsonl"
    _train(study, place / "pretrain", texts, family, 0, "pretrain", steps)
    _measured(place, [place / "pretrain" / "checkpoints"], "costs")


def _one(study: dict[str, Any], output: Path, family: str, seed: int) -> list[dict[str, Any]]:
    """All runs of a family and seed, and the figures of their models."""
    begin, place = output / family / "pretrain", output / family / f"seed-{seed}"
    costs = json.loads((output / family / "costs.json").read_text())[str(begin / "checkpoints")]
    steps = study["continue"]["training"]["steps"]
    equal = {
        arm: math.ceil(steps * costs[arm] / costs["ntp"] / EVERY) * EVERY for arm in study["arms"]
    }
    for arm, options in study["arms"].items():
        own: dict[str, Any] = {
            "refine": options,
            "model": {"checkpoint": str(begin / "checkpoints")},
        }
        if arm == "ntp":
            own["training"] = {"steps": max(equal.values())}
            own["checkpoint"] = {"save_interval": EVERY}
        _train(study, place / arm, output / "continue.jsonl", family, seed, "continue", own)
    runs = {arm: (place / arm, steps) for arm in study["arms"]}
    runs |= {f"ntp, FLOPs of {arm}": (place / "ntp", n) for arm, n in equal.items() if arm != "ntp"}
    models = {name: run / "checkpoints" / f"iter_{n:07d}" for name, (run, n) in runs.items()}
    models = {"pretrained": begin / "checkpoints"} | models
    measured = _measured(place, list(models.values()), "models")
    lines = []
    for name, model in models.items():
        run, n = runs.get(name, (begin, 0))
        flops = n * costs[run.name] if n else 0
        lines.append(
            {"family": family, "seed": seed, "model": name, "steps": n, "flops": flops}
            | _seconds(run, n)
            | measured[str(model)]
        )
    print(f"{family}, seed {seed}: done", flush=True)
    return lines


def _train(
    study: dict[str, Any],
    directory: Path,
    texts: Path,
    family: str,
    seed: int,
    stage: str,
    own: dict[str, Any],
) -> None:
    """One run, unless it is there. Later settings win: common, stage, own."""
    if (directory / "done").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    config: dict[str, dict[str, Any]] = {
        "data": {"paths": [str(texts)], "tokenizer": str(TOKENIZER), "seed": seed},
        "model": {x: study["families"][family][x] for x in ("preset", "overrides")},
        "run": {"directory": str(directory)},
        "checkpoint": {"save_interval": 10**6},
    }
    for settings in (study["common"], study[stage], own):
        for section, values in settings.items():
            config[section] = config.get(section, {}) | values
    if "checkpoint" in own.get("model", {}):
        config["model"] = own["model"]
    config["training"]["seed"] = seed
    path = directory.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    _torchrun(EXAMPLES / "pretrain_refine.py", "--config", path, log=directory.with_suffix(".log"))
    (directory / "done").touch()


def _measured(place: Path, models: list[Path], what: str) -> dict[str, Any]:
    """Figures by model, from `measure.py`, unless they are there."""
    result = place / f"{what}.json"
    if not result.exists():
        _torchrun(HERE / "measure.py", what, result, *models, log=place / f"{what}.log")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _torchrun(*command: Any, log: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *torchrun, *map(str, command)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise SystemExit(f"{command[0]} failed, see {log}")


def _seconds(run: Path, steps: int) -> dict[str, float]:
    """Of the first `steps` steps: in all, and the median of one."""
    lines = (run / "metrics.jsonl").read_text().splitlines()[:steps]
    seconds = sorted(json.loads(line)["step_seconds"] for line in lines)
    middle = seconds[len(seconds) // 2] if seconds else 0.0
    return {"seconds": sum(seconds), "seconds_per_step": middle}


def _check(lines: list[dict[str, Any]], stored: list[dict[str, Any]]) -> None:
    """Exit with what differs from the stored results, seconds aside."""

    def identity(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["family"], line["seed"], line["model"]

    known = {identity(line): line for line in stored}
    for line in lines:
        before = known[identity(line)]
        differ = [x for x in line if x not in TIMES and line[x] != before[x]]
        if differ:
            raise SystemExit(f"{identity(line)} differs in {', '.join(differ)}")
    print(f"{len(lines)} lines of results.jsonl came out again, equal to the last bit")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="directory of the runs")
    parser.add_argument("--seeds", help="separated by commas; default: all")
    parser.add_argument("--families", help="separated by commas; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--check", action="store_true", help="compare with results.jsonl")
    return parser.parse_args()


if __name__ == "__main__":
    main()
