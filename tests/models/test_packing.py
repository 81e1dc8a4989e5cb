"""Documents packed into texts equal the same documents run apart: hidden states, states on the
tape, branches, gradients, for every family and option, whole and in slices, in float64."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refine_mcore.models import packing
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.packing import Documents
from tests.models.test_invariants import weighed
from tests.models.zoo import (
    NAMES,
    assert_same,
    assert_same_gradients,
    gradients,
    random_tokens,
)

pytestmark = pytest.mark.usefixtures("short_chunks")
ModelOf = Callable[[str], FastWeightModel]
EXAMPLES = settings(
    max_examples=6,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LENGTH = 30


@pytest.fixture(autouse=True)
def little_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that documents of these lengths go through a mixer in several calls."""
    monkeypatch.setattr(packing, "_PADDING", 2)


def starts(borders: set[int]) -> tuple[int, ...]:
    return (0, *sorted(borders))


BORDERS = st.sets(st.integers(1, LENGTH - 1), max_size=6).map(starts)


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(
    rows=st.tuples(BORDERS, BORDERS),
    cuts=st.sets(st.integers(1, LENGTH - 1), max_size=3),
    data=st.data(),
)
@example(rows=((0, 4, 16), (0, 29)), cuts={4, 12}, data=None)  # a slice begins with a document
@example(rows=((0,), (0, 1, 2, 3)), cuts={10, 20}, data=None)  # one goes on through all slices
def test_packed_equals_apart(
    name: str,
    rows: tuple[tuple[int, ...], ...],
    cuts: set[int],
    data: st.DataObject | None,
    model_of: ModelOf,
) -> None:
    model = model_of(name)
    tokens, probe_length = random_tokens(2, LENGTH), 3
    place = st.tuples(st.integers(0, 1), st.integers(1, LENGTH))
    branches = [(0, 3), (1, 30), (0, 17), (1, 2), (0, 16)]
    if data is not None:
        branches = data.draw(st.lists(place, min_size=1, max_size=5), label="(text, position)")
    probe = random_tokens(len(branches), probe_length, seed=5)

    documents = Documents(rows, LENGTH)
    states = None
    hidden: list[Tensor] = []
    behind: dict[int, Tensor] = {}
    for start, stop in pairwise([0, *sorted(cuts), LENGTH]):
        out = model(
            tokens[:, start:stop],
            states,
            start=start,
            documents=documents.part(start, stop),
            output_states=stop < LENGTH,
            record=True,
        )
        states, hidden = out.states, [*hidden, out.hidden]
        inside = [i for i, (_, position) in enumerate(branches) if start < position <= stop]
        if inside:
            on_tape = out.tape.at(*zip(*(branches[i] for i in inside), strict=True))
            # repeated, as the rollouts of a branch are
            streams = [i for i in range(len(inside)) for _ in range(2)]
            after = model(
                probe[inside].repeat_interleave(2, 0), [s.select(streams) for s in on_tape]
            ).hidden
            for i, branch in enumerate(inside):
                behind[branch] = after[2 * i : 2 * i + 2]
    seen = [torch.cat(hidden, 1), *(behind[i] for i in range(len(branches)))]

    apart = torch.empty_like(seen[0])
    for row, of_row in enumerate(rows):
        for start, stop in pairwise([*of_row, LENGTH]):
            apart[row, start:stop] = model(tokens[row : row + 1, start:stop]).hidden[0]
    expected = [apart]
    for i, (row, position) in enumerate(branches):
        prefix = tokens[row, documents.start_of(row, position) : position]
        full = model(torch.cat([prefix, probe[i]])[None]).hidden[:, len(prefix) :]
        expected.append(full.expand(2, -1, -1))
    assert_same(seen, expected)
    assert_same_gradients(gradients(model, weighed(seen)), gradients(model, weighed(expected)))


def test_documents_are_found_in_their_numbers() -> None:
    numbers = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0], [3, 4, 4, 4, 5]])
    documents = Documents.of(numbers)
    assert documents == Documents(((0, 2, 3), (0,), (0, 1, 4)), 5)
    assert documents.part(1, 4) == Documents(((1, 2), (), (0,)), 3)
    found = documents.numbers(torch.device("cpu"))
    assert torch.equal(found - found[:, :1], numbers - numbers[:, :1])
    assert [documents.start_of(0, position) for position in range(1, 6)] == [0, 0, 2, 3, 3]


def test_calls_are_padded_by_a_quarter_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_PADDING", 64)
    lengths = [1000, 990, 800, 700, 300, 290, 200, 130, 70, 66, 30, 5, 1]
    borders = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    documents = Documents((tuple(borders[:-1]),), borders[-1])
    groups = packing._groups(documents, output_states=False)
    assert [[s.length for s in group.segments] for group in groups] == [
        [1000, 990, 800],
        [700],
        [300, 290],
        [200],
        [130, 70, 66],
        [30, 5, 1],
    ]
