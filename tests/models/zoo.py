"""Small models of every family and option, and what tests ask of their states.

Weights and rates are large, so that what a state holds matters to everything behind it; chunks and
windows are a few tokens, so that short texts and branches cross them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from refine_mcore.config import OptimizerConfig
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
    MixerOptions,
)
from refine_mcore.models.attention import AttentionState
from refine_mcore.models.delta_rule_state import DeltaRuleState
from refine_mcore.models.fast_weight_model import FastWeightModel, LanguageModel, build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.lact_state import LaCTState, open_chunk_length
from refine_mcore.models.sharding import main_gradient
from refine_mcore.models.state import FastWeightState
from refine_mcore.models.transformer_config import FastWeightConfig, transformer_config
from refine_mcore.rollout.scoring import BranchScores, score_hidden
from refine_mcore.training.optimizer import wrap_data_parallel

VOCAB = 23


def score(
    model: LanguageModel,
    states: Sequence[FastWeightState],
    prefix_hidden: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
) -> BranchScores:
    """Of rollouts `tokens` [R, k], read at once from the states of their branches."""
    return score_hidden(model, model(tokens, states).hidden, prefix_hidden, tokens, temperature)


def _architecture(
    mixer: MixerOptions, attention: AttentionOptions | None = None, **options: Any
) -> Architecture:
    return Architecture(VOCAB, 16, 2, 24, mixer, attention, initializer_range=0.3, **options)


_FULL = AttentionOptions(layers=(0,), num_heads=2)
_WINDOW = AttentionOptions((1,), num_heads=4, num_kv_heads=2, window_size=3, qkv_bias=True)
# As in Qwen3.5 and in OLMo-Hybrid.
_GATED = AttentionOptions(
    (1,),
    num_heads=4,
    num_kv_heads=2,
    kv_channels=6,
    rotary_percent=0.7,
    qk_layernorm="per_head",
    attention_output_gate=True,
)
_NORMED = AttentionOptions((1,), num_heads=2, rope_theta=None, qk_layernorm="full_width")
_LACT = LaCTOptions(
    num_attention_heads=4,
    num_fast_heads=2,
    chunk_size=4,
    window_size=6,
    low_rank=2,
    use_momentum=True,
    use_muon=True,
)

ARCHITECTURES = {
    "delta_net": _architecture(DeltaNetOptions(2)),
    "delta_net-gate-negative-conv3": _architecture(
        DeltaNetOptions(2, use_gate=True, allow_neg_eigval=True, conv_size=3, expand_v=2.0)
    ),
    "delta_net-no_conv-no_beta": _architecture(
        DeltaNetOptions(2, use_short_conv=False, use_beta=False, qk_activation="identity")
    ),
    "delta_net-identity-tied": _architecture(
        DeltaNetOptions(2, qk_activation="identity", expand_k=0.5), tie_embeddings=True
    ),
    "delta_net-full_attention": _architecture(DeltaNetOptions(2), _FULL),
    "delta_net-window_attention": _architecture(DeltaNetOptions(2), _WINDOW),
    "gated_delta_net": _architecture(GatedDeltaNetOptions(2, head_dim=6)),
    "gated_delta_net-value_heads-negative": _architecture(
        GatedDeltaNetOptions(2, 6, num_value_heads=4, allow_neg_eigval=True, use_gate=False)
    ),
    "gated_delta_net-no_conv": _architecture(
        GatedDeltaNetOptions(2, head_dim=6, expand_v=1.5, use_short_conv=False)
    ),
    "gated_delta_net-full_attention": _architecture(
        GatedDeltaNetOptions(2, 6), replace(_FULL, num_heads=4, num_kv_heads=1)
    ),
    "gated_delta_net-window_attention": _architecture(
        GatedDeltaNetOptions(2, 6), replace(_WINDOW, window_size=5)
    ),
    "gated_delta_net-gated-zero_centered-tied-full_attention": _architecture(
        GatedDeltaNetOptions(2, 6, num_value_heads=4, expand_v=1.0),
        _GATED,
        layernorm_zero_centered_gamma=True,
        tie_embeddings=True,
    ),
    "gated_delta_net-negative-post_norm-full_attention": _architecture(
        GatedDeltaNetOptions(2, 4, expand_v=2.5, allow_neg_eigval=True, norm_eps=1e-2),
        _NORMED,
        post_norm_layers=(1,),
    ),
    "delta_net-post_norm-gated_window_attention": _architecture(
        DeltaNetOptions(2),
        replace(_GATED, num_kv_heads=1, window_size=4, qkv_bias=True, qk_layernorm="full_width"),
        post_norm_layers=(0, 1),
        layernorm_zero_centered_gamma=True,
    ),
    "lact": _architecture(_LACT),
    "lact-full_rank": _architecture(
        replace(
            _LACT, low_rank=None, use_momentum=False, use_muon=False, chunk_size=5, window_size=3
        )
    ),
    "lact-muon-plain": _architecture(
        replace(_LACT, use_momentum=False, fast_rope=False, learnable_scale=False, inter_multi=1.5)
    ),
    "lact-prenorm-qk_norm": _architecture(
        replace(
            _LACT,
            use_muon=False,
            prenorm=True,
            v_silu=False,
            qk_norm=True,
            qkv_bias=True,
            window_size=1,
        )
    ),
    "lact-post_norm-zero_centered": _architecture(
        replace(_LACT, use_muon=False, qk_norm=True),
        post_norm_layers=(0,),
        layernorm_zero_centered_gamma=True,
    ),
    "lact-linear-full_attention": _architecture(
        replace(_LACT, use_muon=False, qkv_silu=False, num_fast_heads=4, chunk_size=3), _FULL
    ),
}
NAMES = list(ARCHITECTURES)
# One of each kind, for tests that do not depend on the options.
FAMILIES = [
    "delta_net",
    "gated_delta_net-window_attention",
    "delta_net-full_attention",
    "lact",
    "lact-full_rank",
]


def make_model(name: str, pg_collection: Any, **options: Any) -> FastWeightModel:
    """A float64 model of generic parameters: no zero biases, unit gains, tiny learning rates.
    `options` are those of `transformer_config`."""
    config = transformer_config(ARCHITECTURES[name], dtype=torch.float64, **options)
    model = build_model(config, pg_collection)
    initialize(model, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("lr_proj_bias"):
                parameter += 4.0
    return model


@functools.cache  # each wrapping adds its hooks
def wrapped(model: FastWeightModel) -> DistributedDataParallel:
    """The model under Megatron's data parallelism, where gradients gather."""
    return wrap_data_parallel(model, OptimizerConfig(), model.pg_collection)


