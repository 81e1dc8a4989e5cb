"""Decode passes as graphs. A stand-in for CUDA's records the operations of a pass on its tensors
and runs the same again: what the host decided, and what it read of a tensor, is as it was then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_mcore import platform
from refine_mcore.pipeline import decoding
from tests.pipeline.test_engine import CONFIG, Bench, assert_same_outcome, make_batches

pytestmark = pytest.mark.usefixtures("short_chunks")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" not in func.overloadpacket.__name__:  # memory alone
            self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Every result into the memory that it had."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Captures:
    """What was captured, and how often it was replayed."""

    def __init__(self) -> None:
        self.operations: list[int] = []
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # CUDA's needs one before
        with _Recorder() as recorder:
            run()
        self.operations.append(len(recorder.calls))

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return replay


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(platform, "graph_capture", lambda: found)
    return found


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net"])
def test_a_graph_makes_the_same_rollouts(
    name: str, process_groups: Any, captures: Captures
) -> None:
    """Micro-batches one after the other, of other texts, positions and weights."""
    config = replace(CONFIG, rollouts_per_position=2)
    bench = Bench(name, process_groups, config)
    engine = bench.engine()
    batches = make_batches(1, 1, 1)
    for step in range(2):
        if step == 1:
            with torch.no_grad():
                for parameter in bench.model.parameters():
                    parameter.mul_(1.1)
        passes = config.rollout_tokens - 1
        before, captures.replays = captures.operations, 0
        found = bench.step("fused", batches, engine=engine)
        # the first micro-batch of all runs operation by operation, the second is captured
        # and compared over two passes
        assert captures.replays == (3 if step else 2) * passes + (0 if step else 2)
        assert len(captures.operations) == 1 and captures.operations[0] > 20
        assert step == 0 or captures.operations == before
        assert_same_outcome(found, bench.step("fused", batches, decode_graphs=False))


@pytest.mark.parametrize("name", ["lact", "delta_net-window_attention"])
def test_states_that_grow_are_no_graph(
    name: str, process_groups: Any, captures: Captures, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is seen, and said, once."""
    caplog.set_level("INFO", logger=decoding.__name__)
    bench, batches = Bench(name, process_groups), make_batches(1, 1, 1)
    found = bench.step("fused", batches)
    assert not captures.operations
    assert sum("the states of some layers grow" in r.getMessage() for r in caplog.records) == 1
    assert_same_outcome(found, bench.step("fused", batches, decode_graphs=False))


@pytest.mark.parametrize("wrong", ["refused", "different", "states not written"])
def test_a_graph_that_fails_is_not_used(
    wrong: str,
    process_groups: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    captured = Captures()

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        if wrong == "refused":
            raise RuntimeError("operation not permitted when stream is capturing")
        replay = captured(run)
        graph = run.__self__  # type: ignore[attr-defined]

        def off() -> None:
            before = [x.clone() for x in graph._memory]
            replay()
            if wrong == "different":
                graph._hidden.mul_(1.2)
            else:
                torch._foreach_copy_(graph._memory, before)

        return off

    monkeypatch.setattr(platform, "graph_capture", lambda: capture)
    bench, batches = Bench("delta_net", process_groups), make_batches(1, 1, 1)
    found = bench.step("fused", batches)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == decoding.__name__]
    said = {"refused": "not permitted", "different": "differs by 2.0e-01"}
    assert said.get(wrong, "its result differs") in warning
    assert_same_outcome(found, bench.step("fused", batches, decode_graphs=False))
