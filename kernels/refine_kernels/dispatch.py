"""The one place that says which backend runs each operation.

Today that is plain torch for every operation on every device.  The first call of an operation on a
device type is logged, so a run's log says what ran.
"""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from refine_kernels.delta_rule import chunk as _delta_chunk
from refine_kernels.delta_rule import read as _delta_read
from refine_kernels.delta_rule import recurrent as _delta_recurrent
from refine_kernels.delta_rule.chunk import ChunkOutput
from refine_kernels.gated_delta_rule import chunk as _gated_chunk
from refine_kernels.gated_delta_rule import recurrent as _gated_recurrent
from refine_kernels.lact import chunk as _lact
from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.products import Precision
from refine_kernels.rms_norm import rms_norm as _rms_norm
from refine_kernels.short_conv import conv as _conv
from refine_kernels.swiglu import swiglu as _swiglu
from refine_kernels.vocab import log_probs as _log_probs
from refine_kernels.vocab import sampling as _sampling
from refine_kernels.vocab.random import combine_keys, counter_uniform

__all__ = [
    "ChunkOutput",
    "FastWeights",
    "Precision",
    "RowNorms",
    "apply_fast_weights",
    "causal_conv1d",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_lact",
    "combine_keys",
    "counter_uniform",
    "log_probs_and_entropy",
    "recurrent_delta_rule",
    "recurrent_gated_delta_rule",
    "rms_norm",
    "sample_tokens",
    "state_from_writes",
    "swiglu",
    "update_fast_weights",
]

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _log_backend(operation: str, device_type: str) -> None:
    logger.info("%s on %s: torch", operation, device_type)


def _torch_backend(operation: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        _log_backend(operation.__name__, next(tensors).device.type)
        return operation(*args, **kwargs)

    return run


chunk_delta_rule = _torch_backend(_delta_chunk.chunk_delta_rule)
recurrent_delta_rule = _torch_backend(_delta_recurrent.recurrent_delta_rule)
chunk_gated_delta_rule = _torch_backend(_gated_chunk.chunk_gated_delta_rule)
recurrent_gated_delta_rule = _torch_backend(_gated_recurrent.recurrent_gated_delta_rule)
state_from_writes = _torch_backend(_delta_read.state_from_writes)
apply_fast_weights = _torch_backend(_lact.apply_fast_weights)
update_fast_weights = _torch_backend(_lact.update_fast_weights)
chunk_lact = _torch_backend(_lact.chunk_lact)
causal_conv1d = _torch_backend(_conv.causal_conv1d)
rms_norm = _torch_backend(_rms_norm.rms_norm)
swiglu = _torch_backend(_swiglu.swiglu)
log_probs_and_entropy = _torch_backend(_log_probs.log_probs_and_entropy)
sample_tokens = _torch_backend(_sampling.sample_tokens)
