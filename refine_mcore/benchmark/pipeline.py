"""Steps in a pipeline: Megatron's 1F1B of next-token prediction, the engine's sliced next-token
step, and the sliced ReFINE step, each beside what its plan predicts.

A prediction is the plan simulated with the costs of the passes as one profiled step showed them,
the mean over the stages, plus the time of the optimizer; 1F1B is the plan of one slice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from refine_mcore.benchmark.bench import Bench, profiled_parts, seconds
from refine_mcore.config import Config
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.passes import Costs
from refine_mcore.pipeline.plan import Plan
from refine_mcore.pipeline.simulator import simulate
from refine_mcore.training.megatron_1f1b import megatron_1f1b
from refine_mcore.training.step_metrics import StepAccumulator

MODES = ("1f1b", "ntp", "fused")
_OUTSIDE_PASSES = ("reduce gradients", "optimizer")


def measure(config: Config, modes: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of whole steps, the modes taking turns; every rank calls it."""
    bench = Bench(config)
    steps = {mode: partial(_step, bench, mode) for mode in modes}
    for step in steps.values():
        step()  # first steps allocate and build the optimizer state
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode, step in steps.items():
            times[mode].append(seconds(partial(_with_barrier, step)))
    predicted = {mode: _predict(bench, mode) for mode in modes}
    report: dict[str, Any] = {}
    for mode in modes:
        ratios = [t / base for t, base in zip(times[mode], times["1f1b"], strict=True)]
        report[mode] = {
            "seconds": statistics.median(times[mode]),
            "ratio_to_1f1b": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "rounds": rounds,
            "predicted_ratio": predicted[mode]["step_time"] / predicted["1f1b"]["step_time"],
            "gradient_difference": _gradient_difference(bench, mode),
        } | predicted[mode]
    return {"modes": report}


def print_table(report: dict[str, Any]) -> None:
    """The figures of `measure` as Markdown."""
    print(
        "| mode | slices | seconds | ratio to 1F1B (lowest, highest) | predicted ratio | "
        "gradient vs reference |"
    )
    print("|---|---|---|---|---|---|")
    for mode, row in report["modes"].items():
        low, high = row["ratio_spread"]
        print(
            f"| {mode} | {row['slices']} | {row['seconds']:.2f} | {row['ratio_to_1f1b']:.2f} "
            f"({low:.2f}, {high:.2f}) | {row['predicted_ratio']:.2f} "
            f"| {row['gradient_difference']:.1e} |"
        )


def _step(bench: Bench, mode: str) -> None:
    if mode == "1f1b":
        bench.zero_gradients()
        megatron_1f1b(bench.model, bench.context, bench.batches, StepAccumulator())
        bench.optimizer.step()
    else:
        bench.run_step(bench.batches, 0, mode)


def _with_barrier(step: Callable[[], None]) -> None:
    step()
    dist.barrier()


def _gradient_difference(bench: Bench, mode: str) -> float:
    """|g - g'| / |g'| over this pipeline's ranks: of the next-token steps g' is that of 1F1B, of
    the ReFINE step that of the same step in one slice."""
    one_slice = _one_slice(bench)
    if mode == "fused":
        found, reference = _gradient(bench, bench.engine, True), _gradient(bench, one_slice, True)
    else:
        bench.zero_gradients()
        megatron_1f1b(bench.model, bench.context, bench.batches, StepAccumulator())
        reference = bench.gradient()
        engine = one_slice if mode == "1f1b" else bench.engine
        found = _gradient(bench, engine, False)
    squares = torch.stack([(found - reference).square().sum(), reference.square().sum()]).double()
    dist.all_reduce(squares, group=bench.groups.mp)
    return float((squares[0] / squares[1]).sqrt())


def _gradient(bench: Bench, engine: PipelineEngine | None, rolls_out: bool) -> torch.Tensor:
    assert engine is not None, "a pipeline runs on the engine"
    bench.zero_gradients()
    kinds = [rolls_out] * len(bench.batches)
    engine.forward_backward(bench.context, bench.batches, kinds, StepAccumulator())
    return bench.gradient()


def _one_slice(bench: Bench) -> PipelineEngine:
    return PipelineEngine(
        bench.model,
        bench.groups,
        slices=1,
        recompute=False,
        timeout_s=bench.config.parallel.timeout,
    )


def _predict(bench: Bench, mode: str) -> dict[str, Any]:
    """Step time and bubble of a mode's plan at the measured costs of its passes, in seconds."""
    engine = _one_slice(bench) if mode == "1f1b" else bench.engine
    assert engine is not None
    kinds = [mode == "fused"] * len(bench.batches)

    def step() -> None:
        bench.zero_gradients()
        engine.forward_backward(bench.context, bench.batches, kinds, StepAccumulator())
        with torch.profiler.record_function("refine/optimizer"):
            bench.optimizer.step()

    step()
    parts = _mean_over_stages(bench, step)
    plan = engine.plan(bench.context, bench.batches, kinds)
    costs = _costs(parts, plan)
    timeline = simulate(plan.shape, costs, plan.instructions)
    outside = sum(parts[name][0] for name in _OUTSIDE_PASSES)
    return {
        "slices": plan.shape.slices,
        "step_time": timeline.step_time + outside,
        "bubble": timeline.bubble,
        "costs": vars(costs),
    }


def _mean_over_stages(bench: Bench, step: Callable[[], None]) -> dict[str, tuple[float, int]]:
    """Seconds of the named parts of a profiled step, the mean over the stages, and their calls."""
    everyone: list[Any] = [None] * bench.groups.pp.size()
    dist.all_gather_object(everyone, profiled_parts(step), group=bench.groups.pp)
    return {
        name: (statistics.fmean(parts[name][0] for parts in everyone), calls)
        for name, (_, calls) in everyone[0].items()
        if all(name in parts for parts in everyone)
    }


def _costs(parts: dict[str, tuple[float, int]], plan: Plan) -> Costs:
    """What each pass cost, per micro-batch where the plan counts so."""
    micro_batches = plan.shape.microbatches

    def each(name: str) -> float:
        total, calls = parts.get(name, (0.0, 1))
        return total / calls

    branches = each("branch backward")
    return Costs(
        forward=parts["forward"][0] / micro_batches,
        backward=parts["backward"][0] / micro_batches - branches,
        decode=each("decode"),
        scoring=each("score"),
        scoring_backward=branches,
    )
