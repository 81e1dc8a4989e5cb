"""Hugging Face `config.json` <-> `Architecture`, from one table per family.

Settings that change only how a kernel runs (`fuse_*`, `attn_mode`, `use_fused_kernel`,
`fp32_states`) are ignored. Settings that would change the function and that this project does not
compute are refused. A setting that the tensors cannot confirm and that has no settled default
(LaCT's `use_muon`, for one) must be in the file: a wrong guess would load without any error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from refine_mcore.errors import UserError
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
    MixerOptions,
)

_REQUIRED = object()


def _same(value: Any) -> Any:
    return value


def _invert(value: bool) -> bool:
    return not value


def _positive_or_none(rank: int) -> int | None:
    return rank if rank > 0 else None


def _none_as_minus_one(rank: int | None) -> int:
    return -1 if rank is None else rank


@dataclass(frozen=True)
class _Key:
    """One HF setting: its name, our field, its type, its default, and how values translate."""

    name: str
    field: str
    kind: Any  # the type itself
    default: Any = _REQUIRED
    nullable: bool = False
    read: Callable[[Any], Any] = _same
    write: Callable[[Any], Any] = _same


@dataclass(frozen=True)
class _Family:
    """An HF model type: its class, our options, its settings, and the only values of others."""

    class_name: str
    options: type[MixerOptions]
    keys: tuple[_Key, ...]
    fixed: dict[str, tuple[Any, ...]]


_SHELL = (
    _Key("vocab_size", "vocab_size", int),
    _Key("hidden_size", "hidden_size", int),
    _Key("num_hidden_layers", "num_layers", int),
    _Key("norm_eps", "norm_eps", float, 1e-6),
    _Key("tie_word_embeddings", "tie_embeddings", bool, False),
    _Key("initializer_range", "initializer_range", float, 0.02),
)
_ATTENTION = (
    _Key("num_heads", "num_heads", int),
    _Key("num_kv_heads", "num_kv_heads", int, None, nullable=True),
    _Key("window_size", "window_size", int, None, nullable=True),
    _Key("qkv_bias", "qkv_bias", bool, False),
    _Key("rope_theta", "rope_theta", float, 10000.0),
)
_SHELL_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "elementwise_affine": (True,),
    "rope_scaling": (None,),
    "attnres_block_size": (None,),
}
_FAMILIES = {
    "delta_net": _Family(
        "DeltaNetForCausalLM",
        DeltaNetOptions,
        (
            _Key("num_heads", "num_heads", int),
            _Key("expand_k", "expand_k", float, 1.0),
            _Key("expand_v", "expand_v", float, 1.0),
            _Key("conv_size", "conv_size", int, 4),
            _Key("use_short_conv", "use_short_conv", bool, True),
            _Key("use_gate", "use_gate", bool, False),
            _Key("use_beta", "use_beta", bool, True),
            _Key("allow_neg_eigval", "allow_neg_eigval", bool, False),
            _Key("qk_activation", "qk_activation", str, "silu"),
        ),
        {"qk_norm": ("l2",)},
    ),
    "gated_deltanet": _Family(
        "GatedDeltaNetForCausalLM",
        GatedDeltaNetOptions,
        (
            _Key("num_heads", "num_heads", int),
            _Key("head_dim", "head_dim", int),
            _Key("num_v_heads", "num_value_heads", int, None, nullable=True),
            _Key("expand_v", "expand_v", float, 2.0),
            _Key("conv_size", "conv_size", int, 4),
            _Key("use_short_conv", "use_short_conv", bool, True),
            _Key("use_gate", "use_gate", bool, True),
            _Key("allow_neg_eigval", "allow_neg_eigval", bool, False),
        ),
        {},
    ),
    "lact_swiglu": _Family(
        "LaCTForCausalLM",
        LaCTOptions,
        (
            _Key("num_attn_heads", "num_attention_heads", int),
            _Key("num_lact_heads", "num_fast_heads", int),
            _Key("lact_chunk_size", "chunk_size", int),
            _Key("window_size", "window_size", int),
            _Key("inter_multi", "inter_multi", float),
            _Key("rope_theta", "rope_theta", float),
            _Key(
                "w0_w2_low_rank",
                "low_rank",
                int,
                read=_positive_or_none,
                write=_none_as_minus_one,
            ),
            _Key("use_momentum", "use_momentum", bool),
            _Key("use_muon", "use_muon", bool),
            _Key("qkv_silu", "qkv_silu", bool),
            _Key("learnable_ttt_scale", "learnable_scale", bool),
            _Key("ttt_prenorm", "prenorm", bool, False),
            _Key("qkv_bias", "qkv_bias", bool, False),
            _Key("attn_qk_norm", "qk_norm", bool, False),
            _Key("no_v_silu", "v_silu", bool, False, read=_invert, write=_invert),
            _Key("ttt_nope", "fast_rope", bool, False, read=_invert, write=_invert),
            _Key("fw_init_gain", "init_gain", float, 0.5),
        ),
        {
            "lr_dim": (1,),
            "lr_parameterization": ("mamba",),
            "ttt_loss_type": ("dot_product",),
            "attention_bias": (False,),
        },
    ),
}
_NUMBER_LIMIT = 2**40  # larger, infinite or undefined numbers are nobody's sizes or rates
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def architecture_from_hf(config: dict[str, Any], source: str) -> Architecture:
    """The `Architecture` that an HF `config.json` describes.

    `source` names the file in error messages. Raises UserError on an unknown `model_type`, a
    missing or mistyped setting, one this project does not compute, and sizes that do not fit.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UserError(
            f"{source}: unknown model_type {model_type!r}, known: {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[model_type]
    _refuse_unsupported(config, _SHELL_FIXED | family.fixed, source)
    attention = None if family.options is LaCTOptions else config.get("attn")
    try:
        shell = _read(config, _SHELL, source)
        return Architecture(
            intermediate_size=_intermediate_size(config, shell["hidden_size"], source),
            mixer=family.options(**_read(config, family.keys, source)),
            attention=None if attention is None else _attention(attention, source),
            **shell,
        )
    except _Refused as refused:
        raise UserError(str(refused)) from None
    except UserError as error:
        message = str(error)
        for key in (*_SHELL, *family.keys):  # our field names -> the names in the file
            message = re.sub(rf"\b{key.field}\b", key.name, message)
        raise UserError(f"{source}: {message}") from None


def hf_config(architecture: Architecture) -> dict[str, Any]:
    """A `config.json` for `architecture`; `architecture_from_hf` is its inverse.

    LaCT's `muon_dtype` is ours alone and has no place in it.
    """
    model_type, family = next(
        (name, family)
        for name, family in _FAMILIES.items()
        if family.options is type(architecture.mixer)
    )
    config: dict[str, Any] = {"architectures": [family.class_name], "model_type": model_type}
    config |= {name: values[0] for name, values in family.fixed.items()}
    config |= {"hidden_act": "swish", "intermediate_size": architecture.intermediate_size}
    config |= _written(_SHELL, architecture) | _written(family.keys, architecture.mixer)
    if family.options is not LaCTOptions:
        attention = architecture.attention
        config["attn"] = attention and {
            "layers": list(attention.layers),
            **_written(_ATTENTION, attention),
        }
    return config


class _Refused(UserError):
    """Already names the file: not to be prefixed again."""


def _read(config: dict[str, Any], keys: tuple[_Key, ...], source: str) -> dict[str, Any]:
    return {key.field: key.read(_value(config, key, source)) for key in keys}


def _written(keys: tuple[_Key, ...], described: object) -> dict[str, Any]:
    return {key.name: key.write(getattr(described, key.field)) for key in keys}


def _value(config: dict[str, Any], key: _Key, source: str) -> Any:
    value = config.get(key.name, key.default)
    if value is _REQUIRED:
        raise _Refused(f"{source}: {key.name} is missing")
    if value is None and key.nullable:
        return None
    if type(value) is not key.kind and not (key.kind is float and type(value) is int):
        raise _Refused(f"{source}: {key.name} must be {_KIND_NAMES[key.kind]}, got {value!r}")
    if key.kind in (int, float) and not abs(value) < _NUMBER_LIMIT:  # NaN is not less either
        raise _Refused(f"{source}: {key.name} {value!r} is out of range")
    return key.kind(value)


def _refuse_unsupported(
    config: dict[str, Any], supported: dict[str, tuple[Any, ...]], source: str
) -> None:
    for name, values in supported.items():
        if name in config and config[name] not in values:
            only = " or ".join(repr(value) for value in values)
            raise UserError(f"{source}: {name} {config[name]!r} is not supported, only {only}")


def _intermediate_size(config: dict[str, Any], hidden_size: int, source: str) -> int:
    """The MLP's width; null means 2/3 of hidden_ratio times the width, rounded up to 256."""
    size = _value(config, _Key("intermediate_size", "", int, None, nullable=True), source)
    if size is not None:
        return size
    ratio = _value(config, _Key("hidden_ratio", "", float, 4.0), source)
    return -(-int(hidden_size * ratio * 2 / 3) // 256) * 256


def _attention(attention: Any, source: str) -> AttentionOptions:
    """The `attn` entry of a hybrid."""
    if not isinstance(attention, dict):
        raise _Refused(f"{source}: attn must be null or hold named settings, got {attention!r}")
    known = {"layers", *(key.name for key in _ATTENTION)}
    for name in attention:
        if name not in known and attention[name]:
            raise _Refused(f"{source}: attn.{name} {attention[name]!r} is not supported")
    layers = attention.get("layers")
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise _Refused(f"{source}: attn.layers must be a list of layer numbers, got {layers!r}")
    return AttentionOptions(tuple(layers), **_read(attention, _ATTENTION, f"{source}: attn"))
