"""`config.json` of the hybrids that transformers has, Qwen3.5 and OLMo-Hybrid <-> `Architecture`.

Both are gated delta nets with layers of attention between. What is fixed in the class and not in
the file (norms, gates) is fixed here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
from refine_mcore.models.architecture import Architecture, AttentionOptions, GatedDeltaNetOptions

_SHELL = (
    Key("vocab_size", "vocab_size", int),
    Key("hidden_size", "hidden_size", int),
    Key("num_hidden_layers", "num_layers", int),
    Key("intermediate_size", "intermediate_size", int),
    Key("rms_norm_eps", "norm_eps", float, 1e-6),
    Key("tie_word_embeddings", "tie_embeddings", bool, False),
    Key("initializer_range", "initializer_range", float, 0.02),
)
_LINEAR = (
    Key("linear_num_key_heads", "num_heads", int),
    Key("linear_key_head_dim", "head_dim", int),
    Key("linear_num_value_heads", "num_value_heads", int),
    Key("linear_value_head_dim", "value_head_dim", int),
    Key("linear_conv_kernel_dim", "conv_size", int, 4),
)
_NEGATIVE = Key("linear_allow_neg_eigval", "allow_neg_eigval", bool, True)
_ATTENTION = (
    Key("num_attention_heads", "num_heads", int),
    Key("num_key_value_heads", "num_kv_heads", int, None, nullable=True),
)
_HEAD_DIM = Key("head_dim", "kv_channels", int)
_THETA = Key("rope_theta", "rope_theta", float)
_ROTARY_PERCENT = Key("partial_rotary_factor", "rotary_percent", float, 0.25)
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu", None),  # of the linear layers
    "rope_scaling": (None,),
}
_LAYER_TYPES = ("linear_attention", "full_attention")
_INTERVAL = Key("full_attention_interval", "", int, 4)


@dataclass(frozen=True)
class HybridFamily:
    """An HF model type: its class, settings beside those of all hybrids, and what its class fixes.

    A `wrapped` one is the text model of a larger one, which has its settings under `text_config`.
    """

    class_name: str
    linear: tuple[Key, ...] = _LINEAR
    attention: tuple[Key, ...] = _ATTENTION
    rotary: tuple[Key, ...] = (_THETA,)
    fixed_linear: dict[str, Any] = field(default_factory=dict)
    fixed_attention: dict[str, Any] = field(default_factory=dict)
    zero_centered: bool = False
    post_norm: bool = False  # of the layers of attention
    wrapped: bool = False

    options = GatedDeltaNetOptions

    @property
    def names(self) -> list[tuple[str, str]]:
        """Our field names and the names in the file."""
        keys = (*_SHELL, *self.linear, *self.attention, *self.rotary)
        return [(key.field, key.name) for key in keys]

    def unread(self, config: dict[str, Any]) -> list[str]:
        """Settings that `read` does not know; of a larger model those of its text model."""
        keys = (*_SHELL, *self.linear, *self.attention, *self.rotary, _INTERVAL)
        known = {key.name for key in keys} | _FIXED.keys() | {"rope_parameters", "layer_types"}
        return unread_settings(config["text_config"] if self.wrapped else config, known)

    def read(self, config: dict[str, Any], source: str) -> Architecture:
        """The architecture that a `config.json` describes."""
        if self.wrapped:
            text = config.get("text_config")
            if not isinstance(text, dict):
                raise Refused(f"{source}: text_config must hold named settings, got {text!r}")
            # the embeddings are tied, or not, by the larger model
            outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
            config = text | outer
        refuse_unsupported(config, _FIXED, source)
        shell = read_settings(config, _SHELL, source)
        linear = read_settings(config, self.linear, source)
        linear["expand_v"] = linear.pop("value_head_dim") / max(linear["head_dim"], 1)
        layers = _attention_layers(config, shell["num_layers"], source)
        return Architecture(
            mixer=GatedDeltaNetOptions(**linear, **self.fixed_linear),
            attention=AttentionOptions(
                layers,
                **read_settings(config, self.attention, source),
                **self._rotary(config, source),
                **self.fixed_attention,
            ),
            layernorm_zero_centered_gamma=self.zero_centered,
            post_norm_layers=layers if self.post_norm else (),
            **shell,
        )

    def _rotary(self, config: dict[str, Any], source: str) -> dict[str, Any]:
        """Theta and fraction; older files have them, or one of them, beside the other settings."""
        rope = config.get("rope_parameters")
        if rope is None:
            rope = {}
        if not isinstance(rope, dict):
            raise Refused(f"{source}: rope_parameters must hold named settings, got {rope!r}")
        rope = {key.name: config[key.name] for key in self.rotary if key.name in config} | rope
        where = f"{source}: rope_parameters"
        # sections are of images: a text's positions are equal in all of them
        known = {"rope_type", "mrope_section", "mrope_interleaved", "rope_theta"}
        for name in rope:
            if name not in known | {key.name for key in self.rotary} and rope[name] is not None:
                raise Refused(f"{where}.{name} {rope[name]!r} is not supported")
        refuse_unsupported(rope, {"rope_type": ("default", None)}, where)
        return read_settings(rope, self.rotary, where)

    def write(self, architecture: Architecture, model_type: str) -> dict[str, Any]:
        """The inverse of `read`, of an architecture that has both kinds of layers."""
        attention = architecture.attention
        assert attention is not None
        rope = {"rope_type": "default", **write_settings(self.rotary, attention)}
        config = {
            "hidden_act": "silu",
            "attention_bias": False,
            "pad_token_id": None,  # else OLMo-Hybrid's own, which a smaller vocabulary lacks
            **write_settings(_SHELL, architecture),
            **write_settings(self.linear, architecture.mixer),
            **write_settings(self.attention, attention),
            "rope_parameters": rope,
            "layer_types": [
                _LAYER_TYPES[architecture.is_attention_layer(layer)]
                for layer in range(architecture.num_layers)
            ],
        }
        outer: dict[str, Any] = {"architectures": [self.class_name], "model_type": model_type}
        if not self.wrapped:
            return outer | config
        tied = {"tie_word_embeddings": architecture.tie_embeddings}
        return outer | tied | {"text_config": {"model_type": f"{model_type}_text", **config}}


def _attention_layers(config: dict[str, Any], layers: int, source: str) -> tuple[int, ...]:
    kinds = config.get("layer_types")
    if kinds is None:
        interval = read_setting(config, _INTERVAL, source)
        if interval < 1:
            raise Refused(f"{source}: full_attention_interval must be positive, got {interval}")
        return tuple(range(interval - 1, min(layers, _MOST_LAYERS), interval))
    if not isinstance(kinds, list) or any(kind not in _LAYER_TYPES for kind in kinds):
        raise Refused(
            f"{source}: layer_types must be a list of {' and '.join(_LAYER_TYPES)}, got {kinds!r}"
        )
    if len(kinds) != layers:
        raise Refused(
            f"{source}: layer_types has {len(kinds)} entries, num_hidden_layers is {layers}"
        )
    return tuple(index for index, kind in enumerate(kinds) if kind == _LAYER_TYPES[1])


_MOST_LAYERS = 1 << 16  # no model has more: what is made of a number in a file stays small
_QWEN: dict[str, Any] = {
    "attention": (*_ATTENTION, _HEAD_DIM),
    "rotary": (_THETA, _ROTARY_PERCENT),
    "fixed_attention": {"qk_layernorm": "per_head", "attention_output_gate": True},
    "zero_centered": True,
}
HYBRID_FAMILIES = {
    "qwen3_5_text": HybridFamily("Qwen3_5ForCausalLM", **_QWEN),
    "qwen3_5": HybridFamily("Qwen3_5ForConditionalGeneration", wrapped=True, **_QWEN),
    "olmo_hybrid": HybridFamily(
        "OlmoHybridForCausalLM",
        linear=(*_LINEAR, _NEGATIVE),
        # null: no positions; without the setting transformers rotates, its documentation does not
        rotary=(Key("rope_theta", "rope_theta", float, nullable=True),),
        fixed_linear={"norm_eps": 1e-5},
        fixed_attention={"qk_layernorm": "full_width"},
        post_norm=True,
    ),
}
