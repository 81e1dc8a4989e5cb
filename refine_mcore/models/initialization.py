"""Random initialisation by checkpoint name, the same at every layout.

Each parameter is drawn whole from a generator seeded by (seed, checkpoint key), and each rank keeps
its shard, so that runs at different tensor- and pipeline-parallel sizes start from the same model.
The distributions are those of the reference implementations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from refine_mcore.models.architecture import Architecture, LaCTOptions
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.sharding import sharded_tensors

_VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
_OUTPUT_NORMS = ("o_norm.weight", "ttt_norm.weight")  # of the mixers, never zero-centred
_LEAST_DECAY = 0.01
_DRAW = Callable[[torch.Generator, tuple[int, ...]], Tensor]


def initialize(model: FastWeightModel, seed: int) -> None:
    """Fill every parameter of this rank from its reference distribution; padding is zero."""
    arch = model.config.arch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for tensor in sharded_tensors(model):
            shape = tensor.global_shape
            if tensor.key in _VOCABULARY_KEYS:  # a padded shape would change the draw
                shape = (arch.vocab_size, *shape[1:])
            generator = torch.Generator().manual_seed(_key_seed(seed, tensor.key))
            whole = _distribution(tensor.key, arch)(generator, shape)
            part = whole[tensor.global_slice()]
            tensor.data[: len(part)].copy_(part)


def _key_seed(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _normal(std: float) -> _DRAW:
    return lambda generator, shape: torch.randn(shape, generator=generator) * std


def _constant(value: float) -> _DRAW:
    return lambda generator, shape: torch.full(shape, value)


def _distribution(key: str, arch: Architecture) -> _DRAW:
    name = key.rpartition("self_attention.")[2] if "self_attention." in key else key
    if name.endswith((".bias", "qk_offset")):
        return _constant(0.0)
    if name == "qk_scale" or name in _OUTPUT_NORMS:
        return _constant(1.0)
    if name.endswith("norm.weight"):
        return _constant(0.0 if arch.layernorm_zero_centered_gamma else 1.0)
    if name == "A_log":
        # the reference draws from 0 on: a head whose A is next to nothing never forgets
        return lambda generator, shape: (
            (torch.rand(shape, generator=generator) * 16).clamp(min=_LEAST_DECAY).log()
        )
    if name == "dt_bias":
        return _inverse_softplus_of_log_uniform
    if isinstance(arch.mixer, LaCTOptions) and name.partition(".")[0] in ("w0", "w1", "w2"):
        return _normal(_fast_weight_std(name, arch.mixer, arch.hidden_size))
    return _normal(arch.initializer_range)


def _fast_weight_std(name: str, options: LaCTOptions, hidden_size: int) -> float:
    dim = options.fast_head_dim(hidden_size)
    if name.endswith("w_left"):
        assert options.low_rank is not None
        return options.init_gain / math.sqrt(options.low_rank)
    if name.endswith("w_right"):
        return options.init_gain / math.sqrt(dim)
    return 1 / math.sqrt(options.fast_hidden_dim(hidden_size) if name == "w1" else dim)


def _inverse_softplus_of_log_uniform(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """softplus^-1 of a step drawn log-uniformly from [1e-3, 0.1]."""
    low, high = math.log(1e-3), math.log(0.1)
    step = (low + (high - low) * torch.rand(shape, generator=generator)).exp()
    return step + torch.log(-torch.expm1(-step))
