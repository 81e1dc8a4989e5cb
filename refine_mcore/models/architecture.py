"""What a fast-weight language model *is*: family, sizes and options, and nothing about how it is
run. Options that Megatron's `TransformerConfig` knows too have its names.

An `Architecture` is plain data. Presets and Hugging Face configs produce one, a checkpoint carries
one as JSON, and `transformer_config.py` joins it with a run's dtype and parallel sizes. This module
imports neither torch nor Megatron, so that tools can check what they were given before anything
heavy is loaded.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from refine_mcore.errors import UserError


@dataclass(frozen=True)
class DeltaNetOptions:
    """DeltaNet mixer (fla `delta_net`): S_t = S_{t-1} + k_t (x) beta_t (v_t - S_{t-1}^T k_t)."""

    family: ClassVar[str] = "delta_net"

    num_heads: int
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int = 4
    use_short_conv: bool = True
    use_gate: bool = False
    use_beta: bool = True
    allow_neg_eigval: bool = False
    qk_activation: str = "silu"

    def key_head_dim(self, hidden_size: int) -> int:
        return _whole(
            hidden_size * self.expand_k / self.num_heads, "expand_k * hidden_size / num_heads"
        )

    def value_head_dim(self, hidden_size: int) -> int:
        return _whole(
            hidden_size * self.expand_v / self.num_heads, "expand_v * hidden_size / num_heads"
        )

    def validate(self, hidden_size: int) -> None:
        _positive(num_heads=self.num_heads, conv_size=self.conv_size)
        self.key_head_dim(hidden_size)
        self.value_head_dim(hidden_size)
        _one_of("qk_activation", self.qk_activation, ("silu", "identity"))


@dataclass(frozen=True)
class GatedDeltaNetOptions:
    """GatedDeltaNet mixer (fla `gated_deltanet`): the delta rule on a state that decays by exp(g_t)
    first."""

    family: ClassVar[str] = "gated_delta_net"

    num_heads: int
    head_dim: int
    num_value_heads: int | None = None
    expand_v: float = 2.0
    conv_size: int = 4
    use_short_conv: bool = True
    use_gate: bool = True
    allow_neg_eigval: bool = False
    norm_eps: float | None = None  # of the output norm; None: the model's

    @property
    def value_heads(self) -> int:
        return self.num_value_heads or self.num_heads

    @property
    def value_head_dim(self) -> int:
        return _whole(self.head_dim * self.expand_v, "head_dim * expand_v")

    def validate(self, hidden_size: int) -> None:
        del hidden_size  # key and value widths are free of it
        _positive(num_heads=self.num_heads, head_dim=self.head_dim, conv_size=self.conv_size)
        _divides("num_heads", self.num_heads, "num_value_heads", self.value_heads)
        _positive(value_head_dim=self.value_head_dim)


@dataclass(frozen=True)
class LaCTOptions:
    """LaCT mixer (`lact_swiglu`): window attention plus a SwiGLU fast-weight network updated chunk
    by chunk."""

    family: ClassVar[str] = "lact"

    num_attention_heads: int
    num_fast_heads: int
    chunk_size: int
    window_size: int
    inter_multi: float = 1.0
    rope_theta: float = 10000.0
    low_rank: int | None = None  # rank of the factored w0 and w2; None: full parameters
    use_momentum: bool = False
    use_muon: bool = False
    muon_dtype: str = "float32"  # of Newton-Schulz; the reference code always casts to bfloat16
    prenorm: bool = False
    qkv_bias: bool = False
    qkv_silu: bool = True
    v_silu: bool = True
    qk_norm: bool = False
    fast_rope: bool = True
    learnable_scale: bool = True
    init_gain: float = 0.5

    def fast_head_dim(self, hidden_size: int) -> int:
        return hidden_size // self.num_fast_heads

    def fast_hidden_dim(self, hidden_size: int) -> int:
        return int(self.fast_head_dim(hidden_size) * self.inter_multi)

    def validate(self, hidden_size: int) -> None:
        _positive(
            num_attention_heads=self.num_attention_heads,
            num_fast_heads=self.num_fast_heads,
            chunk_size=self.chunk_size,
            window_size=self.window_size,
        )
        _divides("num_attention_heads", self.num_attention_heads, "hidden_size", hidden_size)
        _divides("num_fast_heads", self.num_fast_heads, "hidden_size", hidden_size)
        _rotatable(hidden_size // self.num_attention_heads)
        if self.low_rank is not None:
            _positive(low_rank=self.low_rank)
        _positive(fast_hidden_dim=self.fast_hidden_dim(hidden_size))
        _one_of("muon_dtype", self.muon_dtype, ("float32", "bfloat16"))


MixerOptions = DeltaNetOptions | GatedDeltaNetOptions | LaCTOptions
MIXER_OPTIONS: dict[str, type[MixerOptions]] = {
    options.family: options for options in (DeltaNetOptions, GatedDeltaNetOptions, LaCTOptions)
}


@dataclass(frozen=True)
class AttentionOptions:
    """Softmax attention that replaces the mixer in the listed (0-based) layers of a hybrid."""

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int | None = None
    window_size: int | None = None
    qkv_bias: bool = False
    rope_theta: float | None = 10000.0  # None: no positions
    rotary_percent: float = 1.0  # of a head's dimensions, the first ones, that are rotated
    kv_channels: int | None = None  # a head's width; None: hidden_size / num_heads
    # RMS norm of q and k before they are rotated: of each head, with one gain for all of them, or
    # over all heads together
    qk_layernorm: str = "none"
    # q_proj makes a gate beside each head's query; sigmoid of it multiplies the head's output
    attention_output_gate: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def head_dim(self, hidden_size: int) -> int:
        return self.kv_channels or hidden_size // self.num_heads

    def rotary_dim(self, hidden_size: int) -> int:
        """How many dimensions of a head are rotated."""
        if self.rope_theta is None:
            return 0
        return int(self.head_dim(hidden_size) * self.rotary_percent)

    def validate(self, hidden_size: int, num_layers: int) -> None:
        _positive(num_heads=self.num_heads, num_kv_heads=self.kv_heads)
        if self.kv_channels is None:
            _divides("attention num_heads", self.num_heads, "hidden_size", hidden_size)
        else:
            _positive(kv_channels=self.kv_channels)
        _divides("attention num_kv_heads", self.kv_heads, "num_heads", self.num_heads)
        _one_of("qk_layernorm", self.qk_layernorm, ("none", "per_head", "full_width"))
        if not 0 < self.rotary_percent <= 1:
            raise UserError(
                f"rotary_percent must be more than 0 and at most 1, got {self.rotary_percent}"
            )
        _rotatable(self.rotary_dim(hidden_size))
        if self.window_size is not None:
            _positive(window_size=self.window_size)
        _layers_exist("attention", self.layers, num_layers)


@dataclass(frozen=True)
class Architecture:
    """A fast-weight language model: blocks of (mixer or attention) and SwiGLU MLP, with norms
    before both or, in the listed (0-based) layers, after both."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    mixer: MixerOptions
    attention: AttentionOptions | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    # gain 1 + w, where w is what is stored, of every norm but the mixers' output norms
    layernorm_zero_centered_gamma: bool = False
    post_norm_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _positive(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            intermediate_size=self.intermediate_size,
        )
        self.mixer.validate(self.hidden_size)
        _layers_exist("post-norm", self.post_norm_layers, self.num_layers)
        if self.attention is not None:
            self.attention.validate(self.hidden_size, self.num_layers)

    @property
    def family(self) -> str:
        return self.mixer.family

    def is_attention_layer(self, layer_index: int) -> bool:
        """True if the 0-based layer is softmax attention instead of the family's mixer."""
        return self.attention is not None and layer_index in self.attention.layers

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` is its inverse."""
        return {"family": self.family, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Architecture:
        """Inverse of `to_dict`. Raises UserError on an unknown family or field."""
        data = dict(data)
        family = data.pop("family", None)
        if family not in MIXER_OPTIONS:
            raise UserError(f"unknown model family {family!r}, known: {', '.join(MIXER_OPTIONS)}")
        data["mixer"] = _build(MIXER_OPTIONS[family], data.get("mixer", {}), "mixer.")
        if data.get("attention") is not None:
            data["attention"] = _build(AttentionOptions, data["attention"], "attention.")
        return _build(cls, data, "")

    def with_overrides(self, overrides: dict[str, Any]) -> Architecture:
        """A copy with fields replaced; nested ones by dotted names such as `mixer.chunk_size`."""
        data = self.to_dict()
        for dotted, value in overrides.items():
            *path, last = dotted.split(".")
            node = data
            for name in path:
                node = node.get(name)  # type: ignore[assignment]
                if not isinstance(node, dict):
                    raise UserError(f"model override {dotted!r}: {name!r} holds no fields")
            if last not in node:
                raise UserError(
                    f"model override {dotted!r}: no such field of a {data['family']} model, known: "
                    f"{', '.join(sorted(node))}; model.overrides={{}} drops those of a recipe"
                )
            node[last] = value
        return self.from_dict(data)


def _build(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UserError(f"model field {where.rstrip('.')} must hold named fields")
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise UserError(
            f"unknown model field {where}{unknown[0]}, known: {', '.join(sorted(known))}"
        )
    hints = get_type_hints(cls)
    data = {name: _typed(value, hints[name], f"{where}{name}") for name, value in data.items()}
    try:
        return cls(**data)
    except TypeError as error:
        raise UserError(
            f"incomplete model description ({where or 'architecture'}): {error}"
        ) from None


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as a field of type `hint` holds it: whole numbers and spelled ones serve as floats
    (YAML reads `1e-5` as text), nothing else is converted."""
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if float in allowed and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            return float(value)
    for kind in allowed:
        if get_origin(kind) is tuple:
            if isinstance(value, list | tuple):
                return tuple(_typed(item, get_args(kind)[0], name) for item in value)
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    kinds = " or ".join(_KINDS.get(kind, str(kind)) for kind in allowed)
    raise UserError(f"model field {name} must be {kinds}, got {value!r}")


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value <= 0:
            raise UserError(f"{name} must be a positive whole number, got {value!r}")


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise UserError(f"{divisor_name} {divisor} does not divide {name} {value}")


def _layers_exist(kind: str, layers: tuple[int, ...], num_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(
                f"{kind} layer {layer} does not exist: the model has layers 0 to {num_layers - 1}"
            )


def _rotatable(dim: int) -> None:
    if dim % 2:
        raise UserError(
            f"the attention head dimension {dim} is odd, rotary embedding needs an even one"
        )


def _whole(value: float, what: str) -> int:
    # a ratio of widths times the width: two roundings
    if value <= 0 or not math.isclose(value, round(value), rel_tol=1e-12):
        raise UserError(f"{what} must be a positive whole number, got {value:g}")
    return round(value)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
