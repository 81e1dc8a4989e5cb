"""What all tests share: repeatable randomness, few threads, and where the golden numbers lie."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

from refine_mcore import platform

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

# Search is derandomised so that a red test stays red; deadlines would only measure the machine.
settings.register_profile("refine", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("refine")

# Read when triton is first imported: without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


# Tests in these folders spawn ranks that wait for each other, or measure.
_ALONE = ("distributed", "benchmark")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests that draw numbers draw the same ones alone and in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference numbers; its README says where they come from."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def single_rank() -> Iterator[ProcessGroupCollection]:
    """Megatron's process groups for a world of one; torn down after the test."""
    platform.initialize()
    platform.init_distributed(timeout_s=60)
    yield platform.initialize_model_parallel(seed=0)
    platform.shutdown()


def pytest_collection_finish() -> None:
    """What is imported stays: the collection at the end of every layout need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one; let those of whole folders run alone."""
    for item in items:
        if item.path.parent.name in _ALONE:
            item.add_marker(pytest.mark.alone)
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
