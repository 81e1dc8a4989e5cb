"""Floating-point operations of a training step, by architecture and mode: those of its matrix
products, a multiplication and an addition being two, and a backward pass twice its forward, but
for that of Newton-Schulz, which is written by hand and takes four products where that has three.

What is computed again for the backward does not count, as usual in model FLOPs; what branches read
again of the text does, for a method that needs it should not look cheaper. Where attention reads a
text it counts the keys that a query sees, on average half of them without a window.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from refine_mcore.config import Config, RefineConfig
from refine_mcore.conversion import checkpoint_shapes, hf_parameter_map
from refine_mcore.conversion.parameters import VOCABULARY_KEYS
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    LaCTOptions,
    MixerOptions,
)
from refine_mcore.models.transformer_config import KERNEL_CHUNK
from refine_mcore.training.setup import tape_interval

logger = logging.getLogger(__name__)

_NEWTON_SCHULZ_STEPS = 5
_BY_CHANNEL = ("qk_scale", "qk_offset")  # parameters of two dimensions that are no matrices


class ModelFlops:
    """Of forward passes of a model, over texts of `length` tokens and over branches of them."""

    def __init__(self, architecture: Architecture, length: int, interval: int) -> None:
        self._architecture, self._length, self._interval = (
            architecture,
            length,
            min(interval, length),
        )
        shapes = checkpoint_shapes(hf_parameter_map(architecture))
        self._layers = 2.0 * sum(
            math.prod(shape)
            for key, shape in shapes.items()
            if len(shape) == 2 and key not in VOCABULARY_KEYS and not key.endswith(_BY_CHANNEL)
        )
        self.head = 2.0 * architecture.vocab_size * architecture.hidden_size  # of one token

    def _mixers(self) -> Iterator[MixerOptions | AttentionOptions]:
        arch = self._architecture
        for layer in range(arch.num_layers):
            if arch.attention is not None and arch.is_attention_layer(layer):
                yield arch.attention
            else:
                yield arch.mixer

    @property
    def text(self) -> float:
        """A text with the logits of all its tokens."""
        of_tokens = self._length * (self._layers + self.head)
        return of_tokens + sum(self._of_text(mixer) for mixer in self._mixers())

    @property
    def text_and_backward(self) -> float:
        """The same with its backward."""
        spared = 0.0
        for mixer in self._mixers():
            if isinstance(mixer, LaCTOptions):
                forward, backward = _orthogonalised(mixer, self._architecture.hidden_size)
                spared += (self._length - 1) // mixer.chunk_size * (2 * forward - backward)
        return 3 * self.text - spared

    def branches(self, count: int, tokens: int) -> float:
        """`count` streams of `tokens` tokens, up to the last layer."""
        mixers = sum(self._of_token(mixer) for mixer in self._mixers())
        return count * tokens * (self._layers + mixers)

    def read_states(self, branches: int) -> float:
        """Reading the states of `branches`: for the delta rules the product of keys and writes
        since the last state that was kept, of as many tokens as the branch has that has most."""
        return branches * self._interval * self._of_writes()

    def read_states_and_backward(self, branches: int) -> float:
        """The same with its backward, which ends at the border of a chunk."""
        backward = 2 * branches * min(KERNEL_CHUNK, self._interval) * self._of_writes()
        return self.read_states(branches) + backward

    def _of_text(self, mixer: MixerOptions | AttentionOptions) -> float:
        length, width = self._length, self._architecture.hidden_size
        if isinstance(mixer, AttentionOptions):
            size = mixer.num_heads * mixer.head_dim(width)
            return 4.0 * size * _pairs(length, mixer.window_size)
        if isinstance(mixer, LaCTOptions):
            attended = 4.0 * width * _pairs(length, mixer.window_size)
            chunks = (length - 1) // mixer.chunk_size
            read, written = self._fast_weights(mixer)
            updates = chunks * (mixer.chunk_size * written + _orthogonalised(mixer, width)[0])
            return attended + length * read + updates
        heads, key, value = _heads(mixer, width)
        within = 4 * KERNEL_CHUNK * (key + value) + KERNEL_CHUNK**2 * 2 / 3  # and an inverse
        return length * heads * (within + 6.0 * key * value)

    def _of_token(self, mixer: MixerOptions | AttentionOptions) -> float:
        """A token of a branch in the middle of the text."""
        width, middle = self._architecture.hidden_size, self._length // 2
        if isinstance(mixer, AttentionOptions):
            seen = min(middle, mixer.window_size or middle)
            return 4.0 * mixer.num_heads * mixer.head_dim(width) * seen
        if isinstance(mixer, LaCTOptions):
            return 4.0 * width * min(middle, mixer.window_size) + self._fast_weights(mixer)[0]
        heads, key, value = _heads(mixer, width)
        return 6.0 * heads * key * value

    def _of_writes(self) -> float:
        """What a token adds to the states of all layers."""
        delta_rules = (
            x for x in self._mixers() if not isinstance(x, AttentionOptions | LaCTOptions)
        )
        heads = (_heads(mixer, self._architecture.hidden_size) for mixer in delta_rules)
        return sum(2.0 * count * key * value for count, key, value in heads)

    def _fast_weights(self, mixer: LaCTOptions) -> tuple[float, float]:
        """Of one token: what reads the fast weights, and their gradients."""
        width = self._architecture.hidden_size
        matrix = mixer.num_fast_heads * mixer.fast_head_dim(width) * mixer.fast_hidden_dim(width)
        return 6.0 * matrix, 12.0 * matrix


def _pairs(length: int, window: int | None) -> float:
    """Queries of a text times the keys that each sees."""
    window = min(window or length, length)
    return window * (window + 1) / 2 + (length - window) * window


def _heads(mixer: MixerOptions, width: int) -> tuple[int, int, int]:
    """Value heads, and the widths of keys and values."""
    assert not isinstance(mixer, LaCTOptions)
    if isinstance(mixer, DeltaNetOptions):
        return mixer.num_heads, mixer.key_head_dim(width), mixer.value_head_dim(width)
    return mixer.value_heads, mixer.head_dim, mixer.value_head_dim


def _orthogonalised(mixer: LaCTOptions, width: int) -> tuple[float, float]:
    """Newton-Schulz of the three gradients of a chunk, and its backward."""
    if not mixer.use_muon:
        return 0.0, 0.0
    short, long = sorted((mixer.fast_head_dim(width), mixer.fast_hidden_dim(width)))
    steps = 3 * mixer.num_fast_heads * _NEWTON_SCHULZ_STEPS
    square = 2.0 * short**3
    return steps * (4.0 * short**2 * long + square), steps * (6.0 * short**2 * long + square)


def with_equal_flops(config: Config, architecture: Architecture, modes: Sequence[str]) -> Config:
    """`config` with the steps that `training.equal_flops` comes to, where a batch is trained on in
    these `modes`; next-token warm-up steps are as many."""
    training, other = config.training, config.training.equal_flops
    if other is None:
        return config
    own = sum(step_flops(architecture, config, mode) for mode in modes)
    others = [other, *(mode for mode in modes if mode != "ntp")]
    ratio = sum(step_flops(architecture, config, mode) for mode in others) / own
    steps = training.steps - training.ntp_warmup_steps
    total = training.ntp_warmup_steps + math.ceil(steps * ratio)
    logger.info(
        "training.equal_flops %s: %d steps for %d, each of which takes %.3f times the FLOPs",
        *(other, total, training.steps, ratio),
    )
    return replace(config, training=replace(training, steps=total, equal_flops=None))


def step_flops(architecture: Architecture, config: Config, mode: str) -> float:
    """Of what one sequence takes part in during a step of `mode`: ntp, sft, fused or two_phase."""
    refine, length = config.refine, config.data.sequence_length
    model = ModelFlops(architecture, length, tape_interval(config))
    if mode in ("ntp", "sft"):
        return model.text_and_backward
    share = refine.rollout_fraction
    return (1 - share) * model.text_and_backward + share * _refine_flops(model, refine, mode)


def _refine_flops(model: ModelFlops, refine: RefineConfig, mode: str) -> float:
    """Of a text that rolls out."""
    n, k, c = refine.rollouts_per_position, refine.rollout_tokens, refine.num_chunks
    streams, scored = c * n, k + refine.tokens_behind
    decode = model.branches(streams, k - 1) + streams * k * model.head
    score = model.branches(streams, scored) + streams * scored * model.head
    if mode == "two_phase":
        of_stored = model.branches(streams, k) + streams * k * model.head
        trained = model.text_and_backward + 3 * of_stored
        rollouts = model.text + model.read_states(c) + decode + score
        return rollouts + trained + model.read_states_and_backward(c)
    return model.text_and_backward + model.read_states_and_backward(c) + decode + 3 * score
