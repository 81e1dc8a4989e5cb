"""Run a function on several gloo ranks from within a test."""

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from refine_mcore import platform

COLLECTIVE_TIMEOUT_SECONDS = 60.0
_FIRST_FAILURE = "first_failure"
# Imported once, in the process that all ranks are forked from: each would take 4 s for it. Nothing
# of this repository, which a rank takes from where the tests do.
multiprocessing.set_forkserver_preload(["torch", "megatron.core", "megatron.core.optimizer"])


def run_distributed(
    fn: Callable[..., None], world_size: int, *args: Any, timeout: float = 180.0
) -> None:
    """Run `fn(*args)` on `world_size` spawned ranks, `platform` initialised, no layout set yet.

    `fn` must be a function of a test module's top level, and `args` must pickle. When a rank fails
    or `timeout` seconds have passed, all ranks are killed and the test fails, in the first case
    with the traceback of the rank that failed first. Ranks start in a second: group cases into
    one call.
    """
    # The store takes a free port of its own choice, and the ranks connect to it as they would to
    # torchrun's: concurrent test runs cannot collide.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = start_processes(
        _run_rank,
        (world_size, store.port, fn, args),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + timeout
    failure = None
    try:
        while not ranks.join(timeout=max(0.0, deadline - time.monotonic()), grace_period=1.0):
            if time.monotonic() >= deadline:
                failure = f"{fn.__name__} took over {timeout:.0f} s on {world_size} ranks"
                break
    except (ProcessExitedException, ProcessRaisedException) as error:
        recorded = store.check([_FIRST_FAILURE])
        failure = store.get(_FIRST_FAILURE).decode() if recorded else str(error)
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    if failure:
        pytest.fail(failure, pytrace=False)


def _run_rank(
    rank: int, world_size: int, port: int, fn: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """The life of one rank."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    platform.initialize()
    gc.freeze()  # what is imported stays: the collection at the end of a layout need not look at it
    platform.init_distributed(timeout_s=COLLECTIVE_TIMEOUT_SECONDS)
    try:
        fn(*args)
    except Exception:
        # The others fail as soon as this process is gone, and may be noticed before it: what they
        # say would hide the cause.
        store = dist.TCPStore("127.0.0.1", port)
        store.compare_set(_FIRST_FAILURE, "", f"rank {rank} failed\n{traceback.format_exc()}")
        raise
    platform.shutdown()
