"""I1 to I4, the claims that in-place rollouts stand on, for every family and option, in float64.

I1 any split of a text with the state carried across equals one pass; I2 the tape read at t is the
state of the prefix up to t; I3 branches from the tape have the log-probs, hidden states and
gradients of full runs over prefix and rollout; I4 nothing before t, and no other text, depends on
token t.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.state import FastWeightState
from refine_mcore.rollout.branches import Branches
from tests.models.zoo import (
    FAMILIES,
    NAMES,
    assert_same,
    assert_same_gradients,
    contents,
    gradients,
    random_tokens,
    score,
    short_chunks,
    weights_like,
)

pytestmark = pytest.mark.usefixtures("short_chunks")
ModelOf = Callable[[str], FastWeightModel]
EXAMPLES = settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LENGTHS = st.integers(1, 19)


@pytest.mark.parametrize("name", NAMES)
def test_every_module_with_parameters_is_called(name: str, model_of: ModelOf) -> None:
    """Before a module's forward Megatron gathers what an optimizer step has changed."""
    model = model_of(name)
    modules = {x for x in model.modules() if any(True for _ in x.parameters(recurse=False))}
    called = set()
    hooks = [x.register_forward_pre_hook(lambda x, _: called.add(x)) for x in modules]
    model.logits(model(random_tokens(1, 9)).hidden)
    for hook in hooks:
        hook.remove()
    assert len(called) > 5 and called == modules


def weighed(tensors: list[Tensor]) -> Tensor:
    """A scalar in which every entry of every tensor counts."""
    return torch.stack([(x * weights_like(x, seed)).sum() for seed, x in enumerate(tensors)]).sum()


def run_pieces(
    model: FastWeightModel, tokens: Tensor, borders: list[int]
) -> tuple[Tensor, list[FastWeightState]]:
    """Hidden states [B, T, d] of all pieces together and the final states."""
    states: list[FastWeightState] | None = None
    hidden: list[Tensor] = []
    for start, stop in pairwise([0, *borders, tokens.shape[1]]):
        out = model(tokens[:, start:stop], states, output_states=True)
        assert out.states is not None
        states, hidden = out.states, [*hidden, out.hidden]
    assert states is not None
    return torch.cat(hidden, dim=1), states


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(length=LENGTHS, cuts=st.sets(st.integers(1, 18), max_size=5), seed=st.integers(0, 99))
@example(length=3, cuts={1, 2}, seed=0)  # pieces of one token, shorter than the convolution
@example(length=16, cuts={4, 8, 9}, seed=0)  # pieces that end with a chunk
def test_pieces_equal_one_pass(
    name: str, length: int, cuts: set[int], seed: int, model_of: ModelOf
) -> None:
    model = model_of(name)
    tokens = random_tokens(2, length, seed=seed)
    results = []
    for borders in ([], sorted(cut for cut in cuts if cut < length)):
        hidden, states = run_pieces(model, tokens, borders)
        seen = [hidden, *contents(model, states, 0), *contents(model, states, 1)]
        results.append((seen, gradients(model, weighed(seen))))
    (one, one_gradient), (pieces, pieces_gradient) = results
    assert_same(pieces, one)
    assert_same_gradients(pieces_gradient, one_gradient)


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(start=st.integers(0, 9), length=LENGTHS, data=st.data())
def test_tape_holds_the_state_of_every_prefix(
    name: str, start: int, length: int, data: st.DataObject, model_of: ModelOf
) -> None:
    model, stop = model_of(name), start + length
    tokens = random_tokens(2, stop)
    branch = st.tuples(st.integers(0, 1), st.integers(start, stop))
    branches = data.draw(st.lists(branch, min_size=1, max_size=5), label="(text, position)")
    probe = random_tokens(len(branches), 3, seed=5)

    states = model(tokens[:, :start], output_states=True).states if start else None
    out = model(tokens[:, start:], states, start=start, record=True)
    on_tape = out.tape.at(*zip(*branches, strict=True))
    after = model(probe, on_tape).hidden

    for stream, (text, position) in enumerate(branches):
        prefix = tokens[text : text + 1, :position]
        full = model(torch.cat([prefix, probe[stream : stream + 1]], dim=1)).hidden
        assert_same([after[stream]], [full[0, position:]])
        if position:
            alone = model(prefix, output_states=True).states
            assert_same(contents(model, on_tape, stream), contents(model, alone, 0))


