"""Steps in a pipeline: Megatron's 1F1B of next-token prediction, the engine's sliced next-token
step, and the sliced ReFINE step, each beside what its plan predicts.

A prediction is the plan simulated with the costs of the passes as one step showed them, the mean
over the stages, plus the time of the optimizer; 1F1B is the plan of one slice.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from refine_mcore.benchmark.bench import Bench, seconds
from refine_mcore.benchmark.megatron_1f1b import megatron_1f1b
from refine_mcore.config import Config
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.pipeline.micro_batch import MicroBatch
from refine_mcore.pipeline.passes import Costs, Pass, Shape
from refine_mcore.pipeline.simulator import simulate
from refine_mcore.step.metrics import StepAccumulator

MODES = ("1f1b", "ntp", "fused")


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
            "predicted_ratio": (
                predicted[mode]["predicted_seconds"] / predicted["1f1b"]["predicted_seconds"]
            ),
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
    one_slice = bench.one_slice
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


def _gradient(bench: Bench, engine: PipelineEngine, rolls_out: bool) -> torch.Tensor:
    bench.zero_gradients()
    _forward_backward(bench, engine, rolls_out)
    return bench.gradient()


def _forward_backward(bench: Bench, engine: PipelineEngine, rolls_out: bool) -> None:
    work = [MicroBatch(batch, rolls_out) for batch in bench.batches]
    engine.forward_backward(bench.context, work, StepAccumulator())


def _predict(bench: Bench, mode: str) -> dict[str, Any]:
    """Step time and bubble of a mode's plan at the measured costs of its passes, in seconds."""
    engine = bench.one_slice if mode == "1f1b" else bench.engine
    kinds = [mode == "fused"] * len(bench.batches)
    spent: dict[Pass, float] = {}
    engine.observe = partial(_timed, spent)
    bench.zero_gradients()
    _forward_backward(bench, engine, mode == "fused")
    dist.barrier()
    outside = seconds(bench.optimizer.step)
    plan = engine.plan(bench.config.refine, bench.config.data.sequence_length, kinds)
    costs = _costs(_mean_over_stages(bench, spent), plan.shape)
    timeline = simulate(plan.shape, costs, plan.instructions)
    return {
        "slices": plan.shape.slices,
        "predicted_seconds": timeline.step_time + outside,
        "predicted_bubble": timeline.bubble,
        "pass_seconds": vars(costs),
    }


@contextmanager
def _timed(spent: dict[Pass, float], item: Pass) -> Iterator[None]:
    torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    spent[item] = time.perf_counter() - start


def _mean_over_stages(bench: Bench, spent: dict[Pass, float]) -> dict[Pass, float]:
    everyone: list[Any] = [None] * bench.groups.pp.size()
    dist.all_gather_object(everyone, spent, group=bench.groups.pp)
    return {item: statistics.fmean(stage[item] for stage in everyone) for item in spent}


def _costs(spent: dict[Pass, float], shape: Shape) -> Costs:
    """The planner's costs: forward and backward of a whole micro-batch, the others of one pass.

    The branches' backward is what the last slice's takes longer in a step with rollouts than the
    average of the others; with one slice it counts as backward.
    """

    def total(op: str, slices: Collection[int]) -> float:
        return sum(t for item, t in spent.items() if item.op == op and item.slice in slices)

    def mean(op: str) -> float:
        times = [t for item, t in spent.items() if item.op == op]
        return statistics.fmean(times) if times else 0.0

    n, micro_batches = shape.slices, shape.microbatches
    backward = total("W", range(n)) / micro_batches
    branches = 0.0
    if n > 1 and shape.rollout_tokens > 0:
        others = total("W", range(n - 1)) / micro_batches / (n - 1)
        branches = max(0.0, total("W", [n - 1]) / micro_batches - others)
    return Costs(
        forward=total("F", range(n)) / micro_batches,
        backward=backward - branches,
        decode=mean("D"),
        scoring=mean("S"),
        scoring_backward=branches,
    )
