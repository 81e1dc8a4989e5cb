"""Where rollouts leave their texts, and the randomness of each draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from refine_kernels.dispatch import combine_keys, counter_uniform
from torch import Tensor

from refine_mcore.models.recorded_tokens import gather_tokens


@dataclass(frozen=True)
class Branches:
    """R branch points over a batch of texts: branch r leaves text `batch_index[r]` after
    `position[r]` tokens.

    `length[r]` is how many tokens of its rollouts count, where that is not k for all of them; the
    last stage knows it, which makes reward and loss of them. Rows are sequence-major, then
    position. All on the host: reading positions back is the one planned sync of a micro-batch, on
    each pipeline stage.
    """

    batch_index: tuple[int, ...]
    position: tuple[int, ...]
    length: tuple[int, ...] | None = None

    @classmethod
    def at(
        cls, positions: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]] | None = None
    ) -> Branches:
        """Branches at positions [B][c]."""
        return cls(
            tuple(b for b, row in enumerate(positions) for _ in row),
            tuple(p for row in positions for p in row),
            None if lengths is None else tuple(n for row in lengths for n in row),
        )

    def __len__(self) -> int:
        return len(self.position)

    def select(self, rows: Sequence[int]) -> Branches:
        """The given branches."""
        return Branches(
            tuple(self.batch_index[r] for r in rows),
            tuple(self.position[r] for r in rows),
            None if self.length is None else tuple(self.length[r] for r in rows),
        )

    def fork(self, n: int) -> Branches:
        """Every branch n times in a row."""
        return self.select([r for r in range(len(self)) for _ in range(n)])

    def rows_before(self, x: Tensor) -> Tensor:
        """x [B, S, c] at the last token of each prefix: [R, c]; its logits give the first rollout
        token."""
        last = [p - 1 for p in self.position]
        return gather_tokens(x, self.batch_index, last, 1)[:, 0]

    def rows_after(self, x: Tensor, k: int, *, skip: int = 0) -> Tensor:
        """x [B, S, c] at the k text tokens that follow each prefix and `skip` more: [R, k, c]."""
        first = [p + skip for p in self.position] if skip else self.position
        return gather_tokens(x, self.batch_index, first, k)


class _Draw(IntEnum):
    POSITION = 1
    TOKEN = 2


@dataclass(frozen=True)
class Randomness:
    """Every random draw of a step as a function of (seed, step, sample, position, rollout, token)
    and nothing else.

    The layout of a run - tensor, pipeline, data parallel, micro-batches - cannot show in it.
    Sample indices and results are on the host: of a few numbers each operation costs a launch.
    """

    seed: int
    step: int

    def position_uniforms(self, sample_index: Tensor, num_chunks: int) -> Tensor:
        """[B, c] in (0, 1), one per sample and chunk."""
        keys = combine_keys(self.seed, self.step, _Draw.POSITION, sample_index)
        return counter_uniform(keys, torch.arange(num_chunks))

    def token_keys(self, sample_index: Tensor, branches: Branches, n: int, k: int) -> Tensor:
        """[k, R * n] keys for the draws of the first k tokens of every rollout."""
        samples = sample_index[list(branches.batch_index)]
        position = torch.tensor(branches.position)
        keys = combine_keys(self.seed, self.step, _Draw.TOKEN, samples, position)
        number = torch.arange(k)[:, None, None]
        return combine_keys(keys[:, None], torch.arange(n), number).flatten(1)