@pytest.mark.parametrize("interval", [64, 128])
def test_tape_over_whole_chunks_of_the_kernel(model_of: ModelOf, interval: int) -> None:
    tokens = random_tokens(1, 150)
    positions = [1, 63, 64, 65, 127, 128, 150]
    for name in ("delta_net", "gated_delta_net"):
        model = model_of(name)
        with short_chunks(64, interval):
            on_tape = model(tokens, record=True).tape.at([0] * len(positions), positions)
            for stream, position in enumerate(positions):
                alone = model(tokens[:, :position], output_states=True).states
                assert_same(contents(model, on_tape, stream), contents(model, alone, 0))


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(
    k=st.sampled_from([1, 2, 3, 5, 8]),
    n=st.integers(1, 2),
    start=st.sampled_from([0, 0, 1, 4, 9]),
    branches=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 14)), min_size=1, max_size=4),
)
@example(k=8, n=2, start=0, branches=[(0, 1), (0, 4), (1, 3), (0, 14)])  # no, one, several chunks
@example(k=5, n=1, start=0, branches=[(1, 2), (1, 2)])  # shorter than the convolution, the same
def test_branches_equal_full_runs(
    name: str, k: int, n: int, start: int, branches: list[tuple[int, int]], model_of: ModelOf
) -> None:
    """The text is read in one piece, or its tape is of a later piece only."""
    model = model_of(name)
    branches = [(text, max(position, start)) for text, position in branches]
    tokens = random_tokens(2, 14)
    points = Branches(*map(tuple, zip(*branches, strict=True)))
    streams = points.fork(n)
    rollouts = random_tokens(len(streams), k, seed=7)

    earlier = model(tokens[:, :start], output_states=True) if start else None
    out = model(tokens[:, start:], earlier and earlier.states, start=start, record=True)
    text_hidden = torch.cat([earlier.hidden, out.hidden], dim=1) if earlier else out.hidden
    states = [state.fork(n) for state in out.tape.at(points.batch_index, points.position)]
    scores = score(model, states, streams.rows_before(text_hidden), rollouts)
    in_place = gradients(model, weighed([text_hidden, *scores[:2]]))

    hidden, log_probs = [], []
    leaving = zip(streams.batch_index, streams.position, rollouts, strict=True)
    for text, position, rollout in leaving:
        full = model(torch.cat([tokens[text, :position], rollout])[None]).hidden
        log_p = model.logits(full)[0, position - 1 : -1].log_softmax(-1)
        log_probs.append(log_p.gather(1, rollout[:, None])[:, 0])
        hidden.append(full[0, position:])
    expected = [torch.stack(log_probs), torch.stack(hidden)]
    assert_same(scores[:2], expected)
    assert_same_gradients(in_place, gradients(model, weighed([model(tokens).hidden, *expected])))


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(length=st.integers(2, 19), data=st.data())
def test_nothing_before_a_token_depends_on_it(
    name: str, length: int, data: st.DataObject, model_of: ModelOf
) -> None:
    model = model_of(name)
    changed = data.draw(st.integers(0, length - 1), label="changed token")
    tokens = random_tokens(1, length)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 23
    outs = [model(x, record=True) for x in (tokens, other)]
    before, after = (out.hidden[:, :changed] for out in outs)
    assert_same([after], [before], tolerance=1e-12)
    if changed:
        states = [out.tape.at([0], [changed]) for out in outs]
        assert_same(contents(model, states[1], 0), contents(model, states[0], 0), 1e-12)
    assert (outs[0].hidden[:, changed] != outs[1].hidden[:, changed]).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_of_a_batch_do_not_see_each_other(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    tokens = random_tokens(3, 15)
    padded = tokens.clone()
    padded[1, 6:] = 0
    out, other = (model(x, record=True, output_states=True) for x in (tokens, padded))
    assert_same([other.hidden[[0, 2]]], [out.hidden[[0, 2]]])
    assert_same([other.hidden[1, :6]], [out.hidden[1, :6]])
    for text in (0, 2):
        alone = model(tokens[text : text + 1], output_states=True)
        assert_same([out.hidden[text]], [alone.hidden[0]])
        assert_same(contents(model, out.states, text), contents(model, alone.states, 0))
        assert_same(contents(model, other.states, text), contents(model, out.states, text))
    valid, padded_valid = (x.tape.at([1], [6]) for x in (out, other))
    assert_same(contents(model, padded_valid, 0), contents(model, valid, 0))
