"""How well a rollout continues the text: one self-supervised reward per rollout (Eqs. 9, 11, 12).

Deviations from the authors' code: it computes the cosine in the dtype of the hidden states
(bf16, steps of about 0.003), here at least fp32; the two weights of the hybrid reward, 1 and 1 in
Eq. 12, are parameters; `edit` is not in the paper, which names edit distance as future work.
Hidden states are those after the final norm, each taken after its token was consumed.

`future` is not in the paper either: it asks what a rollout is worth to the text behind it, which
RLP (arXiv 2510.01265) asks of a thought before the next token. Here the rollout stands in place of
the true tokens, and the text behind them is scored; 0 if it reads as well as ever.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

REWARD_KINDS = ("cosine", "binary", "hybrid", "edit", "future")


@torch.no_grad()
def sequence_reward(
    kind: str,
    rollout_hidden: Tensor,
    target_hidden: Tensor,
    rollout_tokens: Tensor,
    target_tokens: Tensor,
    *,
    cosine_weight: float = 1.0,
    binary_weight: float = 1.0,
    lengths: Tensor | None = None,
    future_log_probs: Tensor | None = None,
    text_log_probs: Tensor | None = None,
) -> Tensor:
    """Reward of each rollout, without gradient: the policy gradient treats it as a constant.

    cosine  (1/k) sum_j cos(rollout_hidden_j, target_hidden_j); a zero vector counts 0
    binary  (1/k) sum_j [rollout_token_j = target_token_j]
    hybrid  cosine_weight * cosine + binary_weight * binary
    edit    1 - levenshtein(rollout_tokens, target_tokens) / k
    future  (1/m) sum_j (future_log_probs_j - text_log_probs_j)

    Args:
        kind: one of `REWARD_KINDS`.
        rollout_hidden, target_hidden: [R, k, d].
        rollout_tokens, target_tokens: [R, k], integer.
        cosine_weight, binary_weight: of the hybrid reward.
        lengths: [R], the k of each rollout, what is behind it does not count; None for all tokens.
            Not with "future".
        future_log_probs, text_log_probs: [R, m], of the m text tokens behind the span, in nats,
            after the rollout and after the text's own tokens; for "future".

    Returns:
        [R], in the dtype of the hidden states but at least fp32.

    Raises:
        ValueError: an unknown kind, or "future" without its log-probs.
    """
    dtype = torch.promote_types(rollout_hidden.dtype, torch.float32)
    if lengths is None:
        lengths = torch.full_like(rollout_tokens[:, 0], rollout_tokens.shape[1])

    def cosine() -> Tensor:
        hidden = rollout_hidden.to(dtype), target_hidden.to(dtype)
        return _mean_of_first(F.cosine_similarity(*hidden, dim=-1), lengths)

    def match() -> Tensor:
        return _mean_of_first((rollout_tokens == target_tokens).to(dtype), lengths)

    if kind == "cosine":
        return cosine()
    if kind == "binary":
        return match()
    if kind == "hybrid":
        return cosine_weight * cosine() + binary_weight * match()
    if kind == "edit":
        return 1 - _levenshtein(rollout_tokens, target_tokens, lengths).to(dtype) / lengths
    if kind == "future":
        if future_log_probs is None or text_log_probs is None:
            raise ValueError("the reward 'future' needs the log-probs of the text behind the span")
        return (future_log_probs.to(dtype) - text_log_probs.to(dtype)).mean(-1)
    raise ValueError(f"unknown reward {kind!r}; use one of {REWARD_KINDS}")


def _mean_of_first(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the first lengths[r] values of each row [R, k]."""
    counts = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    return values.masked_fill(~counts, 0.0).sum(-1) / lengths


def _levenshtein(rollout: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
    """Edit distance of the first lengths[r] entries of each pair of rows, [R, k] and [R, k] -> [R],
    all rows at once.

    Row i of the dynamic programme is d[j] = min(t[j], d[j - 1] + 1), where t holds the best of
    deletion and substitution. Unrolled, d[j] - j = min over l <= j of (t[l] - l): a running
    minimum in place of the loop over j.
    """
    length = target.shape[1]
    offset = torch.arange(length + 1, device=target.device)
    distance = offset.expand(target.shape[0], -1)
    of_first = []  # n entries of both, for each n
    for i in range(length):
        substitution = distance[:, :-1] + (rollout[:, i : i + 1] != target)
        best = torch.minimum(substitution, distance[:, 1:] + 1)
        best = torch.cat([distance[:, :1] + 1, best], dim=1)
        distance = (best - offset).cummin(1).values + offset
        of_first.append(distance[:, i + 1])
    return torch.stack(of_first, 1).gather(1, lengths[:, None] - 1)[:, 0]
