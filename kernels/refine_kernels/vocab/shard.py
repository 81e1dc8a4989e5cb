"""Which global token ids the columns of a local logits tensor stand for."""

from typing import NamedTuple

import torch.distributed as dist


class VocabShard(NamedTuple):
    """Columns of the local logits that are real tokens, and where they start globally."""

    offset: int
    valid: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(
        cls, local_size: int, vocab_size: int | None, group: dist.ProcessGroup | None
    ) -> "VocabShard":
        """Shard of rank r over an even split: ids [r * local_size, (r + 1) * local_size).

        ``vocab_size`` is the true vocabulary; columns at or beyond it are padding and are cut
        off, which may leave a rank with none.  A group of one rank is no group.
        """
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        offset = 0 if group is None else dist.get_rank(group) * local_size
        real = local_size if vocab_size is None else vocab_size - offset
        return cls(offset, max(0, min(local_size, real)), group)

    def columns(self, start: int, stop: int) -> "VocabShard":
        """What the local columns [start, stop) stand for."""
        valid = max(0, min(self.valid, stop) - start)
        return VocabShard(self.offset + start, valid, self.group)
