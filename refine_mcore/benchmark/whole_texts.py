"""Steps on whole texts by one rank: the modes of the step beside the next-token step."""

from __future__ import annotations

import resource
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from refine_mcore import platform
from refine_mcore.benchmark.bench import Bench, profiled_parts, seconds
from refine_mcore.config import Config
from refine_mcore.step.metrics import StepAccumulator
from refine_mcore.training.step import STEP_MODES, forward_backward

MODES = ("ntp", "fused", "two_phase", "prefix_copy")
_ONCE = {"prefix_copy"}  # the slow reference
_CHECKED = 1024  # tokens of the batch on which gradients are compared


def measure(config: Config, modes: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of whole steps, the modes taking turns, and what they differ by."""
    bench = Bench(config)

    def step(mode: str) -> float:
        return seconds(partial(bench.run_step, bench.batches, 0, mode))

    for mode in modes:
        if mode not in _ONCE:
            step(mode)  # first steps allocate and build the optimizer state
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for index in range(rounds):
        for mode in modes:
            if index == 0 or mode not in _ONCE:
                times[mode].append(step(mode))
    tokens = config.training.global_batch_size * config.data.sequence_length
    report: dict[str, Any] = {}
    differences = _gradient_differences(bench, modes)
    for mode in modes:
        ratios = [t / base for t, base in zip(times[mode], times["ntp"], strict=False)]
        median = statistics.median(times[mode])
        report[mode] = {
            "seconds": median,
            "ratio_to_ntp": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "rounds": len(ratios),
            "tokens_per_second": tokens / median,
            "gradient_difference": differences.get(mode),
            "parts": {} if mode in _ONCE else _parts(bench, mode),
        }
    return {"modes": report}


def peak_memory(config: Config, mode: str) -> int:
    """Peak of two steps of one mode (one of the slow reference), in this process."""
    bench = Bench(config)
    for _ in range(1 if mode in _ONCE else 2):
        bench.run_step(bench.batches, 0, mode)
    if platform.device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - bench.before_model


def print_table(report: dict[str, Any]) -> None:
    """The figures of `measure`, with the memory of each mode, as Markdown."""
    base = report["modes"]["ntp"]["peak_memory_bytes"]
    print("| mode | seconds | ratio to ntp (lowest, highest) | peak memory, ratio | vs fused |")
    print("|---|---|---|---|---|")
    for mode, row in report["modes"].items():
        low, high = row["ratio_spread"]
        difference = row["gradient_difference"]
        print(
            f"| {mode} | {row['seconds']:.2f} | {row['ratio_to_ntp']:.2f} ({low:.2f}, {high:.2f}) "
            f"| {row['peak_memory_bytes'] / 2**30:.2f} GiB, {row['peak_memory_bytes'] / base:.2f} "
            f"| {'' if difference is None else f'{difference:.1e}'} |"
        )


def _gradient(bench: Bench, mode: str) -> torch.Tensor:
    """Of a step on the batch cut short: the slow reference is checked here and not only timed."""
    batches = [
        replace(b, tokens=b.tokens[:, :_CHECKED], mask=b.mask[:, :_CHECKED]) for b in bench.batches
    ]
    bench.zero_gradients()
    for work in STEP_MODES[mode](bench.context, batches):
        forward_backward(bench.model, work, StepAccumulator())
    return bench.gradient()


def _gradient_differences(bench: Bench, modes: list[str]) -> dict[str, float]:
    """How far each mode's gradient is from the fused one; next-token alone is another loss."""
    if "fused" not in modes:
        return {}
    fused = _gradient(bench, "fused")
    others = [mode for mode in modes if mode not in ("ntp", "fused")]
    return {m: float((_gradient(bench, m) - fused).norm() / fused.norm()) for m in others}


def _parts(bench: Bench, mode: str) -> dict[str, float]:
    """Seconds of the named parts of one profiled step; the rest is mostly the backward pass."""
    total = 0.0

    def step() -> None:
        nonlocal total
        total = seconds(partial(bench.run_step, bench.batches, 0, mode))

    parts = {name: spent for name, (spent, _) in profiled_parts(step).items()}
    return parts | {"backward and rest": total - sum(parts.values())}
