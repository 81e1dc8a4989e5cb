"""What a training step keeps in memory, counted on the CPU: the tensors that one layer and the
output layer save for their backward, and from them the memory of a run on GPUs.

The count holds for the torch forms of the kernels, in the dtype given. What lives only while one
layer runs, the allocator's own overhead and communication buffers are not in it.
"""

from __future__ import annotations

import functools
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refine_mcore.conversion.parameters import checkpoint_shapes, hf_parameter_map
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import FastWeightModel, build_model
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.step.refine_loss import TextBatch, text_pass

_WEIGHT_BYTES = 2  # bfloat16
_GRADIENT_BYTES = 4  # float32, as Megatron gathers them
_OPTIMIZER_BYTES = 12  # float32 weights and Adam's two moments


class SavedTensor(NamedTuple):
    """One piece of memory kept for a backward, however many tensors look at it."""

    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    where: str  # the lines of this project's code that had it saved, the outermost first

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes, {self.dtype} {list(self.shape)}: {self.where}"


def saved_tensors(
    forward: Callable[[], Any], parameters: Iterable[Tensor] = ()
) -> list[SavedTensor]:
    """What `forward()` saves for its backward, the largest first, each storage once and those of
    `parameters` not at all."""
    ignored = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    found: dict[int, SavedTensor] = {}
    alive = []  # a freed address could be given out again

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in found and storage.data_ptr() not in ignored:
            found[storage.data_ptr()] = SavedTensor(
                storage.nbytes(), x.dtype, tuple(x.shape), _place()
            )
            alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    return sorted(found.values(), key=lambda saved: -saved.bytes)


def describe(saved: Iterable[SavedTensor]) -> str:
    """A line for each."""
    return "\n".join(map(str, saved))


def _place() -> str:
    frames = [f for f in traceback.extract_stack() if "refine_" in f.filename]
    return " > ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames[:-1][-6:])


@dataclass(frozen=True)
class SavedBytes:
    """Bytes per token kept for the backward by a layer, the mean of all layers, and by all that is
    not a layer; and what a model of the first layer keeps, the largest first."""

    layer: float
    rest: float
    largest: list[SavedTensor]


def count_saved_bytes(
    architecture: Architecture,
    groups: Any,
    *,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    selective_recompute: bool = False,
) -> SavedBytes:
    """Count over a text of `tokens` tokens: what one more layer of a kind adds is a layer, of each
    kind that a hybrid has. What layers share (rotary tables) is none of a layer's.

    `groups` are those of a single rank. What is made
    again in the backward is not counted, what it is made of is; the tape of a LaCT text holds the
    values its fast weights are written with until its branches have left, counted or not.
    """
    kinds = Counter(map(functools.partial(_kind, architecture), range(architecture.num_layers)))

    @functools.cache
    def count(*layers: _Kind) -> list[SavedTensor]:
        reduced = _of_layers(architecture, layers)
        return _count(reduced, groups, tokens, dtype, selective_recompute)

    first = _kind(architecture, 0)
    one = count(first)
    alone = sum(x.bytes for x in one)
    bytes_of = {}
    for kind in kinds:
        before = [first] if kind == first else [first, kind]
        sums = [sum(x.bytes for x in count(*layers)) for layers in (before, [*before, kind])]
        bytes_of[kind] = sums[1] - sums[0]
    layer = sum(kinds[kind] * kept for kind, kept in bytes_of.items()) / architecture.num_layers
    return SavedBytes(layer / tokens, (alone - bytes_of[first]) / tokens, one)


class _Kind(NamedTuple):
    attention: bool
    post_norm: bool


def _kind(architecture: Architecture, layer: int) -> _Kind:
    return _Kind(architecture.is_attention_layer(layer), layer in architecture.post_norm_layers)


def _of_layers(architecture: Architecture, kinds: Sequence[_Kind]) -> Architecture:
    """The architecture with these layers alone."""
    attended = tuple(index for index, kind in enumerate(kinds) if kind.attention)
    attention = architecture.attention
    return replace(
        architecture,
        num_layers=len(kinds),
        attention=attention and replace(attention, layers=attended),
        post_norm_layers=tuple(index for index, kind in enumerate(kinds) if kind.post_norm),
    )


def _count(
    architecture: Architecture,
    groups: Any,
    tokens: int,
    dtype: torch.dtype,
    selective_recompute: bool,
) -> list[SavedTensor]:
    config = transformer_config(architecture, dtype=dtype, selective_recompute=selective_recompute)
    model: FastWeightModel = build_model(config, groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    ids = torch.zeros(1, tokens, dtype=torch.long)
    batch = TextBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(1))
    with _WithoutProducts():
        return saved_tensors(
            lambda: text_pass(model, batch, with_entropy=True, record=True), model.parameters()
        )


class _WithoutProducts(TorchDispatchMode):
    """Matrix products are zeros: what is kept depends on their shapes, and in bfloat16 a CPU takes
    its time for them."""

    # those alone that make a tensor of the dtype of their factors
    _PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._PRODUCTS:
            return func(*args, **(kwargs or {}))
        left, right = args[-2:]
        return left.new_zeros(*left.shape[:-1], right.shape[-1])


class MemoryEstimate(NamedTuple):
    """Bytes on each GPU."""

    weights_and_gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return sum(self)


def estimate_memory(
    architecture: Architecture,
    counted: SavedBytes,
    *,
    tokens: int,
    data_parallel: int,
) -> MemoryEstimate:
    """Of a bfloat16 run with the optimizer sharded over `data_parallel` GPUs, each with `tokens`
    tokens of text in a micro-batch."""
    shapes = checkpoint_shapes(hf_parameter_map(architecture)).values()
    parameters = sum(math.prod(shape) for shape in shapes)
    return MemoryEstimate(
        parameters * (_WEIGHT_BYTES + _GRADIENT_BYTES),
        parameters * _OPTIMIZER_BYTES / data_parallel,
        tokens * (architecture.num_layers * counted.layer + counted.rest),
    )
