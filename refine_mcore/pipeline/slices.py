"""Where a text is cut into slices."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from refine_mcore.models.architecture import Architecture, LaCTOptions
from refine_mcore.models.transformer_config import KERNEL_CHUNK
from refine_mcore.pipeline.passes import Shape
from refine_mcore.pipeline.plan import choose_slices

# Shorter slices cost more in overhead than the pipeline gains, where the number is ours to choose.
_SHORTEST = 512


def slice_spans(length: int, slices: int, architecture: Architecture) -> Sequence[tuple[int, int]]:
    """[start, stop) of at most `slices` slices of `length` tokens, equal but for the last.

    Those of a chunk or more end with a chunk of the model: cutting a LaCT chunk would carry its
    inputs on.
    """
    chunk = _chunk(architecture)
    size = -(-length // slices)
    if size >= chunk:
        size = -(-size // chunk) * chunk
    return [(start, min(start + size, length)) for start in range(0, length, size)]


@functools.lru_cache(maxsize=8)
def default_slices(
    length: int, architecture: Architecture, stages: int, micro_batches: int, recompute: bool
) -> int:
    """As many slices, of at least 512 tokens and a chunk of the model, as the plan of a ReFINE step
    on these stages gains from; all there are with recomputation, whose memory is that of one
    slice."""
    most = max(1, length // max(_SHORTEST, _chunk(architecture)))
    if recompute:
        return most
    if stages == 1:
        return 1
    return choose_slices(Shape(stages, micro_batches, rollout_tokens=5), most=most).shape.slices


def _chunk(architecture: Architecture) -> int:
    mixer = architecture.mixer
    return mixer.chunk_size if isinstance(mixer, LaCTOptions) else KERNEL_CHUNK
