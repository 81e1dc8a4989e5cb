"""All sections in order: a line for each check as it ends, then the table and the JSON."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from refine_mcore import platform
from refine_mcore.benchmark.gpu_check.cost import check_cost
from refine_mcore.benchmark.gpu_check.host_waits import check_host_waits
from refine_mcore.benchmark.gpu_check.jobs import Texts, free_memory
from refine_mcore.benchmark.gpu_check.machine import check_machine
from refine_mcore.benchmark.gpu_check.models import check_models
from refine_mcore.benchmark.gpu_check.op_cases import FULL, TINY, op_cases
from refine_mcore.benchmark.gpu_check.ops import check_operations
from refine_mcore.benchmark.gpu_check.results import FAIL, PASS, Result, markdown_table, raised
from refine_mcore.benchmark.gpu_check.steps import (
    check_branching,
    check_layouts,
    check_steps,
    fused_steps,
)
from refine_mcore.report import write_json

_TIMEOUT_SECONDS = 120.0  # of a collective of this one process


def sections(root: Path, scratch: Path) -> dict[str, Callable[[], Iterator[Result]]]:
    """Every section by name, in order; `root` is the checkout, `scratch` for files in between."""
    texts, device = Texts(root, scratch), platform.device()
    texts.write_short_text()
    fused = fused_steps(texts)
    sizes = FULL if device.type == "cuda" else TINY
    return {
        "machine": check_machine,
        "operations": lambda: check_operations(device, op_cases(sizes)),
        "models": lambda: check_models(root / "tests" / "golden", scratch),
        "steps": lambda: check_steps(texts, fused),
        "branching": lambda: check_branching(texts, fused),
        "waits": lambda: check_host_waits(texts),
        "layouts": lambda: check_layouts(texts, fused),
        "cost": lambda: check_cost(texts),
    }


def run_checks(root: Path, chosen: Sequence[str], output: Path) -> bool:
    """Run the sections `chosen` on `platform.device()`, print what they find and write it to
    `output`. Returns whether nothing failed.

    A section that raises has failed, and the next ones run. Raises UserError if `output` cannot be
    written.
    """
    platform.initialize()
    # what is imported stays: the collection at the end of every model need not look at it
    gc.collect()
    gc.freeze()
    results: list[tuple[str, Result]] = []
    took: dict[str, float] = {}
    with platform.distributed(_TIMEOUT_SECONDS), tempfile.TemporaryDirectory() as scratch:
        platform.initialize_model_parallel()
        known = sections(root, Path(scratch))
        for section in chosen:
            start = time.perf_counter()
            for result in _survived(known[section]):
                results.append((section, result))
                print(f"{result.status:<19} {section}, {result.check}: {result.found}", flush=True)
            took[section] = time.perf_counter() - start
            free_memory()
    print(f"\n{markdown_table(results)}\n", flush=True)
    failed = sum(result.status == FAIL for _, result in results)
    report: dict[str, Any] = {
        "device": platform.device().type,
        "failed": failed,
        "passed": sum(result.status == PASS for _, result in results),
        "seconds": took,
        "results": [{"section": section, **asdict(result)} for section, result in results],
    }
    write_json(output, report)
    print(f"{failed} failed, in {sum(took.values()):.0f} s; {output}", flush=True)
    return failed == 0


def _survived(check: Callable[[], Iterator[Result]]) -> Iterator[Result]:
    """The results of a section, and a failed one if it raises."""
    try:
        yield from check()
    except Exception as error:
        yield raised("did not end", error)
