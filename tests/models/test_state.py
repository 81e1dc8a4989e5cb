"""What states share and copy: forks read their text in place, reading a tape costs its streams."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refine_kernels.streams import StreamGroups
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine_mcore.models.attention import AttentionState
from refine_mcore.models.fast_weight_model import FastWeightModel, ModelOutput
from refine_mcore.models.lact_state import LaCTState
from refine_mcore.models.recorded_tokens import RecordedTokens, gather_tokens
from refine_mcore.models.state import FastWeightState, TokenHistory, map_tensors
from refine_mcore.pipeline.cut import Cut
from tests.models.zoo import FAMILIES, NAMES, assert_same, contents, random_tokens

ModelOf = Callable[[str], FastWeightModel]


class NewBytes(TorchDispatchMode):
    """Bytes of the storages that operations make while this is active; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = _storages((args, kwargs))
        self.made += sum(size for key, size in _storages(out).items() if key not in known)
        return out


def _storages(tree: Any) -> dict[int, int]:
    storages = [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}


class Alive(TorchDispatchMode):
    """The storages that operations made while this was active and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def histories(state: FastWeightState) -> list[TokenHistory]:
    if isinstance(state, LaCTState):
        return [state.attention.history, state.pending]
    return [state.history] if isinstance(state, AttentionState) else []


def shared_texts(states: list[FastWeightState]) -> list[Tensor]:
    """The texts' tensors that the states' streams read."""
    return [x for state in states for h in histories(state) for p in h.text or () for x in p]


def pointers(tensors: list[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def run(model: FastWeightModel, tokens: Tensor, states: Any = None) -> tuple[Tensor, Any]:
    out = model(tokens, states, output_states=True)
    return out.hidden, out.states


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoding_token_by_token_equals_one_go(name: str, model_of: ModelOf) -> None:
    """From a tape, past several chunk ends and until the window has left the text behind."""
    model, k = model_of(name), 9
    tape = model(random_tokens(2, 11), record=True).tape
    rollouts = random_tokens(4, k, seed=1)
    states = tape.at([0, 1, 1, 0], [3, 11, 4, 8])
    at_once, final = run(model, rollouts, states)
    for j in range(k):
        hidden, states = run(model, rollouts[:, j : j + 1], states)
        assert_same([hidden[:, 0]], [at_once[:, j]])
    for stream in range(4):
        assert_same(contents(model, states, stream), contents(model, final, stream))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["tape", "prefill"])
@torch.no_grad()
def test_select_repeats_drops_and_reorders(name: str, source: str, model_of: ModelOf) -> None:
    """Before and after decode steps that leave some streams in another chunk than others."""
    model = model_of(name)
    text, chosen = random_tokens(2, 11), [1, 0, 1, 1]
    if source == "tape":
        states = model(text, record=True).tape.at([0, 1, 0], [2, 11, 8])
    else:
        states = run(model, text[[0, 1, 0]])[1]
    steps = random_tokens(3, 3, seed=1)
    for after in (0, 1, 3):
        hidden, continued = None, states
        if after:
            hidden, continued = run(model, steps[:, :after], states)
        picked = [state.select(chosen) for state in continued]
        assert {state.num_streams for state in picked} == {4}
        again = [state.select([2, 0]) for state in picked]
        probe = random_tokens(3, 6, seed=2)
        expected, expected_states = run(model, probe, continued)
        hidden, picked_states = run(model, probe[chosen], picked)
        assert_same([hidden], [expected[chosen]])
        hidden, _ = run(model, probe[[1, 1]], again)
        assert_same([hidden], [expected[[1, 1]]])
        for stream, origin in enumerate(chosen):
            assert_same(
                contents(model, picked_states, stream), contents(model, expected_states, origin)
            )


@pytest.mark.parametrize("name", NAMES)
def test_forks_share_the_text(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    tape = model(random_tokens(2, 11), record=True).tape
    states = tape.at([0, 1], [5, 9])
    forks = [state.fork(3) for state in states]
    assert {state.num_streams for state in forks} == {6}
    decoded = model(random_tokens(6, 2), forks, output_states=True).states
    later = [state.select([5, 0, 0]) for state in decoded]
    for branched in (forks, decoded, later):
        assert pointers(shared_texts(branched)) == pointers(shared_texts(states))


def test_forks_of_a_prefill_share_its_keys(model_of: ModelOf) -> None:
    """A state that has no text behind it becomes the text of its forks."""
    model = model_of("lact-linear-full_attention")
    states = model(random_tokens(2, 11), output_states=True).states
    own = [x for state in states for h in histories(state) for piece in h.own for x in piece]
    forks = [state.fork(2) for state in states]
    assert own and pointers(shared_texts(forks)) == pointers(own)


@pytest.mark.parametrize("name", NAMES)
def test_mapping_the_tensors_of_a_state_changes_nothing_else(name: str, model_of: ModelOf) -> None:
    model = model_of(name)
    states = model(random_tokens(2, 11), record=True).tape.at([0, 1, 1], [5, 9, 9])
    detached = map_tensors(Tensor.detach, states)
    seen = [contents(model, s, stream) for s in (states, detached) for stream in range(3)]
    assert any(x.requires_grad for x in seen[0])
    assert not any(x.requires_grad for stream in seen[3:] for x in stream)
    for before, after in zip(seen[:3], seen[3:], strict=True):
        assert_same(after, before, tolerance=0)
    assert pointers(shared_texts(detached)) == pointers(shared_texts(states))


@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("full_attention")])
def test_slices_keep_keys_and_values_once(name: str, texts: int, model_of: ModelOf) -> None:
    """What lives between the forwards of a text and its backward, states and tapes included: the
    same in eight slices as in one."""
    model, tokens = model_of(name), random_tokens(texts, 768)
    kept = []
    for slices in (1, 8):
        with Alive() as alive:
            states: Any = None
            outs: list[ModelOutput] = []
            for piece in tokens.chunk(slices, 1):
                start = sum(out.hidden.shape[1] for out in outs)
                out = model(piece, states, start=start, output_states=True, record=True)
                states = Cut(out.states).handed
                outs.append(out)
            kept.append(alive.bytes)
    assert kept[1] <= 1.1 * kept[0], kept


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("texts", [1, 3])
def test_reading_the_tape_takes_memory_of_the_streams_only(
    name: str, texts: int, model_of: ModelOf
) -> None:
    """The same positions cost the same bytes in texts of 160 and of 640 tokens."""
    model = model_of(name)
    batch_index, position = [0, texts - 1, 0, texts - 1], [2, 70, 100, 131]
    made = []
    for length in (160, 640):
        tape = model(random_tokens(texts, length), record=True).tape
        tape.at(batch_index, position)  # lists of positions are kept for the next layer and reading
        with NewBytes() as new:
            forks = [state.fork(2) for state in tape.at(batch_index, position)]
        made.append(new.made)
        assert all(state.num_streams == 8 for state in forks)
    assert made[0] == made[1] > 0


def test_new_bytes_sees_copies_and_no_views() -> None:
    x = torch.zeros(10, 10)
    with NewBytes() as new:
        x.transpose(0, 1)[2:]
        assert new.made == 0
        x.transpose(0, 1).reshape(-1)
    assert new.made == x.nbytes


def test_gather_tokens_repeats_the_last_token() -> None:
    x = torch.randn(3, 7, 2)
    expected = torch.stack([x[2, [0, 1]], x[0, [6, 6]]])
    assert torch.equal(gather_tokens(x, [2, 0], [0, 6], 2), expected)
    assert gather_tokens(x, [2, 0], [1, 2], 0).shape == (2, 0, 2)


def test_recorded_tokens_have_the_gradient_of_a_gather() -> None:
    """Readings and the split that goes on with the tensor, against plain indexing."""
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    recorded, onward = RecordedTokens.record(ours * 2)
    head, tail = onward.split([2, 3], dim=-1)
    read = recorded.read([2, 2, 0], [0, 1, 5], 3)
    again = recorded.read([1], [4], 1)
    (head.sin().sum() + tail.cos().sum() + read.square().sum() + again.exp().sum()).backward()

    y = plain * 2
    expected = torch.stack([y[2, [0, 1, 2]], y[2, [1, 2, 3]], y[0, [5, 6, 6]]])
    assert torch.equal(read, expected)
    total = y[..., :2].sin().sum() + y[..., 2:].cos().sum()
    (total + expected.square().sum() + y[1, 4:5].exp().sum()).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_recorded_tokens_that_nothing_goes_on_with_have_the_gradient_of_what_was_read() -> None:
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    recorded, _ = RecordedTokens.record(x * 2)
    recorded.read([1, 1], [0, 1], 2).sum().backward()
    expected = torch.zeros_like(x)
    expected[1, :3] = torch.tensor([2.0, 4.0, 2.0])[:, None]
    assert x.grad is not None and torch.equal(x.grad, expected)


def test_tokens_recorded_beside_others_have_the_gradient_of_a_gather() -> None:
    """Of a tensor that nothing else reads, whose gradient another one's backward makes."""
    x = torch.randn(3, 7, 2, 2, dtype=torch.float64)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    recorded, onward = RecordedTokens.record(ours * 2, made_with=ours.sum((2, 3)))
    read = recorded.read([2, 2, 0], [0, 1, 5], 3)
    weights = torch.randn_like(read)
    (onward.sin().sum() + (read * weights).sum()).backward()

    y = plain * 2
    gathered = torch.stack([y[2, [0, 1, 2]], y[2, [1, 2, 3]], y[0, [5, 6, 6]]])
    assert torch.equal(read, gathered)
    (plain.sum((2, 3)).sin().sum() + (gathered * weights).sum()).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_stream_groups_lay_streams_out_by_row() -> None:
    x = torch.arange(12.0).reshape(6, 2)
    rows = [2, 0, 2, 2, 0, 2]  # nothing of row 1
    groups = StreamGroups(rows, 3)
    gathered = groups.gather(x)
    assert gathered.shape == (3, 8)
    assert gathered[0, :4].tolist() == [2, 3, 8, 9]
    assert gathered[2].tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    assert torch.equal(groups.scatter(gathered), x)


def test_map_tensors_reaches_into_containers() -> None:
    x = torch.ones(1, requires_grad=True)
    history = map_tensors(Tensor.detach, TokenHistory(((x,),), ((x,),), (0,), (1,)))
    assert not history.own[0][0].requires_grad and not history.text[0][0].requires_grad
    assert history.limit == (1,)


def test_a_position_off_the_tape_is_refused(model_of: ModelOf) -> None:
    model = model_of(FAMILIES[0])
    tape = model(random_tokens(1, 5), record=True).tape
    with pytest.raises(AssertionError, match="not on a tape of 0 to 5"):
        tape.at([0], [6])
