"""The one place that says which backend runs each operation.

On CUDA Triton, or for attention FlashAttention, for those that have such a form, plain torch
otherwise; `use` chooses on any device, also flash-linear-attention.
The first call of an operation on a device type is logged, so a run's log says what ran.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

from torch import Tensor

from refine_kernels.attention import branches as _branches
from refine_kernels.attention import decode as _decode
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
from refine_kernels.lact.chunk import ChunkWeights
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
    "ChunkWeights",
    "FastWeights",
    "Precision",
    "RowNorms",
    "apply_fast_weights",
    "attention_and_fast_features",
    "branch_attention",
    "causal_conv1d",
    "chunk_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_lact",
    "combine_keys",
    "counter_uniform",
    "decode_attention",
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

# What `use` can choose: operations that have other forms than torch's, first the one for a GPU.
CHOICES = {
    "attention": ("flash",),
    "branches": ("triton",),
    "delta_rule": ("triton", "fla"),
    "lact": ("triton",),
    "rms_norm": ("triton",),
    "rotary": ("triton",),
    "short_conv": ("triton",),
    "swiglu": ("triton",),
    "vocabulary": ("triton",),
}
ON_A_GPU = {name: forms[0] for name, forms in CHOICES.items()}
_WANTED = dict.fromkeys(CHOICES, "auto")
_RAN: dict[tuple[str, str], str] = {}


def use(**forms: str) -> None:
    """From now on in this process run this form of these operations: "torch", one of `CHOICES`
    (where it does not fit the one for a GPU, where that does not, torch), or "auto", by the device;
    all others by the device."""
    for name, form in forms.items():
        if name not in CHOICES:
            raise ValueError(f"{name} is not one of {', '.join(CHOICES)}")
        known = ("auto", "torch", *CHOICES[name])
        if form not in known:
            raise ValueError(f"{name} is {form!r}, must be one of {', '.join(map(repr, known))}")
    for name in CHOICES:
        _WANTED[name] = forms.get(name, "auto")
    _RAN.clear()


def backend(name: str, device_type: str) -> str:
    """Which form of the operations of this name is wanted on devices of this type."""
    wanted = _WANTED[name]
    if wanted == "auto":
        return ON_A_GPU[name] if device_type == "cuda" else "torch"
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
    torch_form: Callable[P, R], name: str | None = None, *, or_torch: bool = True, **modules: str
) -> Callable[P, R]:
    """Another form where it is wanted and takes the arguments, otherwise torch's.

    Each form is in its module under the same name, and beside it `refusal`, which says of the same
    arguments why it would not take them. Where none takes them and there is nothing `or_torch`, the
    call raises RuntimeError.
    """
    operation = torch_form.__name__

    @functools.wraps(torch_form)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device.type
        reason = ""
        for form in _wanted(name, device):
            if form not in modules:
                continue
            why = _without_triton(device) if form == "triton" else None
            if why is None:
                module = importlib.import_module(f"refine_kernels.{modules[form]}")
                why = module.refusal(*args, **kwargs)
                if why is None:
                    _record(operation, device, f"{form}{reason}")
                    return getattr(module, operation)(*args, **kwargs)
            reason = f", as {why}"
        if not or_torch:
            raise RuntimeError(f"{operation} on {device} is for kernels{reason or ', not wanted'}")
        _record(operation, device, f"torch{reason}")
        return torch_form(*args, **kwargs)

    return run


def _wanted(name: str | None, device_type: str) -> Sequence[str]:
    """Which forms to try before torch's."""
    form = "torch" if name is None else backend(name, device_type)
    if name is None or form == "torch":
        return ()
    return (form,) if form == ON_A_GPU[name] else (form, ON_A_GPU[name])


@functools.cache
def _without_triton(device_type: str) -> str | None:
    """Why Triton does not run on this type of device here, None if it does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU Triton runs in its interpreter alone, with TRITON_INTERPRET=1"
    return None


_text = partial(
    _operation, name="delta_rule", triton="delta_rule.triton_chunk", fla="delta_rule.fla_chunk"
)
_token = partial(_operation, name="delta_rule", triton="delta_rule.triton_recurrent")
_lact_chunk = partial(_operation, name="lact", triton="lact.triton_forms")
_rows = partial(_operation, name="vocabulary", triton="vocab.triton_rows")

text_attention = _operation(_sdpa.text_attention, "attention", flash="attention.flash")
branch_attention = _operation(
    _branches.branch_attention, "branches", triton="attention.triton_branches"
)
decode_attention = _operation(
    _decode.decode_attention, "branches", or_torch=False, triton="attention.triton_decode"
)
chunk_delta_rule = _text(_delta_chunk.chunk_delta_rule)
recurrent_delta_rule = _token(_delta_recurrent.recurrent_delta_rule)
chunk_gated_delta_rule = _text(_gated_chunk.chunk_gated_delta_rule)
recurrent_gated_delta_rule = _token(_gated_recurrent.recurrent_gated_delta_rule)
state_from_writes = _operation(
    _delta_read.state_from_writes, "delta_rule", triton="delta_rule.triton_read"
)
delta_gates = _operation(_gates.delta_gates, "delta_rule", triton="delta_gates.triton_gates")
apply_fast_weights = _lact_chunk(_lact.apply_fast_weights)
update_fast_weights = _lact_chunk(_lact.update_fast_weights)
chunk_lact = _lact_chunk(_lact.chunk_lact)
attention_and_fast_features = _operation(
    _features.attention_and_fast_features, "lact", triton="lact.triton_features"
)
causal_conv1d = _operation(_conv.causal_conv1d, "short_conv", triton="short_conv.triton_conv")
rms_norm = _operation(_rms_norm.rms_norm, "rms_norm", triton="rms_norm.triton_rms_norm")
rotate = _operation(_rotary.rotate, "rotary", triton="rotary.triton_rotary")
swiglu = _operation(_swiglu.swiglu, "swiglu", triton="swiglu.triton_swiglu")
log_probs_and_entropy = _rows(_log_probs.log_probs_and_entropy)
sample_tokens = _operation(_sampling.sample_tokens, "vocabulary", triton="vocab.triton_sampling")
linear_log_probs_and_entropy = _rows(_linear.linear_log_probs_and_entropy)
