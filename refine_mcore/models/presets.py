"""Named architectures: the published sizes, scaling-study sizes, and tiny ones for demos,
benchmarks and tests.

`lact-3b` has 24 attention heads: the published 3B file says 25, which does not divide its width of
3072.
"""

from __future__ import annotations

from collections.abc import Callable

from refine_mcore.errors import UserError
from refine_mcore.models.architecture import (
    Architecture,
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


_PRESETS: dict[str, Callable[[], Architecture]] = {
    "lact-760m": lambda: _lact(1536, 24, 24, 4096),
    "lact-3b": lambda: _lact(3072, 26, 24, 8192),
    "deltanet-1.3b": lambda: _delta_net(2048, 24, 16, 5632),
    "deltanet-3b": lambda: _delta_net(2560, 36, 20, 6912),
    "deltanet-7b": lambda: _delta_net(4096, 32, 32, 11008),
    "gated-deltanet-1.3b": lambda: _gated_delta_net(2048, 21, 6, 256, 5632),
    "demo-deltanet": lambda: _delta_net(192, 4, 3, 512, vocab=2048),
    "demo-gated-deltanet": lambda: _gated_delta_net(192, 4, 3, 48, 512, vocab=2048),
    "demo-lact": lambda: _lact(
        192, 4, 6, 512, vocab=2048, num_fast_heads=2, chunk_size=256, window_size=256, low_rank=16
    ),
    "bench-deltanet": lambda: _delta_net(512, 6, 4, 1536, vocab=8192),
    "bench-lact": lambda: _lact(512, 6, 8, 1536, vocab=8192, chunk_size=1024, window_size=1024),
    "tiny-deltanet": lambda: _delta_net(32, 2, 2, 48, vocab=61),
    "tiny-gated-deltanet": lambda: _gated_delta_net(32, 2, 2, 12, 48, vocab=61),
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
