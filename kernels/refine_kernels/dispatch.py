"""The one place that says which backend runs each operation.

Plain torch, but for the chunk forms of the delta rules on CUDA: Triton.  `use` chooses theirs on
any device.  The first call of an operation on a device type is logged, so a run's log says what
ran.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

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
from refine_kernels.vocab import linear as _linear
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
    "linear_log_probs_and_entropy",
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

_WANTED = {"delta_rule": "auto"}


@functools.cache
def _log_backend(operation: str, device_type: str, backend: str = "torch") -> None:
    logger.info("%s on %s: %s", operation, device_type, backend)


def _torch_backend(operation: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(operation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        _log_backend(operation.__name__, next(tensors).device.type)
        return operation(*args, **kwargs)

    return run


def use(*, delta_rule: str = "auto") -> None:
    """From now on in this process run this form of an operation: "torch", "triton" (torch where it
    does not fit), or "auto", by the device."""
    if delta_rule not in ("auto", "torch", "triton"):
        raise ValueError(f"delta_rule is {delta_rule!r}, must be 'auto', 'torch' or 'triton'")
    _WANTED["delta_rule"] = delta_rule


def delta_rule_backend(device_type: str) -> str:
    """Which form of the delta rules is wanted on devices of this type, "torch" or "triton"."""
    wanted = _WANTED["delta_rule"]
    if wanted == "auto":
        return "triton" if device_type == "cuda" else "torch"
    return wanted


def _delta_rule(torch_form: Callable[P, R]) -> Callable[P, R]:
    """Triton where it is wanted and takes the arguments, which begin q, k, v, beta[, g]."""
    name, gated = torch_form.__name__, torch_form is _gated_chunk.chunk_gated_delta_rule

    @functools.wraps(torch_form)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        k, v = (args[i] if len(args) > i else kwargs[x] for i, x in ((1, "k"), (2, "v")))
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        device = v.device.type
        wanted = delta_rule_backend(device)
        if wanted == "torch":
            _log_backend(name, device)
            return torch_form(*args, **kwargs)
        why: str | None = "triton is not installed"
        if importlib.util.find_spec("triton") is not None:
            from refine_kernels.delta_rule import triton_chunk

            options: dict[str, Any] = {
                x: kwargs[x] for x in ("qk_norm_eps", "chunk_size") if x in kwargs
            }
            why = triton_chunk.refusal(k, v, gated=gated, **options)
        if why is not None:
            _log_backend(name, device, f"torch, as {why}")
            return torch_form(*args, **kwargs)
        _log_backend(name, device, "triton")
        return getattr(triton_chunk, name)(*args, **kwargs)

    return run


chunk_delta_rule = _delta_rule(_delta_chunk.chunk_delta_rule)
recurrent_delta_rule = _torch_backend(_delta_recurrent.recurrent_delta_rule)
chunk_gated_delta_rule = _delta_rule(_gated_chunk.chunk_gated_delta_rule)
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
linear_log_probs_and_entropy = _torch_backend(_linear.linear_log_probs_and_entropy)
