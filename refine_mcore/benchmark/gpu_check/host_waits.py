"""Where the host waits for the device within a training step, beside the places meant for it.

On a GPU torch itself reports every wait (`torch.cuda.set_sync_debug_mode`), but for those inside
collectives. On a CPU nothing waits; there the calls from Python are counted that would: those that
bring values of a tensor to the host.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from refine_mcore import platform
from refine_mcore.benchmark.gpu_check.jobs import (
    FAMILIES,
    PLANNED_WAITS,
    PlannedWait,
    Texts,
    watched_step,
)
from refine_mcore.benchmark.gpu_check.results import FAIL, PASS, Result

Wait = Sequence[traceback.FrameSummary]  # the stack of one wait, the outermost frame first

_OWN_CODE = ("/refine_mcore/", "/refine_kernels/")
_SYNC_WARNING = "called a synchronizing CUDA operation"
_READS = frozenset(
    (
        *(Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.nonzero, Tensor.unique),
        *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
        *(Tensor.equal, Tensor.masked_select, torch.equal, torch.masked_select, torch.nonzero),
        torch.unique,
    )
)
# torch keeps the step count of Adam on the host whatever the device.
_HOST_TENSORS = ("torch/optim/optimizer.py", "_get_value")


def check_host_waits(texts: Texts) -> Iterator[Result]:
    """A fused step of each family, after one that has set everything up."""
    for family in FAMILIES:
        step, micro_batches = watched_step(texts, family, "fused")
        with host_waits() as waits:
            step()
        yield judged(family, waits, micro_batches)


def judged(check: str, waits: Sequence[Wait], micro_batches: int) -> Result:
    """FAIL with the list if the host waits elsewhere or more often than planned."""
    counts: Counter[str] = Counter()
    unplanned: Counter[str] = Counter()
    for wait in waits:
        plan = next((plan for plan in PLANNED_WAITS if _is_at(wait, plan)), None)
        limit = None if plan is None else plan.per_micro_batch
        if plan is None or (limit is not None and counts[plan.what] == limit * micro_batches):
            unplanned[_place(wait)] += 1
        else:
            counts[plan.what] += 1
    planned = ", ".join(f"{number} x {what}" for what, number in counts.items()) or "none"
    figures = {"planned": dict(counts), "unplanned": dict(unplanned)}
    found = f"planned waits in {micro_batches} micro-batches: {planned}"
    unseen = [
        plan.what
        for plan in PLANNED_WAITS
        if plan.per_micro_batch and counts[plan.what] < plan.per_micro_batch * micro_batches
    ]
    if unseen:  # what does not see those sees no others either
        return Result(check, FAIL, f"did not see every wait for {unseen[0]}; {found}", figures)
    if unplanned:
        places = "; ".join(f"{number} x {place}" for place, number in unplanned.items())
        return Result(check, FAIL, f"waits that are not planned: {places}; {found}", figures)
    return Result(check, PASS, found, figures)


@contextmanager
def host_waits() -> Iterator[list[Wait]]:
    """The waits of what runs inside, as they happen."""
    waits: list[Wait] = []
    if platform.device().type != "cuda":
        with _CountReads(waits):
            yield waits
        return

    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with noting_warnings(waits):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def noting_warnings(waits: list[Wait]) -> Iterator[None]:
    """Every warning by torch that the host waits is added to `waits` instead of shown, and no other
    one is shown either."""

    def note(message: Any, *details: Any, **options: Any) -> None:
        if _SYNC_WARNING in str(message):
            stack = traceback.extract_stack()[:-1]
            while stack[-1].filename == warnings.__file__:  # on the way from the warning to here
                del stack[-1]
            waits.append(stack)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield


class _CountReads(TorchFunctionMode):
    """Notes every call that brings values of a tensor to the host."""

    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _READS or _picks_by_mask(function, args):
            stack = traceback.extract_stack()[:-1]
            file, name = _HOST_TENSORS
            if not (stack[-1].filename.endswith(file) and stack[-1].name == name):
                self._waits.append(stack)
        return function(*args, **(kwargs or {}))


def _picks_by_mask(function: Any, args: tuple[Any, ...]) -> bool:
    """x[mask]: how many entries that are, only the device knows."""
    if function is not Tensor.__getitem__:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)


def _is_at(wait: Wait, plan: PlannedWait) -> bool:
    return any(
        frame.filename.endswith(plan.file) and plan.function in (None, frame.name) for frame in wait
    )


def _place(wait: Wait) -> str:
    """The innermost line of this project, and the innermost of all if that is another."""
    own = [frame for frame in wait if any(part in frame.filename for part in _OWN_CODE)]
    lines = [_line(frame) for frame in (*own[-1:], wait[-1])]
    return lines[0] if lines[0] == lines[-1] else " in ".join(reversed(lines))


def _line(frame: traceback.FrameSummary) -> str:
    file = "/".join(frame.filename.split("/")[-3:])
    return f"{file}:{frame.lineno} `{frame.line}`"
