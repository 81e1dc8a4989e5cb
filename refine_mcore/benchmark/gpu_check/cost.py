"""What a step costs: seconds and peak memory of the ReFINE step beside the next-token step, at the
widths of the shipped recipes with as many layers as the device holds.

A measurement: it fails if a step does not run or has no finite loss, not if it is slow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from refine_mcore import platform
from refine_mcore.benchmark.bench import seconds
from refine_mcore.benchmark.gpu_check.jobs import Texts, free_memory, full_size_job, timed_step
from refine_mcore.benchmark.gpu_check.results import ABSENT, FAIL, PASS, Result, raised
from refine_mcore.models.presets import preset

_MODES = ("ntp", "fused")
_ROUNDS = 3
_ROUNDS_UNTIL_SECONDS = 40.0  # no round begins later than this after the first
_USABLE = 0.85  # of the device's memory: the allocator never fills all of it


@dataclass(frozen=True)
class _Size:
    preset: str
    length: int
    dtype: str
    overrides: dict[str, Any] = field(default_factory=dict)  # as in the recipe


_MUON = {"mixer.muon_dtype": "bfloat16"}
_FULL = (_Size("deltanet-1.3b", 16384, "bfloat16"), _Size("lact-760m", 16384, "bfloat16", _MUON))
_TINY = (_Size("demo-deltanet", 256, "bfloat16"), _Size("demo-lact", 512, "bfloat16", _MUON))


def check_cost(texts: Texts) -> Iterator[Result]:
    """One row per recipe."""
    on_gpu = platform.device().type == "cuda"
    for size in _FULL if on_gpu else _TINY:
        try:
            yield _measure(texts, size, _layers_that_fit(texts, size) if on_gpu else 2)
        except _TooLarge:
            found = f"{size.length} tokens through two layers do not fit into the device's memory"
            yield Result(size.preset, ABSENT, found)
        except Exception as error:  # says nothing of the other recipes
            yield raised(size.preset, error)
        free_memory()


class _TooLarge(Exception):
    """Not even two layers fit."""


def _layers_that_fit(texts: Texts, size: _Size) -> int:
    try:
        one, two = (_peak(_step(texts, size, layers), "fused") for layers in (1, 2))
    except torch.OutOfMemoryError:
        raise _TooLarge from None
    memory = torch.cuda.get_device_properties(platform.device()).total_memory
    return layers_that_fit(one, two, _USABLE * memory, preset(size.preset).num_layers)


def layers_that_fit(one: int, two: int, usable: float, wanted: int) -> int:
    """At most `wanted`, given the bytes that a model of one layer and of two takes: one part for
    the layers, another for the rest."""
    return max(1, min(wanted, 1 + math.floor((usable - one) / (two - one))))


def _step(texts: Texts, size: _Size, layers: int) -> Callable[[str], float]:
    """A step of a new model, the last one let go of."""
    free_memory()
    overrides = size.overrides | {"num_layers": layers}
    return timed_step(full_size_job(texts, size.preset, overrides, size.length, size.dtype))


def _peak(step: Callable[[str], float], mode: str) -> int:
    """Bytes that the allocator has handed out at most, in the second of two steps."""
    step(mode)
    torch.cuda.reset_peak_memory_stats()
    step(mode)
    return torch.cuda.max_memory_allocated()


def _measure(texts: Texts, size: _Size, layers: int) -> Result:
    step = _step(texts, size, layers)
    losses = {mode: step(mode) for mode in _MODES}  # first steps allocate
    on_gpu = platform.device().type == "cuda"
    peaks = {mode: _peak(step, mode) for mode in _MODES} if on_gpu else {}
    times = _times(step)
    ratios = [fused / ntp for ntp, fused in zip(times["ntp"], times["fused"], strict=True)]
    medians = {mode: statistics.median(times[mode]) for mode in _MODES}
    figures = {
        "layers": layers,
        "tokens": size.length,
        "dtype": size.dtype,
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "peak_memory_bytes": peaks,
        "loss_ntp": losses,
    }
    found = (
        f"{layers} of {preset(size.preset).num_layers} layers, {size.length} tokens, {size.dtype}: "
        f"next-token {medians['ntp']:.3g} s, fused {medians['fused']:.3g} s "
        f"({statistics.median(ratios):.2f} x, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    if peaks:
        found += (
            f"; peak {peaks['ntp'] / 2**30:.1f} and {peaks['fused'] / 2**30:.1f} GiB "
            f"({peaks['fused'] / peaks['ntp']:.2f} x)"
        )
    if not all(map(math.isfinite, losses.values())):
        return Result(size.preset, FAIL, f"a loss is not finite: {losses}; {found}", figures)
    return Result(size.preset, PASS, found, figures)


def _times(step: Callable[[str], float]) -> dict[str, list[float]]:
    """Seconds of steps of both modes, taking turns."""
    times: dict[str, list[float]] = {mode: [] for mode in _MODES}
    while len(times["ntp"]) < _ROUNDS:
        for mode in _MODES:
            times[mode].append(seconds(partial(step, mode)))
        if sum(map(sum, times.values())) > _ROUNDS_UNTIL_SECONDS:
            break
    return times
