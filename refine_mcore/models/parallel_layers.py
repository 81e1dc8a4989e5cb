"""What the mixers need beside Megatron's own parallel layers.

* `PackedColumnParallelLinear`: several projections of one input as a single column-parallel matrix
  (one GEMM, one gather under sequence parallelism, one all-reduce of the input gradient), each rank
  holding its heads' rows of every part. Checkpoints name the parts, so that they reshard.
* `PackedConvolution`: the same for the taps of short convolutions.
* `RMSNorm`: Megatron's torch norm refuses sequence parallelism.
* `SwiGLU`: Megatron's own keeps three more tensors of the MLP's width, or has to be compiled.
* Helpers for parameters that Megatron has no layer for: sharded by rows, or replicated per-head
  gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from refine_kernels.dispatch import rms_norm, swiglu
from refine_kernels.recompute import recomputed, remade
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where it is wider: numerics never go below their input."""
    return torch.promote_types(dtype, torch.float32)


def row_sharded_parameter(
    shape: tuple[int, ...], config: TransformerConfig, dtype: torch.dtype | None = None
) -> torch.nn.Parameter:
    """An uninitialised parameter whose dim 0 is this rank's share of a tensor-parallel split, in
    `dtype` or else that of the configuration."""
    dtype = config.params_dtype if dtype is None else dtype
    parameter = torch.nn.Parameter(
        torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    )
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


def mark_sharded_weights(model: torch.nn.Module) -> None:
    """Mark the weights of Megatron's parallel layers as shards, so that gradient norms count all of
    them.

    Megatron marks them while it initialises them, which this project does by name instead; a weight
    without the mark passes for a replica, and only the first rank's share of its gradient would be
    counted.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            if module.weight is not None:  # None: an output layer tied to the embedding
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def replicated_parameter(shape: tuple[int, ...], config: TransformerConfig) -> torch.nn.Parameter:
    """An uninitialised parameter that every tensor-parallel rank holds whole: a gain, in at least
    float32, since an update of one is far below the precision of bfloat16 around 1.

    Read it through `shared_by_heads` inside the tensor-parallel region: each rank sees only its own
    heads' gradient, and that summed exactly once is the right one, with and without sequence
    parallelism.
    """
    dtype = at_least_float32(config.params_dtype)
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()))


def shared_by_heads(parameter: Tensor, tp_group: torch.distributed.ProcessGroup) -> Tensor:
    """A replicated parameter as used by this rank's heads: identity forward, summed over ranks
    backward."""
    return copy_to_tensor_model_parallel_region(parameter, group=tp_group)


def norm_gain(weight: Tensor, zero_centered: bool) -> Tensor:
    """The gain of a norm whose checkpoint holds `weight`, in at least float32 as that is."""
    return 1 + weight if zero_centered else weight


def with_zero_gradients(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """x; backward gives every one of `parameters` a gradient of zeros.

    For parameters that a short text does not use: Megatron's overlapped gradient reduction waits
    until each has had a gradient.
    """
    return _ZeroGradients.apply(x, *parameters)


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *map(torch.zeros_like, ctx.saved_tensors)


def full_width_norm(
    x: Tensor, gain: Tensor, eps: float, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """RMS norm of x [..., width / tp] over the last dimensions of all ranks, with this rank's part
    of the gain; the mean square and its gradient are summed over ranks."""
    square = recomputed(_sum_of_squares, x)
    square = reduce_from_tensor_model_parallel_region(square, group=tp_group)
    square = copy_to_tensor_model_parallel_region(square, group=tp_group)
    mean = square / (x.shape[-1] * tp_group.size())
    return recomputed(_scaled, x, torch.rsqrt(mean + eps), gain)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Over the last dimension, kept as 1, in at least float32."""
    return x.to(at_least_float32(x.dtype)).square().sum(dim=-1, keepdim=True)


