"""The one place that says which backend runs each operation.

On CUDA Triton, or for attention FlashAttention, for those that have such a form, plain torch
otherwise; `use` chooses on any device.
The first call of an operation on a device type is logged, so a run's log says what ran.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor

from refine_kernels.attention import sdpa as _sdpa
from refine_kernels.delta_gates import gates as _gates
from refine_kernels.delta_rule import chunk as _delta_chunk
from refine_kernels.delta_rule import read as _delta_read
from refine_kernels.delta_rule import recurrent as _delta_recurrent
from refine_kernels.delta_rule.chunk import ChunkOutput
from refine_kernels.gated_delta_rule import chunk as _gated_chunk
from refine_kernels.gated_delta_rule import recurrent as _gated_recurrent
from refine_kernels.lact import chunk as _lact
from refine_kernels.lact import features as _features
from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.products import Precision
from refine_kernels.rms_norm import rms_norm as _rms_norm
from refine_kernels.rotary import rotary as _rotary
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
    "fast_features",
    "linear_log_probs_and_entropy",
    "delta_gates",
    "log_probs_and_entropy",
    "recurrent_delta_rule",
    "recurrent_gated_delta_rule",
    "rms_norm",
    "rotate",
    "sample_tokens",
    "state_from_writes",
    "swiglu",
    "text_attention",
    "update_fast_weights",
]

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

# What `use` can choose: operations that have another form than torch's, and its name.
CHOICES = {
    "attention": "flash",
    "delta_rule": "triton",
    "lact": "triton",
    "rms_norm": "triton",
    "rotary": "triton",
    "short_conv": "triton",
    "swiglu": "triton",
    "vocabulary": "triton",
}
_WANTED = dict.fromkeys(CHOICES, "auto")
_RAN: dict[tuple[str, str], str] = {}


def use(**forms: str) -> None:
    """From now on in this process run this form of these operations: "torch", the other one that
    `CHOICES` says (torch where it does not fit), or "auto", by the device; all others by the
    device."""
    for name, form in forms.items():
        if name not in CHOICES:
            raise ValueError(f"{name} is not one of {', '.join(CHOICES)}")
        if form not in ("auto", "torch", CHOICES[name]):
            raise ValueError(f"{name} is {form!r}, must be 'auto', 'torch' or {CHOICES[name]!r}")
    for name in CHOICES:
        _WANTED[name] = forms.get(name, "auto")
    _RAN.clear()


def backend(name: str, device_type: str) -> str:
    """Which form of the operations of this name is wanted on devices of this type."""
    wanted = _WANTED[name]
    if wanted == "auto":
        return CHOICES[name] if device_type == "cuda" else "torch"
    return wanted


def ran() -> dict[str, str]:
    """What has run in this process since `use` chose: of each operation on each type of device the
    form, and why not the one that was wanted."""
    return {f"{operation} on {device}": form for (operation, device), form in sorted(_RAN.items())}


def _record(operation: str, device_type: str, backend: str = "torch") -> None:
    _RAN[operation, device_type] = backend
    _log_backend(operation, device_type, backend)


@functools.cache
def _log_backend(operation: str, device_type: str, backend: str) -> None:
    logger.info("%s on %s: %s", operation, device_type, backend)


def _operation(
    torch_form: Callable[P, R], name: str | None = None, module: str = ""
) -> Callable[P, R]:
    """The other form where it is wanted and takes the arguments, otherwise torch's.

    The other form is in ``module`` under the same name, and beside it `refusal`, which says of the
    same arguments why it would not take them.
    """
    operation = torch_form.__name__

    @functools.wraps(torch_form)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        if name is None or backend(name, device) == "torch":
            _record(operation, device)
            return torch_form(*args, **kwargs)
        why = _without_triton(device) if CHOICES[name] == "triton" else None
        if why is None:
            others = importlib.import_module(f"refine_kernels.{module}")
            why = others.refusal(*args, **kwargs)
            if why is None:
                _record(operation, device, CHOICES[name])
                return getattr(others, operation)(*args, **kwargs)
        _record(operation, device, f"torch, as {why}")
        return torch_form(*args, **kwargs)

    return run


@functools.cache
def _without_triton(device_type: str) -> str | None:
    """Why Triton does not run on this type of device here, None if it does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU Triton runs in its interpreter alone, with TRITON_INTERPRET=1"
    return None


_CHUNK = ("delta_rule", "delta_rule.triton_chunk")
_RECURRENT = ("delta_rule", "delta_rule.triton_recurrent")
_LACT = ("lact", "lact.triton_forms")
_ROWS = ("vocabulary", "vocab.triton_rows")

text_attention = _operation(_sdpa.text_attention, "attention", "attention.flash")
chunk_delta_rule = _operation(_delta_chunk.chunk_delta_rule, *_CHUNK)
recurrent_delta_rule = _operation(_delta_recurrent.recurrent_delta_rule, *_RECURRENT)
chunk_gated_delta_rule = _operation(_gated_chunk.chunk_gated_delta_rule, *_CHUNK)
recurrent_gated_delta_rule = _operation(_gated_recurrent.recurrent_gated_delta_rule, *_RECURRENT)
state_from_writes = _operation(
    _delta_read.state_from_writes, "delta_rule", "delta_rule.triton_read"
)
delta_gates = _operation(_gates.delta_gates, "delta_rule", "delta_gates.triton_gates")
apply_fast_weights = _operation(_lact.apply_fast_weights, *_LACT)
update_fast_weights = _operation(_lact.update_fast_weights, *_LACT)
chunk_lact = _operation(_lact.chunk_lact, *_LACT)
fast_features = _operation(_features.fast_features, "lact", "lact.triton_features")
causal_conv1d = _operation(_conv.causal_conv1d, "short_conv", "short_conv.triton_conv")
rms_norm = _operation(_rms_norm.rms_norm, "rms_norm", "rms_norm.triton_rms_norm")
rotate = _operation(_rotary.rotate, "rotary", "rotary.triton_rotary")
swiglu = _operation(_swiglu.swiglu, "swiglu", "swiglu.triton_swiglu")
log_probs_and_entropy = _operation(_log_probs.log_probs_and_entropy, *_ROWS)
sample_tokens = _operation(_sampling.sample_tokens, "vocabulary", "vocab.triton_sampling")
linear_log_probs_and_entropy = _operation(_linear.linear_log_probs_and_entropy, *_ROWS)
