"""Where to roll out: one position per chunk of the text, drawn by smoothed entropy (Eqs. 5, 6).

Terms. `entropy[:, i]` is the entropy of the distribution that `logits[:, i]` gives, so of token
i + 1. A position is the number of columns consumed before the first rollout token: position p
draws that token from `logits[:, p - 1]`. Rows may be padded on either side (`mask` is 1 on one
contiguous run of valid tokens); positions count from column 0, so padding on the left counts.

Defaults follow the authors' code where it departs from the paper:
  * the weight of position p is `entropy[p - 1]`, the uncertainty about the first rollout token.
    Eq. 5 means the entropy of x_p, the last prefix token, which is `entropy[p - 2]`:
    `entropy_of="prefix_token"`. x_1 has no distribution, so the chunk grid moves along by one;
  * average pooling over `window` entries (window + 1 if even), zeros beyond the row's ends and
    padded columns counted in the mean. `ignore_masked=True` averages valid entries only;
  * chunks have floor(valid / c) entries; the remainder at the end is never drawn;
  * positions are clamped to [first valid + left, valid end - right] with margins of 20 tokens;
    clamped chunks may share a position. Where the bounds cross, the right one wins;
  * the paper's temperature is 1; here it is a parameter;
  * texts may be packed of documents (`documents`: the number of each column's), each valid from its
    first column on. Margins count from the ends of a document, entropies are pooled within it, and
    a position where no rollout fits moves to the nearest where one does;
  * argmax and argmin read the raw entropies, and the first of equals wins.
Here a draw is the inverse CDF of a given uniform instead of a call to a random generator, so that
positions do not depend on how the work is laid out over ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SELECTION_MODES = ("entropy", "uniform", "argmax", "argmin")
ENTROPY_OF = ("rollout_token", "prefix_token")

Margin = int | tuple[int, int]


def smooth_entropy(
    entropy: Tensor,
    mask: Tensor,
    window: int,
    *,
    ignore_masked: bool = False,
    documents: Tensor | None = None,
) -> Tensor:
    """Average-pool entropies along the row with stride 1 and an odd, centred window.

    Args:
        entropy: [B, S], any float dtype.
        mask: [B, S], nonzero on valid tokens; read only with `ignore_masked`.
        window: entries to pool over; an even one pools over window + 1, 1 changes nothing.
        ignore_masked: average only the valid entries under the window, 0 where there are none.
        documents: [B, S], or None; entries of another document count as zeros.

    Returns:
        [B, S], at least fp32.
    """
    _require(window >= 1, f"the entropy window must be at least 1, not {window}")
    entropy = _upcast(entropy)
    width = window + 1 - window % 2
    if not ignore_masked:
        return _pool(entropy, width, documents)
    valid = mask.bool()
    share = _pool(valid.to(entropy.dtype), width, documents)
    total = _pool(entropy.masked_fill(~valid, 0.0), width, documents)
    # Away from every valid entry both are 0; a share is never below 1 / width otherwise.
    return total / share.clamp(min=0.5 / width)


def chunk_probabilities(
    entropy: Tensor,
    mask: Tensor,
    num_chunks: int,
    window: int,
    temperature: float = 1.0,
    *,
    ignore_masked: bool = False,
    documents: Tensor | None = None,
) -> Tensor:
    """p_i(t) = exp(H_t / temperature) / sum over chunk i, with H smoothed (Eq. 6).

    Args:
        entropy: [B, S].
        mask: [B, S], one contiguous run of valid tokens per row.
        num_chunks: c, equal contiguous chunks of the valid tokens.
        window: see `smooth_entropy`.
        temperature: above 0; higher is closer to uniform.
        ignore_masked, documents: see `smooth_entropy`.

    Returns:
        [B, c, S], at least fp32; zero outside the chunk. Each chunk sums to 1, or is zero
        throughout where the row has fewer valid tokens than chunks.
    """
    _require(temperature > 0, f"the position temperature must be above 0, not {temperature}")
    smoothed = smooth_entropy(
        entropy, mask, window, ignore_masked=ignore_masked, documents=documents
    )
    inside, _ = _chunks(mask, num_chunks)
    weights = (smoothed / temperature)[:, None].masked_fill(~inside, float("-inf"))
    return weights.softmax(-1).masked_fill(~inside, 0.0)


def select_positions(
    entropy: Tensor,
    mask: Tensor,
    num_chunks: int,
    window: int,
    temperature: float = 1.0,
    mode: str = "entropy",
    margin: Margin = 20,
    uniforms: Tensor | None = None,
    *,
    ignore_masked: bool = False,
    entropy_of: str = "rollout_token",
    documents: Tensor | None = None,
) -> Tensor:
    """Select one rollout position per chunk, without a host sync.

    Whether a row is long enough depends on data: who reads it for rollouts refuses what is not.

    Args:
        entropy: [B, S].
        mask: [B, S], one contiguous run of valid tokens per row.
        num_chunks: c.
        window: see `smooth_entropy`; mode "entropy" only.
        temperature: see `chunk_probabilities`; mode "entropy" only.
        mode: "entropy" draws from `chunk_probabilities`, "uniform" gives every entry of a chunk
            the same weight, "argmax" and "argmin" take the extreme of the raw entropies.
        margin: tokens kept before and after a position, (left, right) or one for both.
        uniforms: [B, c] in (0, 1), one draw per chunk; for "entropy" and "uniform".
        ignore_masked: see `smooth_entropy`; mode "entropy" only.
        entropy_of: "rollout_token" or "prefix_token"; see the head of the file.
        documents: [B, S], the number of each column's document, or None.

    Returns:
        positions [B, c], int64. Where no document of a text is as long as its margins, they mean
        nothing: see `room_for_rollouts`.

    Raises:
        ValueError: an unknown option, or a draw without uniforms.
    """
    _require(mode in SELECTION_MODES, f"unknown position mode {mode!r}; use {SELECTION_MODES}")
    _require(entropy_of in ENTROPY_OF, f"unknown entropy_of {entropy_of!r}; use {ENTROPY_OF}")
    inside, last = _chunks(mask, num_chunks)
    if mode in ("argmax", "argmin"):
        score = _upcast(entropy) if mode == "argmax" else -_upcast(entropy)
        index = score[:, None].masked_fill(~inside, float("-inf")).argmax(-1)
    else:
        if uniforms is None:
            raise ValueError(f"position mode {mode!r} draws at random and needs uniforms")
        if mode == "uniform":
            probabilities = chunk_probabilities(torch.zeros_like(entropy), mask, num_chunks, 1)
        else:
            probabilities = chunk_probabilities(
                entropy,
                mask,
                num_chunks,
                window,
                temperature,
                ignore_masked=ignore_masked,
                documents=documents,
            )
        index = _inverse_cdf(probabilities, uniforms, last)
    return _positions_of(index, mask, margin, entropy_of, documents)


def known_up_to(
    read: int,
    mask: Tensor,
    num_chunks: int,
    window: int,
    mode: str = "entropy",
    margin: Margin = 20,
    *,
    entropy_of: str = "rollout_token",
    documents: Tensor | None = None,
) -> Tensor:
    """Up to which position `select_positions` gives the same, whatever the entropies of columns
    from `read` on are: chunks that depend on those have later positions.

    Args:
        read: columns whose entropies are known.
        mask, num_chunks, window, mode, margin, entropy_of, documents: as in `select_positions`.

    Returns:
        [B], int64, each from 0 to S; S if all are known.
    """
    inside, last = _chunks(mask, num_chunks)
    reach = window // 2 if mode == "entropy" else 0
    # behind the row's last column there is nothing to read
    known = (last + reach).clamp(max=mask.shape[1] - 1) < read
    first = inside.to(torch.int64).argmax(-1)
    least = _positions_of(first, mask, margin, entropy_of, documents)
    return torch.where(known, mask.shape[1], least - 1).amin(-1)


def _positions_of(
    index: Tensor, mask: Tensor, margin: Margin, entropy_of: str, documents: Tensor | None
) -> Tensor:
    """The positions [B, c] that entropies [B, c] stand for, within the margins; a later entropy
    never has an earlier one."""
    left, right = _margins(margin)
    position = index + ENTROPY_OF.index(entropy_of) + 1
    if documents is not None:
        return _nearest(position, room_for_rollouts(mask, documents, margin))
    first, length = _extent(mask)
    # torch.clamp gives the upper bound where the two cross.
    return position.clamp((first + left)[:, None], (first + length - right)[:, None])


def rollout_lengths(entropy: Tensor, positions: Tensor, nats: float, most: int) -> Tensor:
    """How many tokens a rollout takes until the entropies along the text add up to `nats`.

    Args:
        entropy: [B, S]; entry p - 1 is of the first rollout token at position p.
        positions: [B, c], with `most` columns of text behind each.
        nats: above 0.
        most: k, the longest.

    Returns:
        [B, c], int64, from 1 to `most`.
    """
    columns = positions[..., None] - 1 + torch.arange(most, device=positions.device)
    along = _upcast(entropy).gather(1, columns.flatten(1)).view(columns.shape)
    return 1 + (along.cumsum(-1)[..., :-1] < nats).sum(-1)


def room_for_rollouts(mask: Tensor, documents: Tensor, margin: Margin) -> Tensor:
    """Which positions leave the margins within their document, bool [B, S + 1].

    Args:
        mask: [B, S], nonzero on valid tokens, which are the first of each document.
        documents: [B, S], the number of each column's document, ascending.
        margin: as in `select_positions`.
    """
    left, right = _margins(margin)
    valid = mask.to(torch.int64)
    column = torch.arange(mask.shape[1], device=mask.device).expand_as(documents)
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    first = column.masked_fill(~begins, 0).cummax(dim=1).values
    lengths = torch.zeros_like(valid).scatter_add(1, documents - documents[:, :1], valid)
    end = first + lengths.gather(1, documents - documents[:, :1])
    # position p is of the document of column p - 1
    position = column + 1
    return F.pad((position - first >= left) & (end - position >= right), (1, 0))


def _nearest(position: Tensor, allowed: Tensor) -> Tensor:
    """The nearest allowed position [B, S + 1] to each [B, c], of two the first."""
    places = torch.arange(allowed.shape[1], device=position.device)
    distance = (places - position[..., None]).abs()
    return distance.masked_fill(~allowed[:, None], allowed.shape[1]).argmin(-1)


def _pool(values: Tensor, width: int, documents: Tensor | None = None) -> Tensor:
    reach = width // 2
    if documents is None:
        return F.avg_pool1d(values[:, None], width, stride=1, padding=reach)[:, 0]
    near = F.pad(values, (reach, reach)).unfold(1, width, 1)
    of = F.pad(documents, (reach, reach), value=-1).unfold(1, width, 1)
    return near.masked_fill(of != documents[..., None], 0.0).mean(-1)


def _extent(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First valid column and number of valid tokens, [B] each."""
    valid = mask.bool().to(torch.int64)
    return valid.argmax(-1), valid.sum(-1)