def _scaled(x: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
    """x * factor * weight in the dtype of the factor, returned in that of x."""
    return (x.to(factor.dtype) * factor * weight).to(x.dtype)


class RMSNorm(torch.nn.Module):
    """RMS norm over the hidden dimension of [s, b, h], of gain w, or 1 + w if that is zero-centred;
    under sequence parallelism the gradient of w is summed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = replicated_parameter((hidden_size,), config)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return remade(rms_norm, x, norm_gain(self.weight, self.zero_centered), self.eps)


class SwiGLU(MegatronModule):
    """silu(gate) * up of the MLP's first projection [s, b, 2 m] = [gate | up]."""

    def forward(self, x: Tensor) -> Tensor:
        return remade(swiglu, x)


@dataclass(frozen=True)
class Projection:
    """One part of a packed projection: its checkpoint name, its width over all ranks, whether it
    has a bias, and whether that is held in at least float32: then the part comes in it too."""

    name: str
    size: int
    bias: bool = False
    precise_bias: bool = False


def _bias_name(projection: str) -> str:
    return f"{projection}_bias"


# Columns that a packed product's are padded to a multiple of: a few heads' gates beside the rest
# leave rows that begin anywhere, which a GPU's library multiplies with slower kernels and of which
# others load a number at a time.
_COLUMNS = 16


class PackedColumnParallelLinear(MegatronModule):
    """y_i = x W_i^T (+ b_i) for several parts i, as one column-parallel product; rows of each part
    are sharded.

    forward: [s, b, h] (s / tp under sequence parallelism) -> [s, b, sum of `widths`], without
    biases: the local sizes of the parts, and padding that nobody reads and no checkpoint has.
    `split` cuts that into the parts and adds the biases.
    """

    def __init__(
        self,
        linear: ModuleSpec | type,
        config: TransformerConfig,
        projections: list[Projection],
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.projections = projections
        ranks = tp_group.size()
        self.local_sizes = [projection.size // ranks for projection in projections]
        self.padding = -sum(self.local_sizes) % _COLUMNS
        self.linear = build_module(
            linear,
            config.hidden_size,
            sum(self.widths) * ranks,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=tp_group,
        )
        with torch.no_grad():
            self.linear.weight[sum(self.local_sizes) :].zero_()
        self.biases: list[str] = []
        for projection, size in zip(projections, self.local_sizes, strict=True):
            if projection.bias:  # held directly: overlapped parameter gathers go by module
                self.biases.append(projection.name)
                dtype = config.params_dtype
                if projection.precise_bias:
                    dtype = at_least_float32(dtype)
                bias = row_sharded_parameter((size,), config, dtype)
                self.register_parameter(_bias_name(projection.name), bias)

    @property
    def widths(self) -> list[int]:
        """Columns of the parts and of the padding, if there is some."""
        return self.local_sizes + [self.padding] * (self.padding > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[0]

    def split(self, packed: Tensor, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """The parts by name, but those `without`, each [..., local size], views of `packed` unless
        they have a bias."""
        parts = _Split.apply(packed, self.widths)
        named = {p.name: part for p, part in zip(self.projections, parts, strict=False)}
        return {
            name: part + self.bias(name) if name in self.biases else part
            for name, part in named.items()
            if name not in without
        }

    def bias(self, name: str) -> Tensor:
        """This rank's rows of the bias of a part."""
        return getattr(self, _bias_name(name))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Each part under its own checkpoint name beside this module: `…q_proj.weight`, not
        `…in_proj.linear.weight`."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        dp_group = metadata["dp_cp_group"]
        siblings = prefix.removesuffix(".").rpartition(".")[0] + "."
        sharded: ShardedStateDict = _sharded_parts(
            prefix,
            "linear.weight",
            self.linear.weight,
            [f"{projection.name}.weight" for projection in self.projections],
            self.local_sizes,
            sharded_offsets,
            (self.tp_group, dp_group),
        )
        for name in self.biases:
            sharded[f"{prefix}{_bias_name(name)}"] = make_tp_sharded_tensor_for_checkpoint(
                self.bias(name),
                f"{siblings}{name}.bias",
                0,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=dp_group,
            )
        return sharded


class _Split(torch.autograd.Function):
    """torch.split over the last dimension, whose backward makes no zeros anew for parts that nobody
    used, as there are in every layer."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        parts = torch.split(packed, widths, dim=-1)
        ctx.shapes = [part.shape for part in parts]
        ctx.like = packed.dtype, packed.device
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        pairs = zip(grads, ctx.shapes, strict=True)
        parts = [_zeros(shape, *ctx.like) if grad is None else grad for grad, shape in pairs]
        return torch.cat(parts, -1), None


@lru_cache(maxsize=8)
def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not to be written to."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)


class PackedConvolution(MegatronModule):
    """The taps [sum of local sizes, 1, width] of a depthwise convolution over several parts, which
    checkpoints name one by one, each of this rank's channels.

    One parameter for all: they have one gradient, and need not be joined to be used. They are read
    by the forward, before which Megatron may have to gather what an optimizer step has changed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        names: Sequence[str],
        local_sizes: Sequence[int],
        width: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.names, self.local_sizes, self.tp_group = names, local_sizes, tp_group
        self.weight = row_sharded_parameter((sum(local_sizes), 1, width), config)

    def forward(self) -> Tensor:
        return self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        dp_group = ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]
        return _sharded_parts(
            prefix,
            "weight",
            self.weight,
            [f"{name}.weight" for name in self.names],
            self.local_sizes,
            sharded_offsets,
            (self.tp_group, dp_group),
        )


def _sharded_parts(
    prefix: str,
    path: str,
    packed: torch.nn.Parameter,
    names: Sequence[str],
    local_sizes: Sequence[int],
    sharded_offsets: tuple,
    groups: tuple[torch.distributed.ProcessGroup, torch.distributed.ProcessGroup],
) -> ShardedStateDict:
    """The parameter at `path` in the module of this prefix, whose rows are those of several parts
    and maybe padding, zeros: each part under its own name beside the module. `groups` are of tensor
    and of data parallelism."""
    tp_group, dp_group = groups
    key, depth = f"{prefix}{path}", path.count(".") + 2
    rows = sum(local_sizes)

    def build(key: str, packed: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
        assert flattened_range is None, "packed parameters are saved whole"
        start = key.rsplit(".", depth)[0]  # an optimizer's key begins with a name of its own
        parts = torch.split(packed.detach()[:rows], list(local_sizes), dim=0)
        return [
            make_tp_sharded_tensor_for_checkpoint(
                part,
                f"{start}.{name}",
                0,
                replica_id=replica_id,
                prepend_offsets=sharded_offsets,
                tp_group=tp_group,
                dp_cp_group=dp_group,
            )
            for name, part in zip(names, parts, strict=True)
        ]

    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat([*parts, packed.new_zeros(packed.shape[0] - rows, *packed.shape[1:])])

    return {key: ShardedTensorFactory(key, packed, build, merge, (0, 0, dp_group.rank()))}


class MixerModule(MegatronModule):
    """Base of the sequence mixers.

    `raw_parameters` maps the attribute name of each parameter held directly to its name in
    checkpoints; those in `row_sharded` are saved as shards of dim 0, the others as replicas.
    """

    raw_parameters: dict[str, str] = {}
    row_sharded: frozenset[str] = frozenset()

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.tp_size = tp_group.size()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 0 for name in own if name in self.row_sharded},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in own:
            sharded[f"{prefix}{name}"].key = f"{prefix}{self.raw_parameters[name]}"
        for name, module in self.named_children():
            sharded |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded
