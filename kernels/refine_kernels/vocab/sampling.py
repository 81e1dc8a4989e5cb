"""Sampling a token per row by the Gumbel-max trick, with noise that no layout can change.

argmax_i (z_i + G_i), G_i = -log(-log u_i), is a draw from softmax(z).  The noise of a token is a
hash of the row's key and the token's global id (random.py), so a sharded vocabulary draws
the same token as an unsharded one, and no rank needs the whole row.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from refine_kernels.vocab.random import counter_uniform
from refine_kernels.vocab.shard import VocabShard

# Entries of a row slice: the noise of a slice takes a few int64 and float64 tensors of this size.
SLICE_ENTRIES = 2**20


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    keys: Tensor | None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    form: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """One token id per row of logits [R, V_local] from softmax(logits / temperature): [R] int64.

    keys [R] int64 decide the draw; None takes the most likely token, the lowest id among equals.
    ``vocab_size`` and ``group`` as in log_probs_and_entropy; ``form`` is the kernel for this rank's
    columns, torch's `best_columns` if None.
    """
    shard = VocabShard.of(logits.shape[-1], vocab_size, group)
    best, token = (form or best_columns)(logits, keys, temperature, shard)
    return token if shard.group is None else _combine(best, token + shard.offset, shard.group)


def best_columns(
    logits: Tensor, keys: Tensor | None, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Of each row, over this rank's columns: the largest value, noise included, and its column."""
    dtype = torch.promote_types(logits.dtype, torch.float32 if keys is None else torch.float64)
    best = torch.full((logits.shape[0],), -torch.inf, dtype=dtype, device=logits.device)
    token = torch.zeros_like(best, dtype=torch.int64)
    rows = max(1, SLICE_ENTRIES // logits.shape[-1])
    for start in range(0, logits.shape[0] if shard.valid else 0, rows):
        s = slice(start, start + rows)
        z = logits[s, : shard.valid].to(dtype)
        if keys is not None:
            ids = torch.arange(shard.valid, device=logits.device) + shard.offset
            z = z / temperature - counter_uniform(keys[s], ids).log_().neg_().log_()
        best[s], token[s] = first_max(z)
    return best, token


def first_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and the lowest column that has it (torch.max leaves ties open)."""
    best = z.amax(1)
    return best, (z == best[:, None]).to(torch.uint8).argmax(1)


def _combine(best: Tensor, token: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The token of the shard with the largest value; the lowest shard among equals."""
    size = dist.get_world_size(group)
    bests = [torch.empty_like(best) for _ in range(size)]
    tokens = [torch.empty_like(token) for _ in range(size)]
    dist.all_gather(bests, best, group=group)
    dist.all_gather(tokens, token, group=group)
    _, shard = first_max(torch.stack(bests, 1))
    return torch.stack(tokens, 1).gather(1, shard[:, None]).squeeze(1)
