"""The harness reports a failing rank and does not wait for ranks that hang."""

import time

import pytest
import torch.distributed as dist

from tests.distributed.harness import run_distributed


def _second_rank_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank only")
    dist.barrier()


def _hangs() -> None:
    time.sleep(600)


def test_failure_of_one_rank_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(pytest.fail.Exception, match="(?s)^rank 1 failed.*this rank only"):
        run_distributed(_second_rank_fails, 2)


def test_hanging_rank_is_killed_after_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="_hangs took over 1 s on 1 ranks"):
        run_distributed(_hangs, 1, timeout=1)
    assert time.monotonic() - started < 60
