"""Position selection against the authors' numbers and against what must hold for any text."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from refine_mcore.objective.positions import (
    SELECTION_MODES,
    chunk_probabilities,
    known_up_to,
    rollout_lengths,
    room_for_rollouts,
    select_positions,
    smooth_entropy,
)

TOLERANCE = {"f32": 1e-5, "f64": 1e-9}
CASES = [(c, k) for c in (4, 8) for k in (1, 4, 5)]


def random_text(seed: int, lengths: list[int], size: int, side: str) -> tuple[Tensor, Tensor]:
    """Entropies of random rows and their mask; padded columns hold large values."""
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.full((len(lengths), size), 1e3, dtype=torch.float64)
    mask = torch.zeros(len(lengths), size, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else size - length
        values = 5 * torch.rand(length, generator=generator, dtype=torch.float64)
        entropy[row, start : start + length] = values
        mask[row, start : start + length] = 1
    return entropy, mask


@st.composite
def texts(draw):
    num_chunks = draw(st.integers(1, 5))
    shortest = max(num_chunks, 2)
    lengths = draw(st.lists(st.integers(shortest, 40), min_size=1, max_size=3))
    size = max(lengths) + draw(st.integers(0, 7))
    return draw(st.integers(0, 2**31)), lengths, size, num_chunks


# The authors' numbers


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("window", [1, 4, 5])
def test_smoothing_matches_golden(reference, window, dtype):
    mask = reference["samp.attention_mask"]
    smoothed = smooth_entropy(reference[f"samp.entropies.{dtype}"], mask, window)
    expected = reference[f"samp.k{window}.smoothed.{dtype}"]
    assert_close(smoothed, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("chunks, window", CASES)
def test_probabilities_match_golden(reference, reference_cases, chunks, window, dtype):
    entropy, mask = reference[f"samp.entropies.{dtype}"], reference["samp.attention_mask"]
    probabilities = chunk_probabilities(entropy, mask, chunks, window)
    expected = reference[f"samp.c{chunks}_k{window}.probs.{dtype}"]
    tolerance = TOLERANCE[dtype]
    assert_close(probabilities.sum(1), expected, rtol=tolerance, atol=tolerance)
    case = reference_cases["sampling"]["cases"][f"c{chunks}_k{window}"]
    for row, starts in enumerate(case["chunk_start"]):
        for chunk, start in enumerate(starts):
            columns = probabilities[row, chunk].nonzero()[:, 0]
            assert columns.tolist() == list(range(start, start + case["chunk_size"][row]))


@pytest.mark.parametrize("chunks", [4, 8])
def test_uniform_probabilities_match_golden(reference, chunks):
    mask = reference["samp.attention_mask"]
    zeros = torch.zeros_like(reference["samp.entropies.f32"])
    probabilities = chunk_probabilities(zeros, mask, chunks, window=1).sum(1)
    assert_close(
        probabilities, reference[f"samp.c{chunks}.uniform.probs.f32"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("chunks, window", CASES)
def test_drawn_index_maps_to_golden_position(reference, chunks, window, dtype):
    name = f"samp.c{chunks}_k{window}"
    index = reference[f"{name}.drawn_idx"].long()
    case_probs = reference[f"{name}.probs.f64"]
    mask = reference["samp.attention_mask"].long()
    first, size = mask.argmax(-1), mask.sum(-1) // chunks
    column = first[:, None] + size[:, None] * torch.arange(chunks) + index
    # The uniform that lies in the middle of the drawn entry's share of its chunk.
    drawn = case_probs.gather(1, column)
    uniforms = case_probs.cumsum(1).gather(1, column) - drawn / 2 - torch.arange(chunks)
    entropy = reference[f"samp.entropies.{dtype}"]
    positions = select_positions(entropy, mask, chunks, window, uniforms=uniforms)
    assert positions.dtype == torch.int64
    assert positions.tolist() == reference[f"{name}.drawn_start"].tolist()


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("mode", ["argmax", "argmin"])
@pytest.mark.parametrize("chunks, window", CASES)
def test_extremes_match_golden(reference, chunks, window, mode, dtype):
    entropy, mask = reference[f"samp.entropies.{dtype}"], reference["samp.attention_mask"]
    positions = select_positions(entropy, mask, chunks, window, mode=mode)
    assert positions.tolist() == reference[f"samp.c{chunks}.{mode}_start"].tolist()


@pytest.mark.parametrize("chunks, window", [(4, 4), (8, 5)])
def test_position_counts_consumed_tokens(reference, chunks, window):
    """The prefix is what lies before the position, the targets are the `window` columns from it."""
    name = f"samp.c{chunks}_k{window}.argmax"
    tokens, mask = reference["samp.input_ids"], reference["samp.attention_mask"]
    entropy = reference["samp.entropies.f32"]
    positions = select_positions(entropy, mask, chunks, window, mode="argmax")
    for row, position in enumerate(positions.flatten().tolist()):
        text, following = row // chunks, slice(position, position + window)
        assert reference[f"{name}.gt_ids"][row].tolist() == tokens[text, following].tolist()
        hidden = reference["samp.hidden_states"][text, following]
        assert reference[f"{name}.gt_hidden"][row].tolist() == hidden.tolist()
        prefix_mask = reference[f"{name}.prefix_mask"][row].bool()
        prefix = tokens[text, :position][mask[text, :position].bool()]
        assert reference[f"{name}.prefix_ids"][row][prefix_mask].tolist() == prefix.tolist()


def test_repeated_rollouts_start_at_the_same_golden_position(reference):
    entropy, mask = reference["samp.entropies.f32"], reference["samp.attention_mask"]
    positions = select_positions(entropy, mask, 4, 5, mode="argmax")
    rows = positions.flatten().repeat_interleave(3)
    following = rows[:, None] + torch.arange(5)
    targets = reference["samp.input_ids"].repeat_interleave(12, 0).gather(1, following)
    assert targets.tolist() == reference["samp.n3_c4_k5.argmax.gt_ids"].tolist()


def test_right_margin_wins_on_a_short_text(reference):
    entropy = reference["samp.edge_short.entropies"]
    mask = torch.zeros(1, 200)
    mask[:, 170:] = 1
    free = select_positions(entropy, mask, 4, 5, mode="argmax", margin=0)
    assert free.tolist() == reference["samp.edge_short.start_before_clamp"].tolist()
    clamped = select_positions(entropy, mask, 4, 5, mode="argmax")
    assert clamped.tolist() == reference["samp.edge_short.start"].tolist()


@pytest.mark.parametrize("mode", ["argmax", "argmin"])
def test_first_of_equal_entropies_wins(reference, mode):
    entropy = reference["samp.edge_ties.entropies"]
    mask = torch.ones_like(entropy)
    positions = select_positions(entropy, mask, 8, 1, mode=mode, margin=0)
    index = reference[f"samp.edge_ties.{mode}_idx"]
    assert positions.tolist() == (25 * torch.arange(8) + index + 1).tolist()


# What must hold for any text


@given(texts(), st.integers(1, 8), st.floats(0.2, 5.0), st.sampled_from(["left", "right"]))
def test_each_chunk_sums_to_one_inside_itself(text, window, temperature, side):
    seed, lengths, size, chunks = text
    entropy, mask = random_text(seed, lengths, size, side)
    probabilities = chunk_probabilities(entropy, mask, chunks, window, temperature)
    assert_close(probabilities.sum(-1), torch.ones(len(lengths), chunks, dtype=torch.float64))
    assert not probabilities.masked_select(mask[:, None] == 0).any()
    for row, length in enumerate(lengths):
        # A padded column's large entropy may leak in and round a probability down to zero.
        assert (probabilities[row] > 0).sum(-1).max() <= length // chunks


@given(texts(), st.integers(1, 8), st.floats(0.2, 5.0))
def test_probabilities_match_a_direct_reading_of_equation_6(text, window, temperature):
    seed, lengths, size, chunks = text
    entropy, mask = random_text(seed, lengths, size, "right")
    probabilities = chunk_probabilities(
        entropy, mask, chunks, window, temperature, ignore_masked=True
    )
    half = (window + 1 - window % 2) // 2
    for row, length in enumerate(lengths):
        values = entropy[row, :length]
        smoothed = [values[max(0, i - half) : i + half + 1].mean() for i in range(length)]
        for chunk in range(chunks):
            span = range(chunk * (length // chunks), (chunk + 1) * (length // chunks))
            weights = torch.stack([(smoothed[i] / temperature).exp() for i in span])
            expected = torch.zeros(size, dtype=torch.float64)
            expected[list(span)] = weights / weights.sum()
            assert_close(probabilities[row, chunk], expected, rtol=1e-9, atol=1e-12)


@given(
    texts(),
    st.sampled_from(SELECTION_MODES),
    st.sampled_from(["rollout_token", "prefix_token"]),
    st.data(),
)
def test_positions_keep_the_margins_on_either_padding(text, mode, entropy_of, data):
    seed, lengths, size, chunks = text
    left = data.draw(st.integers(0, min(lengths)))
    right = data.draw(st.integers(0, min(lengths) - left))
    uniforms = torch.rand(len(lengths), chunks, generator=torch.Generator().manual_seed(seed))
    selected = {}
    for side in ("left", "right"):
        entropy, mask = random_text(seed, lengths, size, side)
        selected[side] = select_positions(
            entropy,
            mask,
            chunks,
            5,
            mode=mode,
            margin=(left, right),
            uniforms=uniforms,
            ignore_masked=True,
            entropy_of=entropy_of,
        )
    valid = torch.tensor(lengths)[:, None]
    assert ((selected["right"] >= left) & (selected["right"] <= valid - right)).all()
    assert (selected["left"] - (size - valid)).tolist() == selected["right"].tolist()


@given(texts(), st.integers(1, 8))
def test_masked_pooling_never_sees_padding(text, window):
    seed, lengths, size, chunks = text
    entropy, mask = random_text(seed, lengths, size, "right")
    entropy[mask == 0] = float("nan")
    padded = chunk_probabilities(entropy, mask, chunks, window, ignore_masked=True)
    for row, length in enumerate(lengths):
        alone = entropy[row : row + 1, :length]
        expected = chunk_probabilities(
            alone, torch.ones_like(alone), chunks, window, ignore_masked=True
        )
        assert_close(padded[row, :, :length], expected[0], rtol=1e-12, atol=1e-12)


def test_draws_follow_the_probabilities():
    entropy, mask = random_text(0, [60], 64, "right")
    draws = 20_000
    grid = ((torch.arange(draws, dtype=torch.float64) + 0.5) / draws)[:, None].expand(-1, 3)
    positions = select_positions(
        entropy.expand(draws, -1), mask.expand(draws, -1), 3, 5, 1.0, margin=0, uniforms=grid
    )
    counts = torch.stack([torch.bincount(positions[:, i] - 1, minlength=64) for i in range(3)])
    expected = chunk_probabilities(entropy, mask, 3, 5)[0]
    assert_close(counts / draws, expected, rtol=0.0, atol=1.0 / draws, check_dtype=False)


def test_uniform_draws_ignore_the_entropy():
    entropy, mask = random_text(3, [61], 64, "right")
    uniforms = (torch.arange(40)[:, None] + 0.5) / 40
    rows = (entropy.expand(40, -1), mask.expand(40, -1))
    positions = select_positions(
        *rows, 3, 5, mode="uniform", margin=0, uniforms=uniforms.expand(-1, 3)
    )
    expected = 20 * torch.arange(3) + (20 * uniforms).long() + 1
    assert positions.tolist() == expected.tolist()


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 1 - 2**-53, 1.0])
def test_extreme_uniforms_stay_inside_the_chunk(uniform):
    entropy, mask = random_text(1, [997], 1024, "right")
    uniforms = torch.full((1, 7), uniform, dtype=torch.float64)
    positions = select_positions(entropy, mask, 7, 5, margin=0, uniforms=uniforms)
    assert ((positions - 1) // (997 // 7)).tolist() == [list(range(7))]


def test_entropy_of_the_prefix_token_moves_positions_by_one():
    entropy, mask = random_text(2, [50], 50, "right")
    uniforms = torch.tensor([[0.3, 0.7]])
    official, paper = (
        select_positions(
            entropy, mask, 2, 3, margin=(0, 2), uniforms=uniforms, entropy_of=entropy_of
        )
        for entropy_of in ("rollout_token", "prefix_token")
    )
    assert (paper - official).tolist() == [[1, 1]]


def test_low_precision_entropy_is_pooled_in_fp32(reference):
    entropy, mask = reference["samp.entropies.f32"].bfloat16(), reference["samp.attention_mask"]
    pooled = smooth_entropy(entropy, mask, 5)
    assert pooled.dtype == torch.float32
    assert_close(pooled, smooth_entropy(entropy.float(), mask, 5), rtol=0.0, atol=0.0)


def test_a_row_without_tokens_gives_zeros():
    probabilities = chunk_probabilities(torch.rand(1, 10), torch.zeros(1, 10), 2, 3)
    assert not probabilities.any()


@pytest.mark.parametrize("mode", SELECTION_MODES)
def test_selection_never_waits_for_the_device(mode):
    """Meta tensors hold no data, so anything that reads a value on the host raises."""
    entropy, uniforms = torch.empty(2, 50, device="meta"), torch.empty(2, 3, device="meta")
    positions = select_positions(
        entropy, entropy, 3, 5, mode=mode, uniforms=uniforms, ignore_masked=True
    )
    assert positions.shape == (2, 3)


# Entropies read piece by piece


def assert_known_positions_stay(entropy, mask, chunks, window, read, documents=None, **options):
    """Those of the first columns alone, up to the position known, against those of the row."""
    found = {}
    for name, behind in (("row", entropy), ("zeros", 0.0), ("large", 50.0)):
        values = entropy.clone()
        values[:, read:] = behind if isinstance(behind, float) else behind[:, read:]
        found[name] = select_positions(values, mask, chunks, window, documents=documents, **options)
    keywords = {k: v for k, v in options.items() if k in ("mode", "margin", "entropy_of")}
    known = known_up_to(read, mask, chunks, window, documents=documents, **keywords)[:, None]
    for name in ("zeros", "large"):
        same = found[name] == found["row"]
        assert (same | (torch.minimum(found[name], found["row"]) > known)).all()
    return known[:, 0]


@given(
    texts(),
    st.sampled_from(SELECTION_MODES),
    st.sampled_from(["rollout_token", "prefix_token"]),
    st.sampled_from(["left", "right"]),
    st.integers(1, 6),
    st.data(),
)
def test_known_positions_do_not_move(text, mode, entropy_of, side, window, data):
    seed, lengths, size, chunks = text
    left = data.draw(st.integers(0, min(lengths)))
    right = data.draw(st.integers(0, min(lengths) - left))
    entropy, mask = random_text(seed, lengths, size, side)
    uniforms = torch.rand(len(lengths), chunks, generator=torch.Generator().manual_seed(seed))
    options = {"mode": mode, "margin": (left, right), "entropy_of": entropy_of}
    before = torch.zeros(len(lengths), dtype=torch.int64)
    for read in range(1, size + 1):
        known = assert_known_positions_stay(
            entropy, mask, chunks, window, read, uniforms=uniforms, **options
        )
        assert (known >= before).all()
        before = known
    assert before.tolist() == [size] * len(lengths)


def test_a_chunk_is_known_once_its_pooled_entropies_are() -> None:
    mask = torch.ones(1, 40, dtype=torch.int64)
    # chunks of 10 columns; the last column of the first is pooled with two behind it
    known = [int(known_up_to(read, mask, 4, 5, margin=0)) for read in (11, 12, 21, 22, 39, 40)]
    assert known == [0, 10, 10, 20, 30, 40]
    assert int(known_up_to(10, mask, 4, 5, "argmax", margin=0)) == 10


# Refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "median"}, "unknown position mode 'median'"),
        ({"mode": "argmax", "entropy_of": "text"}, "unknown entropy_of 'text'"),
        ({"mode": "entropy"}, "needs uniforms"),
        ({"window": 0, "uniforms": torch.rand(1, 2)}, "window must be at least 1"),
        ({"temperature": 0.0, "uniforms": torch.rand(1, 2)}, "temperature must be above 0"),
        ({"num_chunks": 0, "uniforms": torch.rand(1, 0)}, "chunks must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    arguments = {"num_chunks": 2, "window": 1, "margin": 0, **options}
    with pytest.raises(ValueError, match=message):
        select_positions(torch.rand(1, 10), torch.ones(1, 10), **arguments)


# Texts packed of documents


@st.composite
def packed_texts(draw):
    """Document numbers, and a mask whose valid tokens begin each document."""
    size, margins = draw(st.integers(8, 40)), draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    rows = draw(st.integers(1, 3))
    numbers = torch.zeros(rows, size, dtype=torch.int64)
    mask = torch.zeros(rows, size, dtype=torch.int64)
    spans = []
    for row in range(rows):
        borders = sorted({0, size, *draw(st.sets(st.integers(1, size - 1), max_size=5))})
        of_row = []
        for number, (start, stop) in enumerate(pairwise(borders)):
            end = draw(st.integers(start, stop))
            numbers[row, start:stop], mask[row, start:end] = number, 1
            of_row.append((start, end))
        spans.append(of_row)
    return draw(st.integers(0, 2**31)), numbers, mask, spans, margins


def room(spans: list[tuple[int, int]], margins: tuple[int, int]) -> list[int]:
    left, right = margins
    return [p for start, end in spans for p in range(start + left, end - right + 1)]


@given(packed_texts(), st.integers(1, 4), st.sampled_from(SELECTION_MODES))
def test_positions_leave_margins_within_their_document(text, chunks, mode):
    seed, numbers, mask, spans, margins = text
    generator = torch.Generator().manual_seed(seed)
    entropy = 5 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    allowed = room_for_rollouts(mask, numbers, margins)
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == [room(s, margins) for s in spans]
    uniforms = torch.rand(len(mask), chunks, generator=generator, dtype=torch.float64)
    options = {"mode": mode, "margin": margins, "uniforms": uniforms}
    found = select_positions(entropy, mask, chunks, 3, documents=numbers, **options)
    # before anything is moved: no margins to keep, and the order of the documents does not matter
    drawn = (
        select_positions(entropy, mask, chunks, 3, documents=numbers, **options | {"margin": 0})
        if mask.all()
        else None
    )
    for row, of_row in enumerate(spans):
        possible = room(of_row, margins)
        if possible:
            assert set(found[row].tolist()) <= set(possible)
        if possible and drawn is not None:
            nearest = [min(possible, key=lambda q: abs(q - p)) for p in drawn[row].tolist()]
            assert found[row].tolist() == nearest


@given(packed_texts(), st.integers(1, 4), st.integers(1, 5), st.sampled_from(SELECTION_MODES))
def test_known_positions_do_not_move_in_documents(text, chunks, window, mode):
    seed, numbers, mask, spans, margins = text
    generator = torch.Generator().manual_seed(seed)
    entropy = 5 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(len(mask), chunks, generator=generator, dtype=torch.float64)
    options = {"mode": mode, "margin": margins, "uniforms": uniforms}
    for read in range(1, mask.shape[1] + 1):
        known = assert_known_positions_stay(entropy, mask, chunks, window, read, numbers, **options)
    assert known.tolist() == [mask.shape[1]] * len(mask)


@given(packed_texts(), st.sampled_from([1, 2, 3, 5]), st.booleans())
def test_entropies_are_pooled_within_a_document(text, window, ignore_masked):
    seed, numbers, mask, spans, _ = text
    generator = torch.Generator().manual_seed(seed)
    entropy = 5 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    options = {"ignore_masked": ignore_masked}
    found = smooth_entropy(entropy, mask, window, documents=numbers, **options)
    for row in range(len(mask)):
        for number in numbers[row].unique():
            columns = numbers[row] == number
            alone = smooth_entropy(
                entropy[row, columns][None], mask[row, columns][None], window, **options
            )
            assert_close(found[row, columns], alone[0], rtol=0, atol=1e-12)


def test_chunks_hold_equal_numbers_of_valid_tokens_of_all_documents():
    numbers = torch.tensor([[0] * 6 + [1] * 6])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0]])
    probabilities = chunk_probabilities(torch.zeros(1, 12), mask, 3, 1, documents=numbers)
    assert [row.nonzero()[:, 0].tolist() for row in probabilities[0]] == [
        [0, 1, 2],
        [3, 6, 7],
        [8, 9, 10],
    ]


@given(st.integers(0, 2**31), st.integers(1, 16), st.floats(0.1, 30))
def test_a_rollout_is_as_long_as_its_entropies_take_to_add_up(seed, most, nats):
    generator = torch.Generator().manual_seed(seed)
    entropy = 5 * torch.rand(2, 40, generator=generator, dtype=torch.float64)
    positions = torch.randint(1, 41 - most, (2, 3), generator=generator)
    found = rollout_lengths(entropy, positions, nats, most)
    for row in range(2):
        for position, length in zip(positions[row].tolist(), found[row].tolist(), strict=True):
            along = entropy[row, position - 1 :]
            assert 1 <= length <= most
            assert length == 1 or along[: length - 1].sum() < nats
            assert length == most or along[:length].sum() >= nats
