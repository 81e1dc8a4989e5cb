"""`config.json` of flash-linear-attention's and LaCT's models <-> `Architecture`.

Which settings are ignored, refused or required: hf_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refine_mcore.conversion.settings import (
    Key,
    Refused,
    read_setting,
    read_settings,
    refuse_unsupported,
    unread_settings,
    write_settings,
)
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
    MixerOptions,
)


def _invert(value: bool) -> bool:
    return not value


def _positive_or_none(rank: int) -> int | None:
    return rank if rank > 0 else None


def _none_as_minus_one(rank: int | None) -> int:
    return -1 if rank is None else rank


@dataclass(frozen=True)
class FlaFamily:
    """An HF model type: its class, our options, its settings, and the only values of others."""

    class_name: str
    options: type[MixerOptions]
    keys: tuple[Key, ...]
    fixed: dict[str, tuple[Any, ...]]

    @property
    def names(self) -> list[tuple[str, str]]:
        """Our field names and the names in the file."""
        return [(key.field, key.name) for key in (*_SHELL, *self.keys)]

    def unread(self, config: dict[str, Any]) -> list[str]:
        """Settings that `read` does not know."""
        known = {key.name for key in (*_SHELL, *self.keys)} | _SHELL_FIXED.keys()
        known |= self.fixed.keys() | {"intermediate_size", "hidden_ratio"}
        return unread_settings(config, known if self.options is LaCTOptions else known | {"attn"})

    def read(self, config: dict[str, Any], source: str) -> Architecture:
        """The architecture that a `config.json` describes."""
        refuse_unsupported(config, _SHELL_FIXED | self.fixed, source)
        attention = None if self.options is LaCTOptions else config.get("attn")
        shell = read_settings(config, _SHELL, source)
        return Architecture(
            intermediate_size=_intermediate_size(config, shell["hidden_size"], source),
            mixer=self.options(**read_settings(config, self.keys, source)),
            attention=None if attention is None else _attention(attention, source),
            **shell,
        )

    def write(self, architecture: Architecture, model_type: str) -> dict[str, Any]:
        """The inverse of `read`."""
        config: dict[str, Any] = {"architectures": [self.class_name], "model_type": model_type}
        config |= {name: values[0] for name, values in self.fixed.items()}
        config |= {"hidden_act": "swish", "intermediate_size": architecture.intermediate_size}
        config |= write_settings(_SHELL, architecture)
        config |= write_settings(self.keys, architecture.mixer)
        if self.options is not LaCTOptions:
            attention = architecture.attention
            config["attn"] = attention and {
                "layers": list(attention.layers),
                **write_settings(_ATTENTION, attention),
            }
        return config


_SHELL = (
    Key("vocab_size", "vocab_size", int),
    Key("hidden_size", "hidden_size", int),
    Key("num_hidden_layers", "num_layers", int),
    Key("norm_eps", "norm_eps", float, 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", bool, False),
    Key("initializer_range", "initializer_range", float, 0.02),
)
_ATTENTION = (
    Key("num_heads", "num_heads", int),
    Key("num_kv_heads", "num_kv_heads", int, None, nullable=True),
    Key("window_size", "window_size", int, None, nullable=True),
    Key("qkv_bias", "qkv_bias", bool, False),
    Key("rope_theta", "rope_theta", float, 10000.0),
)
_SHELL_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("swish", "silu"),
    "elementwise_affine": (True,),
    "rope_scaling": (None,),
    "attnres_block_size": (None,),
    # of files older than today's classes, which do not read them
    "use_rope": (False, None),
    "rms_norm_eps": (1e-6,),
}
FLA_FAMILIES = {
    "delta_net": FlaFamily(
        "DeltaNetForCausalLM",
        DeltaNetOptions,
        (
            Key("num_heads", "num_heads", int),
            Key("expand_k", "expand_k", float, 1.0),
            Key("expand_v", "expand_v", float, 1.0),
            Key("conv_size", "conv_size", int, 4),
            Key("use_short_conv", "use_short_conv", bool, True),
            Key("use_gate", "use_gate", bool, False),
            Key("use_beta", "use_beta", bool, True),
            Key("allow_neg_eigval", "allow_neg_eigval", bool, False),
            Key("qk_activation", "qk_activation", str, "silu"),
        ),
        {"qk_norm": ("l2",)},
    ),
    "gated_deltanet": FlaFamily(
        "GatedDeltaNetForCausalLM",
        GatedDeltaNetOptions,
        (
            Key("num_heads", "num_heads", int),
            Key("head_dim", "head_dim", int),
            Key("num_v_heads", "num_value_heads", int, None, nullable=True),
            Key("expand_v", "expand_v", float, 2.0),
            Key("conv_size", "conv_size", int, 4),
            Key("use_short_conv", "use_short_conv", bool, True),
            Key("use_gate", "use_gate", bool, True),
            Key("allow_neg_eigval", "allow_neg_eigval", bool, False),
        ),
        {"output_gate_activation": ("swish", "silu")},
    ),
    "lact_swiglu": FlaFamily(
        "LaCTForCausalLM",
        LaCTOptions,
        (
            Key("num_attn_heads", "num_attention_heads", int),
            Key("num_lact_heads", "num_fast_heads", int),
            Key("lact_chunk_size", "chunk_size", int),
            Key("window_size", "window_size", int),
            Key("inter_multi", "inter_multi", float),
            Key("rope_theta", "rope_theta", float),
            Key(
                "w0_w2_low_rank",
                "low_rank",
                int,
                read=_positive_or_none,
                write=_none_as_minus_one,
            ),
            Key("use_momentum", "use_momentum", bool),
            Key("use_muon", "use_muon", bool),
            Key("qkv_silu", "qkv_silu", bool),
            Key("learnable_ttt_scale", "learnable_scale", bool),
            Key("ttt_prenorm", "prenorm", bool, False),
            Key("qkv_bias", "qkv_bias", bool, False),
            Key("attn_qk_norm", "qk_norm", bool, False),
            Key("no_v_silu", "v_silu", bool, False, read=_invert, write=_invert),
            Key("ttt_nope", "fast_rope", bool, False, read=_invert, write=_invert),
            Key("fw_init_gain", "init_gain", float, 0.5),
        ),
        {
            "lr_dim": (1,),
            "lr_parameterization": ("mamba",),
            "ttt_loss_type": ("dot_product",),
            "attention_bias": (False,),
        },
    ),
}


def _intermediate_size(config: dict[str, Any], hidden_size: int, source: str) -> int:
    """The MLP's width; null means 2/3 of hidden_ratio times the width, rounded up to 256."""
    size = read_setting(config, Key("intermediate_size", "", int, None, nullable=True), source)
    if size is not None:
        return size
    ratio = read_setting(config, Key("hidden_ratio", "", float, 4.0), source)
    return -(-int(hidden_size * ratio * 2 / 3) // 256) * 256


def _attention(attention: Any, source: str) -> AttentionOptions:
    """The `attn` entry of a hybrid."""
    if not isinstance(attention, dict):
        raise Refused(f"{source}: attn must be null or hold named settings, got {attention!r}")
    known = {"layers", *(key.name for key in _ATTENTION)}
    for name in attention:
        if name not in known and attention[name]:
            raise Refused(f"{source}: attn.{name} {attention[name]!r} is not supported")
    layers = attention.get("layers")
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise Refused(f"{source}: attn.layers must be a list of layer numbers, got {layers!r}")
    return AttentionOptions(
        tuple(layers), **read_settings(attention, _ATTENTION, f"{source}: attn")
    )