def _chunks(mask: Tensor, num_chunks: int) -> tuple[Tensor, Tensor]:
    """Which columns each chunk holds [B, c, S], and its last column [B, c]."""
    _require(num_chunks >= 1, f"the number of chunks must be at least 1, not {num_chunks}")
    valid = mask.bool()
    size = valid.sum(-1)[:, None, None] // num_chunks
    place = valid.cumsum(-1)[:, None] - 1  # of each column among the valid ones
    start = size * torch.arange(num_chunks, device=mask.device)[:, None]
    inside = (place >= start) & (place < start + size) & valid[:, None]
    column = torch.arange(mask.shape[1], device=mask.device)
    return inside, (inside * column).amax(-1)


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor, last: Tensor) -> Tensor:
    """First column whose cumulative probability exceeds the uniform, [B, c]."""
    # fp64: rounding in a sum over thousands of fp32 terms would bias the draw.
    cumulative = probabilities.double().cumsum(-1)
    # The sum may still end just short of 1, where no column exceeds a uniform next to 1.
    return (cumulative <= uniforms[..., None]).sum(-1).minimum(last)


def _margins(margin: Margin) -> tuple[int, int]:
    left, right = (margin, margin) if isinstance(margin, int) else margin
    _require(left >= 0 and right >= 0, f"position margins cannot be negative: {margin}")
    return left, right


def _upcast(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
