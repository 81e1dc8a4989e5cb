"""Decode passes as graphs. A stand-in for CUDA's records the operations of a pass on its tensors
and runs the same again: what the host decided, and what it read of a tensor, is as it was then."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_mcore import platform
from refine_mcore.models import attention
from refine_mcore.models.state import map_tensors
from refine_mcore.rollout import decode_passes
from tests.models.zoo import ARCHITECTURES
from tests.pipeline.test_engine import CONFIG, Bench, assert_same_outcome, make_batches

pytestmark = pytest.mark.usefixtures("short_chunks")


@torch.library.custom_op("refine_tests::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    count: Tensor,
    table: Tensor,
    strides: Sequence[int],
    window: int | None,
) -> Tensor:
    """As the kernel of that name, which takes no float64: one operation, memory by its address."""
    made, found = int(count), []
    kv_heads, dim = own_k.shape[2:]
    for stream, (key, value, tokens) in enumerate(table.tolist()):
        k, v = (
            torch.cat([_at(place, (tokens, kv_heads, dim), step, q.dtype), own[stream, :made]])
            for place, step, own in ((key, strides[:2], own_k), (value, strides[2:], own_v))
        )
        seen = slice(None if window is None else -window, None)
        k, v = (x[seen].repeat_interleave(q.shape[2] // kv_heads, dim=1) for x in (k, v))
        weights = (torch.einsum("hd,nhd->hn", q[stream, 0], k) * dim**-0.5).softmax(-1)
        found.append(torch.einsum("hn,nhd->hd", weights, v)[None])
    return torch.stack(found)


def _at(place: int, shape: tuple[int, ...], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor [tokens, heads, dim] in this place."""
    if shape[0] == 0:
        return torch.empty(shape, dtype=dtype)
    numbers = (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] + shape[2]
    memory = (ctypes.c_char * (numbers * dtype.itemsize)).from_address(place)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided(shape, (*strides, 1)).clone()


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode_attention(q: Tensor, own: Any, count: Tensor, text: Any, *, window: Any) -> Tensor:
        return _decode_attention(q, *own, count, text.table, text.strides, window)

    monkeypatch.setattr(attention, "decode_attention", decode_attention)


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


@pytest.fixture(name="long_chunks")
def _long_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LaCT: branches have different weights, and seldom reach their chunk's end."""
    for name, architecture in ARCHITECTURES.items():
        if name.startswith("lact"):
            mixer: Any = architecture.mixer
            longer = replace(architecture, mixer=replace(mixer, chunk_size=11))
            monkeypatch.setitem(ARCHITECTURES, name, longer)


@pytest.mark.parametrize(
    "name",
    [
        "delta_net",
        "gated_delta_net",
        "delta_net-window_attention",
        "gated_delta_net-gated-zero_centered-tied-full_attention",
        "gated_delta_net-negative-post_norm-full_attention",
        "lact",
        "lact-prenorm-qk_norm",
        "lact-linear-full_attention",
    ],
)
def test_a_graph_makes_the_same_rollouts(
    name: str,
    process_groups: Any,
    captures: Captures,
    long_chunks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batches one after the other, of other texts, positions and weights."""
    config = replace(CONFIG, rollouts_per_position=2)
    bench = Bench(name, process_groups, config)
    engine, batches = bench.engine(), make_batches(1, 1, 1, 1)
    fixed, fixed_states = [], bench.model.fixed_states

    def seen(*args: Any) -> Any:
        fixed.append(fixed_states(*args))
        return fixed[-1]

    monkeypatch.setattr(bench.model, "fixed_states", seen)
    passes, graphs = config.rollout_tokens - 1, 0
    for step in range(2):
        if step == 1:
            with torch.no_grad():
                for parameter in bench.model.parameters():
                    parameter.mul_(1.1)
        before, captures.replays = captures.operations.copy(), 0
        found = bench.step("fused", batches, engine=engine)
        graphs = sum(states is not None for states in fixed) - graphs
        if "lact" not in name:
            assert graphs == len(batches)
        # the first micro-batch of all runs operation by operation, the second is captured
        # and compared over two passes and one
        assert graphs >= 2
        assert captures.replays == (graphs if step else graphs - 1) * passes + (0 if step else 3)
        assert len(captures.operations) == 1 and captures.operations[0] > 20
        assert step == 0 or captures.operations == before
        assert_same_outcome(found, bench.step("fused", batches, decode_graphs=False))


def test_rollouts_that_reach_the_end_of_a_chunk_are_no_graph(
    process_groups: Any, captures: Captures, caplog: pytest.LogCaptureFixture
) -> None:
    """Of LaCT, whose weights change there; the log says so once."""
    decode_passes._log_by_operation.cache_clear()
    caplog.set_level("INFO", logger=decode_passes.__name__)
    bench, batches = Bench("lact", process_groups), make_batches(1, 1, 1)
    found = bench.step("fused", batches)
    assert not captures.operations
    (said,) = [r.getMessage() for r in caplog.records if r.name == decode_passes.__name__]
    assert "reach the end of a chunk" in said
    assert_same_outcome(found, bench.step("fused", batches, decode_graphs=False))


@pytest.mark.parametrize("wrong", ["refused", "different", "states not written", "other states"])
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
            elif wrong == "states not written":
                torch._foreach_copy_(graph._memory, before)

        return off

    monkeypatch.setattr(platform, "graph_capture", lambda: capture)
    bench, batches = Bench("delta_net", process_groups), make_batches(1, 1, 1)
    if wrong == "other states":
        fixed_states = bench.model.fixed_states
        monkeypatch.setattr(
            bench.model,
            "fixed_states",
            lambda *args: map_tensors(lambda x: x * 1.5, fixed_states(*args)),
        )
    found = bench.step("fused", batches)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == decode_passes.__name__]
    said = {"refused": "not permitted", "different": "by 2.0e-01"}
    assert said.get(wrong, "differs from operations one by one") in warning
    assert_same_outcome(found, bench.step("fused", batches, decode_graphs=False))
