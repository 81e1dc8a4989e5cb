"""The clipped policy loss: PPO with clip bounds above and below and a dual clip (Eq. 10).

As the authors' code has it: no KL term, no entropy bonus, the log-ratio clamped to +-20 before
the exponential, the dual clip bounding the loss where the advantage is negative.

Deviations from that code:
  * a rollout (a row; "seq" in the aggregations) without a valid token adds 0 to
    seq-mean-token-mean (there: NaN) and still counts as one, as it does there in
    seq-mean-token-sum;
  * token means divide by the count itself, not by count + 1e-8; with no valid token at all the
    loss and its gradient are 0;
  * what masked tokens hold, NaN and infinity included, touches neither loss nor gradient;
  * `denominator` replaces the local count by a global one, so that the losses of micro-batches
    and ranks add up to the loss of the whole batch.
"""

import torch
from torch import Tensor

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")

MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    aggregation: str = "token-mean",
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss; its gradient flows to `log_probs` only.

    With ratio r = exp(log_probs - old_log_probs), per token
        L = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)),
        L = min(L, -A dual_clip) where A < 0.

    Args:
        log_probs, old_log_probs: [R, k].
        advantages: [R], or [R, k].
        mask: [R, k], nonzero on valid tokens.
        clip_low, clip_high: clip bounds of the ratio.
        dual_clip: bound on the ratio where A < 0, above 1.
        aggregation: "token-mean" divides the sum over tokens by the number of valid tokens,
            "seq-mean-token-sum" by the number of rollouts R; "seq-mean-token-mean" takes the
            mean over each rollout's valid tokens and divides their sum by R.
        denominator: what to divide by instead: valid tokens, or rollouts, of all
            micro-batches and ranks.

    Returns:
        loss: scalar, in the dtype of `log_probs` but at least fp32.
        metrics: detached scalars, means over the valid tokens of this call: `clip_fraction`
            (the clipped branch is the larger), `clip_fraction_lower` (the dual clip binds),
            `approx_kl` (old_log_probs - log_probs). To join calls, weight by valid tokens.

    Raises:
        ValueError: an unknown aggregation, or a dual clip of 1 or less.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown loss aggregation {aggregation!r}; use one of {AGGREGATIONS}")
    if dual_clip <= 1:
        raise ValueError(f"the dual clip must be above 1, not {dual_clip}")
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    valid = mask.bool()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    # Masked before any arithmetic: 0 * inf in the backward pass would be NaN.
    advantage = advantages.detach().to(dtype).masked_fill(~valid, 0.0)
    drift = log_probs.to(dtype) - old_log_probs.detach().to(dtype)
    log_ratio = drift.masked_fill(~valid, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()

    # the maximum and the minimum, as the bounds that they set to the ratio
    negative = advantage < 0
    least = torch.where(negative, 1 - clip_low, torch.zeros_like(advantage))
    most = torch.where(negative, dual_clip, torch.full_like(advantage, 1 + clip_high))
    loss = -advantage * ratio.clamp(least, most)

    tokens = valid.sum().clamp(min=1)
    above = ratio > most
    clipped = torch.where(negative, ratio < least, above & (advantage > 0))
    metrics = {
        "clip_fraction": clipped.sum(dtype=dtype) / tokens,
        "clip_fraction_lower": (negative & above).sum(dtype=dtype) / tokens,
        "approx_kl": -log_ratio.detach().sum() / tokens,
    }
    return _aggregate(loss, valid, aggregation, denominator), metrics


def _aggregate(
    loss: Tensor, valid: Tensor, aggregation: str, denominator: Tensor | float | None
) -> Tensor:
    """Reduce per-token losses [R, k], zero where masked, to a scalar."""
    if aggregation == "seq-mean-token-mean":
        loss = loss / valid.sum(-1, keepdim=True).clamp(min=1)
    if denominator is None:
        tokens = aggregation == "token-mean"
        denominator = valid.sum().clamp(min=1) if tokens else float(valid.shape[0])
    return loss.sum() / denominator
