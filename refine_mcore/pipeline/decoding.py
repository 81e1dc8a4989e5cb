"""One token of every rollout after the other, from their states: what the passes D of a stage
run.

A pass is some hundred launches of little work each, which take a GPU's host longer than the GPU,
and nothing else is there to run meanwhile. Where all states keep their shapes (delta rules without
attention) a pass is therefore captured as a CUDA graph: fixed memory for tokens and states, the
states after the pass in the place of those before. The first rollouts of a kind run as they are,
which also has every kernel compiled and checked; the graph is made for the second, and compared
with the operations one by one before it is trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.state import FastWeightState, map_tensors

logger = logging.getLogger(__name__)

# Makes of a function that reads and writes fixed memory one that has the device do the same again.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

# Kernels give the same bits; what may differ is what a library chooses for a product.
_TOLERANCE = 1e-2


class Decoding(Protocol):
    """Decode passes of one micro-batch."""

    def step(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """Hidden states after one token [R, 1] of every stream; `hidden` is that of the stage
        before."""


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

    def start(self, states: Sequence[FastWeightState]) -> Decoding:
        """From these states on."""
        if self._capture is None:
            return _Passes(self._model, states)
        states = [state.unshared() for state in states]
        kind = _kind(states)
        if kind not in self._graphs:
            return _Passes(self._model, states, lambda after: self._judge(kind, after))
        graph = self._graphs[kind] or self._captured(states)
        if graph is None:
            return _Passes(self._model, states)
        graph.load(states)
        self._graphs[kind] = graph
        return graph

    def _judge(self, kind: str, states: Sequence[FastWeightState]) -> None:
        """Whether rollouts of this model can be graphs: a pass leaves states as they were but for
        their contents."""
        if _kind(states) == kind:
            self._graphs[kind] = None
        else:
            logger.info("decode passes: no CUDA graph, the states of some layers grow")
            self._capture = None

    def _captured(self, states: Sequence[FastWeightState]) -> _Graph | None:
        assert self._capture is not None
        capture, self._capture = self._capture, None
        try:
            graph = _Graph(self._model, states, capture)
            difference = _difference(graph, _Passes(self._model, states), states)
        except RuntimeError as error:
            logger.warning("decode passes: no CUDA graph, capturing one failed: %s", error)
            return None
        if not difference <= _TOLERANCE:
            logger.warning(
                "decode passes: no CUDA graph, its result differs by %.1e from that of the same "
                "operations one by one",
                difference,
            )
            return None
        logger.info("decode passes of %d streams: a CUDA graph", states[0].num_streams)
        self._capture = capture
        return graph


class _Passes:
    """Operation by operation."""

    def __init__(
        self,
        model: FastWeightModel,
        states: Sequence[FastWeightState],
        after_first: Callable[[Sequence[FastWeightState]], None] | None = None,
    ) -> None:
        self._model, self._states, self._after_first = model, states, after_first

    def step(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        self._model.set_input_tensor(hidden)
        out = self._model(tokens, self._states, output_states=True)
        assert out.states is not None
        self._states = out.states
        if self._after_first is not None:
            self._after_first(self._states)
            self._after_first = None
        return out.hidden


class _Graph:
    """A pass in fixed memory."""

    def __init__(
        self, model: FastWeightModel, states: Sequence[FastWeightState], capture: Capture
    ) -> None:
        self._model = model
        self._states = map_tensors(torch.clone, list(states))
        self._memory = _tensors(self._states)
        device = self._memory[0].device
        self.tokens = torch.zeros(states[0].num_streams, 1, dtype=torch.long, device=device)
        self._hidden: Tensor | None = None
        self._replay = capture(self._run)

    def _run(self) -> None:
        self._model.set_input_tensor(None)
        out = self._model(self.tokens, self._states, output_states=True)
        assert out.states is not None
        for memory, after in zip(self._memory, _tensors(out.states), strict=True):
            memory.copy_(after)
        self._hidden = out.hidden

    def load(self, states: Sequence[FastWeightState]) -> None:
        torch._foreach_copy_(self._memory, _tensors(states))

    def step(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        assert hidden is None
        self.tokens.copy_(tokens)
        self._replay()
        assert self._hidden is not None
        return self._hidden


def _difference(graph: _Graph, passes: _Passes, states: Sequence[FastWeightState]) -> float:
    """Of two passes on any tokens, the second from the states that the first left: relative."""
    graph.load(states)
    tokens = torch.zeros_like(graph.tokens)
    expected = torch.stack([passes.step(tokens, None) for _ in range(2)]).float()
    found = torch.stack([graph.step(tokens, None).clone() for _ in range(2)]).float()
    return ((found - expected).norm() / expected.norm()).item()


def _kind(states: Sequence[FastWeightState]) -> str:
    """All but the contents of states."""

    def shape(x: Tensor) -> Any:
        return tuple(x.shape), x.dtype

    return repr(map_tensors(shape, list(states)))


def _tensors(states: Sequence[FastWeightState]) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(keep, list(states))
    return found
