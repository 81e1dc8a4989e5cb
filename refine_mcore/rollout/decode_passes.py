"""One token of every rollout after the other, from their states: what the passes D of a stage
run.

A pass is some hundred launches of little work each, which take a GPU's host longer than the GPU,
and nothing else is there to run meanwhile. A pass is therefore captured as a CUDA graph: fixed
places for tokens and states (models/fixed_state.py), the states after the pass in the place of
those before. The first rollouts of a kind run as they are, which has the kernels compiled and
checked; the graph is made for the second, and before it is trusted compared with the same
operations one by one, and with those on the states as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.state import FastWeightState, map_tensors, tensors_in

logger = logging.getLogger(__name__)

# Makes of a function that reads and writes fixed memory one that has the device do the same again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Kernels give the same bits; what may differ is what a library chooses for a product.
_TOLERANCE = 1e-2
# Of states in fixed places to those as they are, whose attention sums in another order. A bound and
# no measurement: rounding to bfloat16 layer after layer is below it, another text or place above.
_OTHER_SUMS = 0.1


class Decoder:
    """Starts the decode passes of micro-batches on a stage, as graphs if there is a `capture` and
    as long as none has failed."""

    def __init__(self, model: FastWeightModel, capture: Capture | None = None) -> None:
        self._model, self._capture = model, capture
        # By the kind of states; None: the next rollouts are captured.
        self._graphs: dict[str, _Graph | None] = {}

    @property
    def num_graphs(self) -> int:
        """Kinds of rollouts whose passes are graphs."""
        return sum(graph is not None for graph in self._graphs.values())

    def start(self, states: Sequence[FastWeightState], passes: int, rollouts: int) -> Decoding:
        """So many passes from these states on, forks of `rollouts`; whoever starts them keeps the
        states until the last."""
        graph = None
        if self._capture is not None:
            try:
                graph = self._graph(self._capture, states, passes, rollouts)
            # out of memory, a kernel that does not fit the chip, what a stream may not capture
            except Exception as error:
                logger.warning("decode passes: no CUDA graph, as %s", error)
                self._capture = None
                self._graphs.clear()
        return graph or _Passes(self._model, states)

    def _graph(
        self, capture: Capture, states: Sequence[FastWeightState], passes: int, rollouts: int
    ) -> _Graph | None:
        """One for these states, loaded with them; None where there is none yet."""
        fixed = self._model.fixed_states(states, passes, rollouts)
        if fixed is None:
            _log_by_operation()
            return None
        kind = _kind(fixed)
        if kind not in self._graphs:
            self._graphs[kind] = None
            return None
        graph = self._graphs[kind]
        if graph is None:
            graph = self._graphs[kind] = _Graph(self._model, fixed, capture)
            for others, steps, tolerance in (
                (fixed, min(2, passes), _TOLERANCE),
                (states, 1, _OTHER_SUMS),
            ):
                graph.load(fixed)
                difference = _difference(graph, _Passes(self._model, others), steps)
                if not difference <= tolerance:
                    raise RuntimeError(f"it differs from operations one by one by {difference:.1e}")
            logger.info("decode passes of %d streams: a CUDA graph", states[0].num_streams)
        graph.load(fixed)
        return graph


class _Passes:
    """Decode passes of one micro-batch, operation by operation."""

    def __init__(self, model: FastWeightModel, states: Sequence[FastWeightState]) -> None:
        self._model, self.states = model, states

    def step(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Hidden states after one token [R, 1] of every stream; `hidden` is that of the stage
        before."""
        self._model.set_input_tensor(hidden)
        out = self._model(tokens, self.states, output_states=True)
        assert out.states is not None
        self.states = out.states
        return out.hidden


class _Graph:
    """A pass in fixed memory."""

    def __init__(
        self, model: FastWeightModel, states: Sequence[FastWeightState], capture: Capture
    ) -> None:
        self._model = model
        self._states = map_tensors(torch.clone, list(states))
        self._memory = tensors_in(self._states)
        device = self._memory[0].device
        self.tokens = torch.zeros(states[0].num_streams, 1, dtype=torch.long, device=device)
        self._hidden: Tensor | None = None
        self._replay = capture(self._run)

    def _run(self) -> None:
        passes = _Passes(self._model, self._states)
        self._hidden = passes.step(self.tokens, None)
        _copy(self._memory, tensors_in(passes.states))

    def load(self, states: Sequence[FastWeightState]) -> None:
        _copy(self._memory, tensors_in(states))

    def step(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        assert hidden is None
        self.tokens.copy_(tokens)
        self._replay()
        assert self._hidden is not None
        return self._hidden


Decoding = _Passes | _Graph


@functools.cache
def _log_by_operation() -> None:
    logger.info(
        "decode passes of some rollouts: no CUDA graph, they reach the end of a chunk of LaCT or "
        "see their text in several pieces"
    )


def _copy(places: Sequence[Tensor], contents: Sequence[Tensor]) -> None:
    """Together those of one dtype, as one launch takes them; what is in its place stays."""
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for place, x in zip(places, contents, strict=True):
        if x is not place:
            by_dtype.setdefault(x.dtype, []).append((place, x))
    for pairs in by_dtype.values():
        torch._foreach_copy_([place for place, _ in pairs], [x for _, x in pairs])


def _difference(graph: _Graph, by_operation: _Passes, steps: int) -> float:
    """Of passes on any tokens, each from the states that the one before left: relative."""
    tokens = torch.zeros_like(graph.tokens)
    expected = torch.stack([by_operation.step(tokens, None) for _ in range(steps)]).float()
    found = torch.stack([graph.step(tokens, None).clone() for _ in range(steps)]).float()
    return ((found - expected).norm() / expected.norm()).item()


def _kind(states: Sequence[FastWeightState]) -> str:
    """All but the contents of states."""

    def shape(x: Tensor) -> Any:
        return tuple(x.shape), x.dtype

    return repr(map_tensors(shape, list(states)))
