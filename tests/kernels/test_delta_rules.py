"""Chunk and recurrent forms of both delta rules against the token loop, values and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine_kernels.delta_rule import chunk
from refine_kernels.delta_rule.chunk import _CHUNKS_AT_ONCE
from refine_kernels.delta_rule.naive import naive_delta_rule
from refine_kernels.dispatch import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    recurrent_delta_rule,
    recurrent_gated_delta_rule,
    state_from_writes,
)
from refine_kernels.gated_delta_rule.naive import naive_gated_delta_rule
from torch import Tensor

gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])

NAIVE: dict[bool, Any] = {False: naive_delta_rule, True: naive_gated_delta_rule}
CHUNK: dict[bool, Any] = {False: chunk_delta_rule, True: chunk_gated_delta_rule}
RECURRENT: dict[bool, Any] = {False: recurrent_delta_rule, True: recurrent_gated_delta_rule}


def make_inputs(
    seed: int, b: int, t: int, h: int, k_dim: int, v_dim: int, gated: bool, groups: int = 1
) -> tuple[list[Tensor], Tensor]:
    """(q, k, v, beta[, g]) and an initial state, float64 leaves; beta up to 2, some exactly 0; h
    query and key heads, each shared by ``groups`` value heads."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=gen)

    q, k = (torch.nn.functional.normalize(randn(b, t, h, k_dim), dim=-1) for _ in range(2))
    h *= groups
    beta = 2 * randn(b, t, h).sigmoid() * (randn(b, t, h) > -1)
    inputs = [q, k, randn(b, t, h, v_dim), beta]
    if gated:
        inputs.append(-randn(b, t, h).exp())
    return [x.requires_grad_() for x in inputs], randn(b, h, k_dim, v_dim).requires_grad_()


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the outputs."""
    gen = torch.Generator().manual_seed(0)
    total = sum((x * torch.randn(x.shape, dtype=x.dtype, generator=gen)).sum() for x in outputs)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, inputs)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


shapes = {
    "seed": st.integers(0, 2**31),
    "b": st.integers(1, 2),
    "t": st.integers(1, 45),
    "h": st.integers(1, 3),
    "k_dim": st.integers(1, 6),
    "v_dim": st.integers(1, 6),
}


@gated_or_not
@given(chunk_size=st.integers(1, 20), **shapes)
def test_chunk_and_recurrent_equal_the_definition(gated, seed, b, t, h, k_dim, v_dim, chunk_size):
    inputs, state = make_inputs(seed, b, t, h, k_dim, v_dim, gated)
    leaves = [*inputs, state]
    expected = NAIVE[gated](*inputs, initial_state=state)
    o, final, boundaries, _ = CHUNK[gated](*inputs, initial_state=state, chunk_size=chunk_size)
    recurrent = RECURRENT[gated](*inputs, initial_state=state)
    assert len(boundaries) == -(-t // chunk_size)
    assert_close((o, final), expected)
    assert_close(recurrent, expected)
    expected_grads = gradients(list(expected), leaves)
    assert_close(gradients([o, final], leaves), expected_grads)
    assert_close(gradients(list(recurrent), leaves), expected_grads)


@gated_or_not
@given(groups=st.integers(1, 3), chunk_size=st.integers(1, 20), **shapes)
def test_norm_and_shared_heads(gated, seed, b, t, h, k_dim, v_dim, groups, chunk_size):
    """Queries and keys of any length, divided by their norms inside; eps counts."""
    inputs, state = make_inputs(seed, b, t, h, k_dim, v_dim, gated, groups)
    q, k = ((3 * x.detach()).requires_grad_() for x in inputs[:2])
    inputs[:2] = q, k
    leaves = [*inputs, state]
    options: dict[str, Any] = {"initial_state": state, "qk_norm_eps": 0.5}
    expected = NAIVE[gated](*inputs, **options)
    o, final, *_ = CHUNK[gated](*inputs, **options, chunk_size=chunk_size)
    recurrent = RECURRENT[gated](*inputs, **options)
    assert_close((o, final), expected)
    assert_close(recurrent, expected)
    expected_grads = gradients(list(expected), leaves)
    assert_close(gradients([o, final], leaves), expected_grads)
    assert_close(gradients(list(recurrent), leaves), expected_grads)


@gated_or_not
@given(chunk_size=st.integers(1, 20), **shapes)
def test_boundary_states_are_prefix_states(gated, seed, b, t, h, k_dim, v_dim, chunk_size):
    """Each is the state of the prefix alone, with its gradients, output unused or not."""
    inputs, state = make_inputs(seed, b, t, h, k_dim, v_dim, gated)
    leaves = [*inputs, state]
    boundaries = CHUNK[gated](*inputs, initial_state=state, chunk_size=chunk_size).states
    expected = [state * 1.0]
    for i in range(1, len(boundaries)):
        prefix = [x[:, : i * chunk_size] for x in inputs]
        expected.append(NAIVE[gated](*prefix, initial_state=state)[1])
    assert_close(boundaries, expected)
    unused = inputs[0]
    wanted = [x for x in leaves if x is not unused] if len(boundaries) > 1 else [state]
    assert_close(gradients(boundaries, wanted), gradients(expected, wanted))


@gated_or_not
@given(groups=st.integers(1, 3), chunk_size=st.integers(1, 20), norm=st.booleans(), **shapes)
def test_any_state_follows_from_the_writes(
    gated, seed, b, t, h, k_dim, v_dim, groups, chunk_size, norm
):
    """The states of all prefixes, read from the writes of the text: values and gradients, beside
    those of the output and the last state."""
    inputs, state = make_inputs(seed, b, t, h, k_dim, v_dim, gated, groups)
    leaves = [*inputs, state]
    options: dict[str, Any] = {"qk_norm_eps": 0.5 if norm else None}
    o, final, _, writes = CHUNK[gated](
        *inputs, initial_state=state, chunk_size=chunk_size, output_writes=True, **options
    )
    _, k, _, _, *g = inputs
    counts = [torch.full((b,), i) for i in range(1, t + 1)]
    read = [state_from_writes(state, k, writes, *g, counts=count, **options) for count in counts]
    of_all = state_from_writes(state, k, writes, *g, **options)
    assert_close([of_all], [read[-1]])
    expected = [
        NAIVE[gated](*(x[:, :i] for x in inputs), initial_state=state, **options)
        for i in range(1, t + 1)
    ]
    states = [s for _, s in expected]
    assert_close(read, states)
    every = [o, final, *read], [*expected[-1], *states]
    assert_close(gradients(every[0], leaves), gradients(every[1], leaves))


def test_states_are_read_past_tokens_that_erase_all():
    """What the last tokens write is not lost beside the decays of those before."""
    gen = torch.Generator().manual_seed(0)
    state, k, writes = (
        torch.randn(*shape, generator=gen)
        for shape in ((1, 2, 8, 8), (1, 600, 2, 8), (1, 600, 2, 8))
    )
    g = -20 * torch.rand(1, 600, 2, generator=gen)
    g[:, 300], g[:, -8:] = -torch.inf, g[:, -8:] / 20
    exact = state.double()
    for t in range(600):
        written = k[:, t, :, :, None].double() * writes[:, t, :, None, :]
        exact = g[:, t, :, None, None].double().exp() * exact + written
    torch.testing.assert_close(
        state_from_writes(state, k, writes, g).double(), exact, rtol=1e-5, atol=1e-6
    )


@gated_or_not
@given(chunk_size=st.integers(1, 20), cut=st.integers(1, 44), **shapes)
def test_pieces_equal_the_whole(gated, seed, b, t, h, k_dim, v_dim, chunk_size, cut):
    inputs, state = make_inputs(seed, b, t + 1, h, k_dim, v_dim, gated)
    leaves = [*inputs, state]
    cut = min(cut, t)
    whole = CHUNK[gated](*inputs, initial_state=state, chunk_size=chunk_size)
    o_1, middle, *_ = CHUNK[gated](
        *(x[:, :cut] for x in inputs), initial_state=state, chunk_size=chunk_size
    )
    o_2, final, *_ = CHUNK[gated](
        *(x[:, cut:] for x in inputs), initial_state=middle, chunk_size=chunk_size
    )
    pieces = [torch.cat((o_1, o_2), 1), final]
    assert_close(pieces, list(whole[:2]))
    assert_close(gradients(pieces, leaves), gradients(list(whole[:2]), leaves))


@gated_or_not
def test_several_groups_of_chunks(gated):
    """More chunks than are batched together, a last group that is not full, and a rest."""
    inputs, state = make_inputs(3, 2, 2 * (2 * _CHUNKS_AT_ONCE + 3) + 1, 2, 4, 3, gated)
    leaves = [*inputs, state]
    expected = NAIVE[gated](*inputs, initial_state=state)
    o, final, boundaries, _ = CHUNK[gated](*inputs, initial_state=state, chunk_size=2)
    assert len(boundaries) == 2 * _CHUNKS_AT_ONCE + 4
    assert_close((o, final), expected)
    assert_close(gradients([o, final], leaves), gradients(list(expected), leaves))


@gated_or_not
def test_without_queries_only_the_state_moves(gated):
    inputs, state = make_inputs(4, 2, 11, 2, 4, 3, gated)
    rest = inputs[1:]
    expected = NAIVE[gated](*inputs, initial_state=state)[1]
    o, final, *_ = CHUNK[gated](None, *rest, initial_state=state, chunk_size=4)
    o_r, final_r = RECURRENT[gated](None, *rest, initial_state=state)
    assert o is None and o_r is None
    assert_close([final, final_r], [expected, expected])
    expected_grads = gradients([expected], [*rest, state])
    assert_close(gradients([final], [*rest, state]), expected_grads)
    assert_close(gradients([final_r], [*rest, state]), expected_grads)


@gated_or_not
@pytest.mark.parametrize("tokens", [1, 4, 5, 11, 70])  # of one chunk, several, more than one call
def test_without_the_final_state_all_else_is_the_same(gated, tokens, monkeypatch):
    monkeypatch.setattr(chunk, "_CHUNKS_AT_ONCE", 4)
    inputs, state = make_inputs(11, 2, tokens, 2, 4, 3, gated)
    options = {"initial_state": state, "chunk_size": 4, "output_writes": True}
    for used in (slice(0, 1), slice(0, None)):  # of the output alone; of writes and states too
        found, expected = (
            CHUNK[gated](*inputs, **options, output_final_state=asked) for asked in (False, True)
        )
        assert found.final_state is None and len(found.states) == len(expected.states)
        ours, theirs = ([x.o, x.writes, *x.states[1:]][used] for x in (found, expected))
        assert all(map(torch.equal, ours, theirs))
        assert_close(gradients(ours, [*inputs, state]), gradients(theirs, [*inputs, state]), 1e-13)


@gated_or_not
def test_masked_tokens_leave_the_state_bitwise_unchanged(gated):
    inputs, state = make_inputs(5, 1, 9, 2, 4, 3, gated)
    masked = [*inputs[:3], *(torch.zeros_like(x) for x in inputs[3:])]
    for chunk_size in (2, 4, 64):
        _, final, *_ = CHUNK[gated](*masked, initial_state=state, chunk_size=chunk_size)
        assert torch.equal(final, state)
    assert torch.equal(RECURRENT[gated](*masked, initial_state=state)[1], state)


def test_no_state_is_a_zero_state_and_scale_is_applied():
    inputs, state = make_inputs(6, 1, 7, 2, 4, 3, False)
    zero = torch.zeros_like(state)
    expected = naive_delta_rule(*inputs, initial_state=zero, scale=0.3)
    assert_close(chunk_delta_rule(*inputs, scale=0.3, chunk_size=3)[:2], expected)
    assert_close(recurrent_delta_rule(*inputs, scale=0.3), expected)
    assert_close(naive_delta_rule(*inputs)[0] * 2, naive_delta_rule(*inputs, scale=1.0)[0], 1e-12)


def test_strong_decay_stays_finite():
    """exp of the sum of 64 such gates underflows, and the reversed differences would overflow."""
    inputs, state = make_inputs(7, 1, 130, 2, 4, 3, True)
    single = [x.detach().float() for x in inputs]
    single[4] = torch.full_like(single[4], -40.0)
    single = [x.requires_grad_() for x in single]
    expected = naive_gated_delta_rule(*single, initial_state=state.float())
    o, final, *_ = chunk_gated_delta_rule(*single, initial_state=state.float())
    assert o is not None
    assert final is not None
    assert_close((o, final), expected, 1e-5)
    assert_close(gradients([o, final], single), gradients(list(expected), single), 1e-5)


def test_repeated_keys_stay_accurate_in_float32():
    """One key for all tokens and beta near 2 is the hardest system: powers of it explode."""
    inputs, _ = make_inputs(8, 1, 128, 1, 16, 8, False)
    q, k, v, beta = (x.detach().clone() for x in inputs)
    k, beta = k[:, :1].expand_as(k), torch.full_like(beta, 1.9)
    expected = naive_delta_rule(q, k, v, beta)[0]
    o = chunk_delta_rule(*(x.float() for x in (q, k, v, beta)))[0]
    assert o is not None
    assert_close(o.double(), expected, 1e-3)
    assert (o.double() - expected).norm() / expected.norm() < 1e-4


@gated_or_not
def test_low_precision_inputs_are_computed_in_float32(gated):
    inputs, state = make_inputs(9, 1, 70, 2, 8, 8, gated)
    half = [x.detach().bfloat16().requires_grad_() for x in inputs]
    o, final, boundaries, _ = CHUNK[gated](*half, chunk_size=16)
    expected = NAIVE[gated](*(x.detach().double() for x in half))
    assert o.dtype == torch.bfloat16
    assert final.dtype == boundaries[0].dtype == torch.float32
    assert_close(final.double(), expected[1], 1e-5)
    o.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in half)
    assert RECURRENT[gated](*half)[1].dtype == torch.float32


def test_no_graph_without_grad():
    inputs, state = make_inputs(10, 1, 9, 2, 4, 3, False)
    with torch.no_grad():
        o, final, boundaries, _ = chunk_delta_rule(*inputs, initial_state=state, chunk_size=4)
    assert o is not None and final is not None
    assert not any(x.requires_grad for x in (o, final, *boundaries[1:]))