@contextmanager
def short_chunks(chunk: int = 4, interval: int = 8) -> Iterator[None]:
    """Delta-rule chunks of a few tokens instead of 64, and a state kept at every second one, so
    that short texts have several. Also a decorator, for what runs on spawned ranks."""
    # a property takes precedence over what each configuration holds
    kept = property(lambda config: interval, lambda config, value: None)
    with (
        mock.patch("refine_mcore.models.delta_rule_mixer.KERNEL_CHUNK", chunk),
        mock.patch.object(FastWeightConfig, "tape_interval", kept),
    ):
        yield


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids below VOCAB."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def weights_like(x: Tensor, seed: int = 1) -> Tensor:
    """Fixed random weights that make a scalar of x in which every entry counts."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def contents(
    model: FastWeightModel, states: Sequence[FastWeightState], stream: int
) -> list[Tensor]:
    """All that one stream's next tokens can see of the states, however it is held."""
    arch = model.config.arch
    found: list[Tensor] = []
    for state in states:
        if isinstance(state, DeltaRuleState):
            found += [x[stream] for x in state.of_streams()]
        elif isinstance(state, AttentionState):
            found += _visible_keys(state, stream, arch.attention.window_size)
        else:
            assert isinstance(state, LaCTState)
            found += _visible_keys(state.attention, stream, arch.mixer.window_size)
            found += _fast_weights(state, stream)
            opened = open_chunk_length(state.position[stream], arch.mixer.chunk_size)
            found += state.pending.last(stream, opened)
    return found


def _visible_keys(state: AttentionState, stream: int, window: int | None) -> tuple[Tensor, ...]:
    position = state.position[stream]
    return state.history.last(stream, position if window is None else min(window - 1, position))


def _fast_weights(state: LaCTState, stream: int) -> list[Tensor]:
    weights = state.weights.rows(range(state.weights.count))
    momentum = weights.momentum
    if momentum is None:
        momentum = torch.zeros_like(torch.stack([weights.w1.mT] * 3, 2))
    return [w[state.weight_rows[stream]] for w in (*weights[:2], momentum)]


def gradients(model: FastWeightModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for every parameter, zero where it does not reach."""
    named = dict(model.named_parameters())
    if all(hasattr(p, "main_grad") for p in named.values()):  # layers may hand autograd none
        return gathered_gradients(model, loss.backward)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def gathered_gradients(model: FastWeightModel, run: Callable[[], None]) -> dict[str, Tensor]:
    """What `run` adds up for every parameter of a `wrapped` model."""
    wrapped(model).zero_grad_buffer()
    run()
    return {name: main_gradient(p).clone() for name, p in model.named_parameters()}


def assert_same(
    actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-9
) -> None:
    """Tensors pair by pair of one shape and the same to `tolerance` of their norm."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"tensor {i}: {tuple(a.shape)} is not {tuple(e.shape)}"
        error, norm = (a - e).norm().item(), e.norm().item()
        assert error <= tolerance * norm + 1e-12, f"tensor {i}: off by {error:.1e} of {norm:.1e}"


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """Every parameter's gradient the same to `tolerance` of its norm, or of a thousandth of all."""
    assert actual.keys() == expected.keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert total > 0
    for name, e in expected.items():
        error = (actual[name] - e).norm().item()
        scale = max(e.norm().item(), 1e-3 * total)
        assert error <= tolerance * scale, f"{name}: off by {error:.1e} of {scale:.1e}"
