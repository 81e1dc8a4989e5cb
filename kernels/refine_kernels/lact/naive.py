"""LaCT's fast-weight branch by definition: autograd makes the update, a token loop reads.  And its
fast queries and keys, head by head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_kernels.lact.fast_weights import FastWeights, RowNorms
from refine_kernels.lact.newton_schulz import newton_schulz
from refine_kernels.rotary.naive import naive_rotate


def _f(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """The fast network on one token of each stream and head: x [B,n,d] -> [B,n,d]."""
    w0, w1, w2 = weights
    hidden = F.silu(torch.einsum("bnhd,bnd->bnh", w0, x)) * torch.einsum("bnhd,bnd->bnh", w2, x)
    return torch.einsum("bndh,bnh->bnd", w1, hidden)


def _normalised(w: Tensor, norm: Tensor) -> Tensor:
    return w / (w.square().sum(-1, keepdim=True).sqrt() + 1e-5) * norm


def naive_read(weights: FastWeights, fq: Tensor) -> Tensor:
    """Same arguments and result as apply_fast_weights."""
    w = weights.w0, weights.w1, weights.w2
    return torch.stack([_f(w, x) for x in fq.unbind(1)], 1)


def naive_lact(
    fq: Tensor,
    fk: Tensor,
    fv: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    weights: FastWeights,
    norms: RowNorms,
    *,
    chunk_size: int,
    muon: bool,
    muon_dtype: torch.dtype | None = None,
    prenorm: bool = False,
) -> tuple[Tensor, list[FastWeights]]:
    """Same arguments and results as chunk_lact, from initial weights on: it neither takes nor gives
    the scales that prenorm reads later weights with.

    Needs grad mode: the three gradients are those of sum_t eta_t <f(k_t), v_t>.
    """
    main = [w * 1.0 for w in (weights.w0, weights.w1, weights.w2)]
    norm0, norm2 = norms.w02.chunk(2, -2)
    of_rows = norm0, norms.w1, norm2
    buffers = [torch.zeros_like(w) for w in main]
    if weights.momentum is not None:
        m0, m2, m1 = weights.momentum.unbind(2)
        buffers = [m0, m1.mT, m2]
    t_total = fq.shape[1]
    outputs, boundary_weights = [], []
    for start in range(0, t_total, chunk_size):
        end = min(start + chunk_size, t_total)
        momenta = None
        if momentum is not None:
            momenta = torch.stack((buffers[0], buffers[2], buffers[1].mT), 2)
        boundary_weights.append(FastWeights.of(main[0], main[1], main[2], momenta))
        w = main  # as published, also with prenorm: the initial weights as they are
        if prenorm and start > 0:
            w = [_normalised(x, nu) for x, nu in zip(main, of_rows, strict=True)]
        outputs += [_f(w, fq[:, t]) for t in range(start, end)]
        if end == t_total:
            break
        gains = torch.stack(
            [(_f(w, fk[:, t]) * fv[:, t]).sum(-1)[..., None] * lr[:, t] for t in range(start, end)]
        ).sum((0, 1, 2))
        for a in range(3):
            (g,) = torch.autograd.grad(gains[a], w[a], create_graph=True)
            if momentum is not None:
                g = g + momentum[:, start:end].mean(1)[..., None, None] * buffers[a]
                buffers[a] = g
            step = newton_schulz(g, muon_dtype) if muon else g
            main[a] = main[a] + step
            if not prenorm:
                main[a] = _normalised(main[a], of_rows[a])
    return torch.stack(outputs, 1), boundary_weights


def naive_attention_and_fast_features(
    x: Tensor,
    scale: Tensor,
    offset: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    column: int,
    head_dim: int,
    silu: bool,
    fast_rope: bool,
) -> tuple[Tensor, Tensor]:
    """Same arguments and result as attention_and_fast_features."""

    def turned(y: Tensor) -> Tensor:
        return naive_rotate(y.flatten(2).unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin)

    y = x * scale[:, column] + offset[:, column]
    heads = (F.silu(y) if silu else y).split(head_dim, dim=-1)
    fast = torch.stack([h / (h.square().sum(-1, keepdim=True).sqrt() + 1e-5) for h in heads], -2)
    return turned(x), turned(fast).reshape(fast.shape) if fast_rope else fast
