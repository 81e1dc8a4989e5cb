"""Training steps of every family on the device: against the same step on the CPU, and in place
against copied prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from refine_mcore import platform
from refine_mcore.benchmark.gpu_check.jobs import (
    FAMILIES,
    LAYOUTS,
    Texts,
    decoded_as_graphs,
    step_results,
    tiny_job,
)
from refine_mcore.benchmark.gpu_check.results import ABSENT, FAIL, Result, compared
from refine_mcore.benchmark.gpu_check.worker import Workers
from refine_mcore.evaluation.differences import Difference, relative, unequal

FusedSteps = Callable[[str], dict[str, Tensor]]

# Of a tensor's norm. Two orders of summation of the same float32 step: some hundred roundings of
# 6e-8 in a row on the way to a gradient. Muon's five iterations multiply the smallest singular
# values, and the rounding in them, by up to 493.
_LIMIT, _MUON_LIMIT = 1e-4, 1e-2
# What an expected size is taken to be at least. Metrics are means of terms of about one (log-probs,
# cosines, advantages), and where those cancel, as on-policy in the policy loss and the drift of
# log-probs, their rounding stays. Gradients below a ten-thousandth are rounding of larger ones.
_METRIC_FLOOR, _GRADIENT_FLOOR = 1.0, 1e-4


def step_differences(
    family: str, actual: dict[str, Tensor], expected: dict[str, Tensor]
) -> list[Difference]:
    """Losses, rewards, positions, rollout tokens and every gradient of two float32 steps."""
    limit = _MUON_LIMIT if family == "lact" else _LIMIT
    found = [Difference("results missing or too many", len(actual.keys() ^ expected.keys()), 0.0)]
    for name in sorted(actual.keys() & expected.keys()):
        if not expected[name].is_floating_point():
            found.append(unequal(name, actual[name], expected[name]))
            continue
        floor = _METRIC_FLOOR if name.startswith("metric.") else _GRADIENT_FLOOR
        found.append(relative(name, actual[name], expected[name], limit, floor))
    return found


def fused_steps(texts: Texts) -> FusedSteps:
    """The fused step of a family in this process, which is made once."""
    return cache(lambda family: step_results(tiny_job(texts, family), "fused"))


def check_steps(texts: Texts, fused: FusedSteps) -> Iterator[Result]:
    """A fused step of each family here and, in a process that sees no GPU, on the CPU; and whether
    rollouts are decoded as a graph."""
    with Workers(texts, ["one rank"], ranks=1, hide_gpus=True) as reference:
        here = {family: fused(family) for family in FAMILIES}
        reference.join()
        for family in FAMILIES:
            expected = reference.results("one rank", family)
            yield compared(family, step_differences(family, here[family], expected))
    name = "decode passes as CUDA graphs"
    if platform.graph_capture() is None:
        yield Result(name, ABSENT, "takes a GPU")
        return
    for family in FAMILIES:
        # the second of a step's texts is decoded as one
        graphs, found, by_operation = decoded_as_graphs(texts, family)
        if graphs == 1:
            yield compared(f"{name}, {family}", step_differences(family, found, by_operation))
        else:
            yield Result(f"{name}, {family}", FAIL, "refused: see the log")


def check_branching(texts: Texts, fused: FusedSteps) -> Iterator[Result]:
    """The fused step of each family against the step that runs every rollout's prefix again."""
    for family in FAMILIES:
        copied = step_results(tiny_job(texts, family), "prefix_copy")
        yield compared(family, step_differences(family, fused(family), copied))


def check_layouts(texts: Texts, fused: FusedSteps) -> Iterator[Result]:
    """Fused steps of each family on two ranks against one."""
    layouts = [name for name in LAYOUTS if name != "one rank"]
    if platform.device().type == "cuda" and torch.cuda.device_count() < 2:
        yield from (Result(layout, ABSENT, "takes two GPUs") for layout in layouts)
        return
    with Workers(texts, layouts, ranks=2, hide_gpus=False) as ranks:
        alone = {family: fused(family) for family in FAMILIES}
        ranks.join()
        for layout in layouts:
            for family in FAMILIES:
                found = ranks.results(layout, family)
                differences = step_differences(family, found, alone[family])
                yield compared(f"{layout}, {family}", differences)
