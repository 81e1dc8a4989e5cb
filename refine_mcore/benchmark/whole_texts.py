"""Steps by one rank: the modes of the step beside the next-token step, with and without
recomputation.

A variant is a mode, or `mode/selective` or `mode/full` for the mode under that
`training.recompute`; `full` runs in `parallel.slices`, everything else on whole texts.
"""

from __future__ import annotations

import resource
import statistics
import sys
from dataclasses import replace
from typing import Any

import torch

from refine_mcore import platform
from refine_mcore.benchmark.bench import Bench, pass_seconds
from refine_mcore.config import Config
from refine_mcore.step.metrics import StepAccumulator

MODES = ("ntp", "fused", "two_phase", "prefix_copy")
RECOMPUTED = tuple(
    f"{mode}/{recompute}" for recompute in ("selective", "full") for mode in MODES[:3]
)
_ONCE = {"prefix_copy"}  # the slow reference
_CHECKED = 1024  # tokens of the batch on which gradients are compared


def measure(config: Config, variants: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of whole steps, the variants taking turns, and what they differ by.

    Interrupted, it reports what it has measured so far.
    """
    benches = _benches(config, variants)
    passes: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    differences: dict[str, float] = {}
    try:
        # before any step: variants with settings of their own train weights of their own
        differences = _gradient_differences(benches, variants)
        for index in range(-1, rounds):  # first steps allocate and build the optimizer state
            for variant in variants:
                if variant in _ONCE and index != 0:
                    continue
                spent = pass_seconds(benches[variant], _mode(variant))
                if index >= 0:
                    passes[variant].append(spent)
                _say(config, variant, index, rounds, spent["seconds"])
    except KeyboardInterrupt:
        pass
    base = [spent["seconds"] for spent in passes["ntp"]]
    tokens = config.training.global_batch_size * config.data.sequence_length
    return {
        "modes": {
            variant: _row(passes[variant], base, tokens)
            | {"gradient_difference": differences.get(variant)}
            for variant in variants
            if passes[variant]
        }
    }


def peak_memory(config: Config, variant: str) -> int:
    """Peak of two steps of one variant (one of the slow reference), in this process."""
    bench = _benches(config, [variant])[variant]
    for _ in range(1 if variant in _ONCE else 2):
        bench.run_step(bench.batches, 0, _mode(variant))
    if platform.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bench.before_model


def print_table(report: dict[str, Any]) -> None:
    """The figures of `measure`, with the memory of each variant, as Markdown."""
    base = report["modes"]["ntp"]["peak_memory_bytes"]
    print("| mode | seconds | ratio to ntp (lowest, highest) | peak memory, ratio | vs fused |")
    print("|---|---|---|---|---|")
    for variant, row in report["modes"].items():
        low, high = row["ratio_spread"]
        difference = row["gradient_difference"]
        print(
            f"| {variant} | {row['seconds']:.2f} | {row['ratio_to_ntp']:.2f} ({low:.2f}, "
            f"{high:.2f}) | {row['peak_memory_bytes'] / 2**30:.2f} GiB, "
            f"{row['peak_memory_bytes'] / base:.2f} "
            f"| {'' if difference is None else f'{difference:.1e}'} |"
        )


def print_curve(reports: list[dict[str, Any]]) -> None:
    """What `measure` found at several lengths, as Markdown: ratios to ntp of time and memory."""
    variants = [variant for variant in reports[0]["modes"] if variant != "ntp"]
    print("| tokens | ntp, seconds | " + " | ".join(f"{v}: time, memory" for v in variants) + " |")
    print("|---" * (2 + len(variants)) + "|")
    for report in reports:
        rows = report["modes"]
        cells = [
            f"{rows[v]['ratio_to_ntp']:.2f}, "
            f"{rows[v]['peak_memory_bytes'] / rows['ntp']['peak_memory_bytes']:.2f}"
            for v in variants
        ]
        seconds = rows["ntp"]["seconds"]
        print(f"| {report['sequence_length']} | {seconds:.2f} | {' | '.join(cells)} |")


def _mode(variant: str) -> str:
    return variant.partition("/")[0]


def _benches(config: Config, variants: list[str]) -> dict[str, Bench]:
    """One for each kind of recomputation, of the same weights and texts."""
    benches: dict[str, Bench] = {}
    groups = None
    for recompute in dict.fromkeys(variant.partition("/")[2] for variant in variants):
        slices = config.parallel.slices if recompute == "full" else 1
        how: Any = recompute or None
        training = replace(config.training, recompute=how)
        parallel = replace(config.parallel, slices=slices)
        benches[recompute] = Bench(replace(config, training=training, parallel=parallel), groups)
        groups = benches[recompute].groups
    return {variant: benches[variant.partition("/")[2]] for variant in variants}


def _row(passes: list[dict[str, float]], base: list[float], tokens: int) -> dict[str, Any]:
    """The median step, with its passes, and its ratio to the next-token step of the same round."""
    ratios = [spent["seconds"] / of_base for spent, of_base in zip(passes, base, strict=False)]
    median = sorted(passes, key=lambda spent: spent["seconds"])[(len(passes) - 1) // 2]
    parts = {name: spent for name, spent in median.items() if name != "seconds"}
    return {
        "seconds": median["seconds"],
        "ratio_to_ntp": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "rounds": len(ratios),
        "tokens_per_second": tokens / median["seconds"],
        "parts": parts,
    }


def _say(config: Config, variant: str, index: int, rounds: int, seconds: float) -> None:
    round_ = "first step" if index < 0 else f"round {index + 1} of {rounds}"
    length = config.data.sequence_length
    print(f"{length} tokens, {round_}: {variant} {seconds:.2f} s", file=sys.stderr, flush=True)


def _gradient(bench: Bench, mode: str) -> torch.Tensor:
    """Of a step on the batch cut short: the slow reference is checked here and not only timed."""
    batches = [
        replace(b, tokens=b.tokens[:, :_CHECKED], mask=b.mask[:, :_CHECKED]) for b in bench.batches
    ]
    bench.zero_gradients()
    for run in bench.run_step.optimizer_steps(mode, bench.context, batches, StepAccumulator()):
        run()
    return bench.gradient()


def _gradient_differences(benches: dict[str, Bench], variants: list[str]) -> dict[str, float]:
    """How far each variant's gradient is from the fused one; next-token alone is another loss."""
    if "fused" not in variants:
        return {}
    fused = _gradient(benches["fused"], "fused")
    others = [v for v in variants if v != "fused" and _mode(v) != "ntp"]
    return {
        v: float((_gradient(benches[v], _mode(v)) - fused).norm() / fused.norm()) for v in others
    }
