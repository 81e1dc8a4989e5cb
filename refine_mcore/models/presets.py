"""Named architectures: the published sizes, scaling-study sizes, and tiny ones for demos,
benchmarks and tests.

`lact-3b` has 24 attention heads: the published 3B file says 25, which does not divide its width of
3072. The Qwen3.5 presets are the text models, without a vision tower and multi-token prediction.
"""

from __future__ import annotations

from collections.abc import Callable

from refine_mcore.errors import UserError
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
)


def _delta_net(hidden: int, layers: int, heads: int, ffn: int, vocab: int = 32000) -> Architecture:
    return Architecture(vocab, hidden, layers, ffn, DeltaNetOptions(num_heads=heads))


def _gated_delta_net(
    hidden: int, layers: int, heads: int, head_dim: int, ffn: int, vocab: int = 32000
) -> Architecture:
    mixer = GatedDeltaNetOptions(num_heads=heads, head_dim=head_dim)
    return Architecture(vocab, hidden, layers, ffn, mixer)


def _lact(
    hidden: int, layers: int, heads: int, ffn: int, vocab: int = 32000, **mixer: object
) -> Architecture:
    options: dict[str, object] = {
        "num_attention_heads": heads,
        "num_fast_heads": 4,
        "chunk_size": 2048,
        "window_size": 2048,
        "rope_theta": 1_000_000.0,
        "low_rank": 32,
        "use_momentum": True,
        "use_muon": True,
    }
    return Architecture(vocab, hidden, layers, ffn, LaCTOptions(**{**options, **mixer}))  # type: ignore[arg-type]


def _every_fourth(layers: int) -> tuple[int, ...]:
    return tuple(range(3, layers, 4))


def _qwen(
    hidden: int, layers: int, ffn: int, heads: int, kv_heads: int, value_heads: int, tied: bool
) -> Architecture:
    mixer = GatedDeltaNetOptions(16, 128, num_value_heads=value_heads, expand_v=1.0)
    attention = AttentionOptions(
        _every_fourth(layers),
        heads,
        kv_heads,
        rope_theta=10_000_000.0,
        rotary_percent=0.25,
        kv_channels=256,
        qk_layernorm="per_head",
        attention_output_gate=True,
    )
    return Architecture(
        248_320,
        hidden,
        layers,
        ffn,
        mixer,
        attention,
        tie_embeddings=tied,
        layernorm_zero_centered_gamma=True,
    )


def _olmo_hybrid(
    hidden: int, layers: int, ffn: int, heads: int, key_dim: int, vocab: int
) -> Architecture:
    mixer = GatedDeltaNetOptions(
        heads, key_dim, num_value_heads=heads, expand_v=2.0, allow_neg_eigval=True, norm_eps=1e-5
    )
    attended = _every_fourth(layers)
    attention = AttentionOptions(attended, heads, heads, rope_theta=None, qk_layernorm="full_width")
    return Architecture(vocab, hidden, layers, ffn, mixer, attention, post_norm_layers=attended)


def _tiny(hybrid: Architecture, sizes: dict[str, object]) -> Architecture:
    return hybrid.with_overrides({"vocab_size": 61, "mixer.head_dim": 12, **sizes})


_PRESETS: dict[str, Callable[[], Architecture]] = {
    "lact-760m": lambda: _lact(1536, 24, 24, 4096),
    "lact-3b": lambda: _lact(3072, 26, 24, 8192),
    "deltanet-1.3b": lambda: _delta_net(2048, 24, 16, 5632),
    "deltanet-3b": lambda: _delta_net(2560, 36, 20, 6912),
    "deltanet-7b": lambda: _delta_net(4096, 32, 32, 11008),
    "gated-deltanet-1.3b": lambda: _gated_delta_net(2048, 21, 6, 256, 5632),
    "qwen3.5-0.8b": lambda: _qwen(1024, 24, 3584, 8, 2, 16, True),
    "qwen3.5-2b": lambda: _qwen(2048, 24, 6144, 8, 2, 16, True),
    "qwen3.5-4b": lambda: _qwen(2560, 32, 9216, 16, 4, 32, True),
    "qwen3.5-9b": lambda: _qwen(4096, 32, 12288, 16, 4, 32, False),
    "olmo-hybrid-7b": lambda: _olmo_hybrid(3840, 32, 11008, 30, 96, 100_352),
    "demo-deltanet": lambda: _delta_net(192, 4, 3, 512, vocab=2048),
    "demo-gated-deltanet": lambda: _gated_delta_net(192, 4, 3, 48, 512, vocab=2048),
    "demo-lact": lambda: _lact(
        192, 4, 6, 512, vocab=2048, num_fast_heads=2, chunk_size=256, window_size=256, low_rank=16
    ),
    "bench-deltanet": lambda: _delta_net(512, 6, 4, 1536, vocab=8192),
    "bench-lact": lambda: _lact(512, 6, 8, 1536, vocab=8192, chunk_size=1024, window_size=1024),
    "tiny-deltanet": lambda: _delta_net(32, 2, 2, 48, vocab=61),
    "tiny-gated-deltanet": lambda: _gated_delta_net(32, 2, 2, 12, 48, vocab=61),
    "tiny-qwen3.5": lambda: _tiny(
        _qwen(32, 4, 48, 4, 2, 16, True),
        {"mixer.num_heads": 2, "mixer.num_value_heads": 4, "attention.kv_channels": 16},
    ),
    "tiny-olmo-hybrid": lambda: _tiny(_olmo_hybrid(32, 4, 48, 2, 12, 61), {}),
    "tiny-lact": lambda: _lact(
        32, 2, 4, 48, vocab=61, num_fast_heads=2, chunk_size=8, window_size=6, low_rank=4
    ),
}


def preset_names() -> list[str]:
    """All known preset names."""
    return sorted(_PRESETS)


def preset(name: str) -> Architecture:
    """The architecture called `name`. Raises UserError if there is none."""
    if name not in _PRESETS:
        raise UserError(f"unknown model preset {name!r}, known: {', '.join(preset_names())}")
    return _PRESETS[name]()
