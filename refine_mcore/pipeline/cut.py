"""Cuts of the autograd graph: between slices, between a text and its branches.

A pipeline stage runs the backward of a micro-batch in pieces, slice by slice from the last. So what
one piece hands to another - states at the border of two slices, states that branches start from -
crosses as leaves, and the gradients that gather in them start the backward of the piece they came
from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from refine_mcore.models.state import map_tensors, tensors_in

# Where a backward pass starts, and with which gradient (None: known later).
Root = tuple[GradientEdge, Tensor | None]


class Cut:
    """`value` (tensors in tuples, lists, dataclasses) on the far side of a cut: `handed` shares its
    memory and collects gradients.

    A value made without gradients can be handed on as well, if `reconnect` brings the same value
    made with gradients before they are needed. What is a view of something larger is then copied:
    it would keep that alive, which nothing else does.
    """

    def __init__(self, value: Any) -> None:
        self._leaves: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._edges: list[GradientEdge | None] = []
        recomputed = not torch.is_grad_enabled()

        def cut(x: Tensor) -> Tensor:
            leaf = x.detach()
            if recomputed and x.untyped_storage().nbytes() > x.nbytes:
                leaf = leaf.clone()
            leaf.requires_grad_(x.requires_grad or recomputed)
            self._leaves.append(leaf)
            return leaf

        self.handed = map_tensors(cut, value)
        if not recomputed:
            self.reconnect(value)

    def reconnect(self, value: Any) -> None:
        """Send the gradients to `value`, the one handed on or its like."""
        self._edges = [get_gradient_edge(x) if x.requires_grad else None for x in tensors_in(value)]

    def close(self) -> None:
        """All gradients are there: keep them, and let go of the value."""
        self._gradients += [leaf.grad for leaf in self._leaves]
        self._leaves, self.handed = [], None

    def roots(self) -> list[Root]:
        """Where backward goes on, and with which gradients; closes the cut."""
        self.close()
        return [
            (edge, gradient)
            for edge, gradient in zip(self._edges, self._gradients, strict=True)
            if edge is not None and gradient is not None
        ]


def run_backward(roots: list[Root]) -> None:
    """One autograd pass from all roots."""
    edges, gradients = zip(*roots, strict=True)
    torch.autograd.backward(edges, gradients)
