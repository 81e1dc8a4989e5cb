"""Causal attention of a text by definition: every query against every key."""

import torch
from torch import Tensor


def naive_text_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Same arguments and result as text_attention."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    key = torch.arange(k.shape[1], device=q.device)
    query = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)
