"""The Triton kernels of both delta rules against the token loop in float64.

Without a GPU they run in Triton's interpreter (interpreter.py).  Its matrices hold no bfloat16, so
operands are rounded to bfloat16 and multiplied in float32, which is exact in either.
"""

import importlib.util
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refine_kernels import dispatch, launch
from refine_kernels.delta_rule.naive import naive_delta_rule
from refine_kernels.gated_delta_rule.naive import naive_gated_delta_rule
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from refine_kernels.delta_rule import chunk, triton_chunk, triton_few

from refine_mcore.errors import UserError
from refine_mcore.models.delta_rule_state import _own
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.transformer_config import transformer_config
from tests.kernels.interpreter import (
    DEVICE,
    assert_near,
    gradients,
    interpreter_and_poison,  # noqa: F401
    leaves,
)
from tests.models import zoo
from tools.compile_kernels import Compiled, _faults
from tools.compile_kernels import main as compile_main

# An exponential that overflows is one too many, also where its value is then masked.
pytestmark = pytest.mark.filterwarnings("error:overflow encountered:RuntimeWarning")
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])


def make_inputs(
    b: int, t: int, h: int, k_dim: int, v_dim: int, gated: bool, groups: int = 1, norm: bool = False
) -> list[Tensor]:
    """q, k, v, beta[, g] and the initial state, float64; beta up to 2, some exactly 0."""
    gen = torch.Generator().manual_seed(t + k_dim)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=gen)

    q, k = randn(b, t, h, k_dim), randn(b, t, h, k_dim)
    if not norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    h *= groups
    beta = 2 * randn(b, t, h).sigmoid() * (randn(b, t, h) > -1)
    gates = [-randn(b, t, h).exp()] if gated else []
    return [q, k, randn(b, t, h, v_dim), beta, *gates, randn(b, h, k_dim, v_dim)]


def rounded(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """As a kernel gets them: q, k, v in `dtype`, gates and state in float32."""
    return [x.to(dtype if i < 3 else torch.float32) for i, x in enumerate(inputs)]


def definition(inputs: list[Tensor], chunk_size: int, eps: float | None) -> list[Tensor]:
    """Output, final state and the states between, token by token."""
    *sequences, state = inputs
    naive: Any = naive_gated_delta_rule if len(inputs) == 6 else naive_delta_rule
    outputs, states = [], []
    for piece in zip(*(x.split(chunk_size, 1) for x in sequences), strict=True):
        states.append(state)
        o, state = naive(*piece, initial_state=state, qk_norm_eps=eps)
        outputs.append(o)
    return [torch.cat(outputs, 1), state, *states[1:]]


def kernels(inputs: list[Tensor], chunk_size: int, eps: float | None) -> list[Tensor]:
    """The same by the kernels."""
    *sequences, state = inputs
    rule: Any = (
        triton_chunk.chunk_gated_delta_rule if len(inputs) == 6 else triton_chunk.chunk_delta_rule
    )
    o, final, states, _ = rule(
        *sequences, initial_state=state, qk_norm_eps=eps, chunk_size=chunk_size
    )
    assert len(states) == -(-sequences[1].shape[1] // chunk_size)
    assert states[0] is state
    return [o, final, *states[1:]]


def compare(
    inputs: list[Tensor],
    dtype: torch.dtype,
    chunk_size: int,
    tolerance: float,
    eps: float | None = None,
    grad_tolerance: float | None = None,
) -> None:
    """Outputs, states and all gradients of the kernels against the definition's."""
    given = rounded(inputs, dtype)
    exact, actual = leaves(given, dtype=torch.float64), leaves(given, device=DEVICE)
    expected = definition(exact, chunk_size, eps)
    results = kernels(actual, chunk_size, eps)
    assert results[0].dtype == dtype and all(x.dtype == torch.float32 for x in results[1:])
    grads = gradients(results, actual)
    assert_near(results, expected, tolerance)
    assert_near(grads, gradients(expected, exact), grad_tolerance or tolerance)
    assert [x.dtype for x in grads if x is not None] == [x.dtype for x in given]


SHAPES = {
    "one token": (1, 1, 1, 16, 16, 1, 16, None),
    "a few tokens, shared keys": (3, 5, 2, 20, 40, 2, 64, 1e-6),
    "most that count as few": (1, 16, 1, 16, 16, 1, 32, None),
    "one more": (1, 17, 1, 16, 16, 1, 32, None),
    "odd length, two texts": (2, 37, 2, 16, 16, 1, 16, None),
    "odd widths, shared keys, norm": (1, 33, 1, 20, 40, 2, 32, 0.5),
    "states rarer than chunks": (1, 70, 1, 32, 16, 1, 64, 1e-6),
}
LARGE_SHAPES = {
    "96 and 192": (1, 70, 1, 96, 192, 1, 64, 1e-6),
    "128": (1, 130, 2, 128, 128, 1, 64, 1e-6),
    "256": (1, 70, 1, 256, 256, 1, 64, 1e-6),
    "a few of 256": (2, 5, 1, 256, 256, 1, 64, 1e-6),
}


def compare_shape(shape: tuple[Any, ...], gated: bool) -> None:
    b, t, h, k_dim, v_dim, groups, chunk_size, eps = shape
    inputs = make_inputs(b, t, h, k_dim, v_dim, gated, groups, eps is not None)
    compare(inputs, torch.float32, chunk_size, 5e-6, eps)


@gated_or_not
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_definition(shape, gated):
    compare_shape(shape, gated)


@pytest.mark.slow
@gated_or_not
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_equals_the_definition_at_real_widths(shape, gated):
    compare_shape(shape, gated)


@gated_or_not
def test_chunks_of_64_in_float16(gated):
    """Operands in TF32, here float32: what float16 loses is the rounding of results."""
    compare(make_inputs(1, 131, 1, 16, 16, gated), torch.float16, 64, 5e-4)


@gated_or_not
def test_bfloat16(gated):
    """Rates up to one, as sigmoids make them.  Each operand is rounded to 8 bits, by 4e-3 at most;
    a gradient has up to five such operands in a row."""
    inputs = make_inputs(1, 70, 1, 64, 16, gated, norm=True)
    inputs[3] = inputs[3] / 2
    compare(inputs, torch.bfloat16, 64, 1e-2, 1e-6, grad_tolerance=3e-2)


def test_extreme_decays_and_rates():
    """Decays from none to all at once, also within a chunk, and writes of none, all and twice."""
    inputs = make_inputs(1, 53, 1, 16, 16, True)
    gen = torch.Generator().manual_seed(1)
    decays = torch.tensor([0.0, -1e-3, -1.0, -50.0, -90.0, -1e4, -math.inf], dtype=torch.float64)
    inputs[4] = decays[torch.randint(len(decays), inputs[4].shape, generator=gen)]
    inputs[3] = torch.randint(3, inputs[3].shape, generator=gen).double()
    compare(inputs, torch.float32, 32, 1e-3)


def test_strong_decay_throughout():
    """Sums of 64 such log decays underflow as factors, and their differences would overflow.  The
    sums reach 2560, where float32's numbers are 2.4e-4 apart."""
    inputs = make_inputs(1, 70, 1, 16, 16, True)
    inputs[4] = torch.full_like(inputs[4], -40.0)
    compare(inputs, torch.float16, 64, 5e-4)


def test_repeated_keys_stay_accurate():
    """One key for all tokens and rates near 2: powers of this system's matrix explode."""
    inputs = make_inputs(1, 128, 1, 16, 16, False)
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1])
    inputs[3] = torch.full_like(inputs[3], 1.9)
    compare(inputs, torch.float16, 64, 1e-3)
    given = rounded(inputs, torch.float16)
    final = kernels(leaves(given, device=DEVICE), 64, None)[1]
    # the order of sums, which is the CPU's, makes up to 1.4e-5 of float32's rounding
    assert_near([final], [definition(leaves(given, dtype=torch.float64), 64, None)[1]], 3e-5)


@gated_or_not
def test_views_of_packed_projections(gated):
    """q, k and v as the mixer has them: side by side, each token's together."""
    inputs = make_inputs(2, 19, 2, 16, 16, gated)
    packed = torch.cat([x.flatten(2) for x in inputs[:3]], -1).float()
    views = [x.unflatten(-1, (2, 16)) for x in packed.to(DEVICE).split([32, 32, 32], -1)]
    assert not views[0].is_contiguous()
    rest = [x.float().to(DEVICE) for x in inputs[3:]]
    assert_near(kernels([*views, *rest], 16, None), definition(inputs, 16, None), 5e-6)


@gated_or_not
def test_gradients_of_states_alone(gated):
    """No gradient of the output, as where only branches are trained; and one of a state alone."""
    inputs = make_inputs(1, 37, 1, 16, 16, gated)
    exact, actual = leaves(inputs), leaves(rounded(inputs, torch.float32), device=DEVICE)
    expected, results = definition(exact, 16, None), kernels(actual, 16, None)
    for chosen in ([1, 2, 3], [2]):
        grads = gradients([results[i] for i in chosen], actual)
        assert grads[0] is None
        wanted = gradients([expected[i] for i in chosen], exact)
        assert_near(grads[1:], wanted[1:], 5e-6)
        results = kernels(actual, 16, None)
        expected = definition(exact, 16, None)


@gated_or_not
@pytest.mark.parametrize(
    ("from_output", "queries"),
    [(True, True), pytest.param(False, True, marks=pytest.mark.slow), (False, False)],
    ids=["output", "alone", "no queries"],
)
def test_writes_and_their_gradients_equal_the_torch_form(gated, from_output, queries):
    inputs = make_inputs(2, 37, 1, 16, 16, gated, groups=2)
    rule: Any = (
        dispatch._gated_chunk.chunk_gated_delta_rule
        if gated
        else dispatch._delta_chunk.chunk_delta_rule
    )
    by_kernels: Any = getattr(triton_chunk, rule.__name__)
    found = []
    for form, given in (
        (rule, leaves(inputs)),
        (by_kernels, leaves(rounded(inputs, torch.float32), device=DEVICE)),
    ):
        q, *sequences, state = given
        out = form(
            q if queries else None,
            *sequences,
            initial_state=state,
            chunk_size=16,
            output_writes=True,
        )
        read = [out.writes, *([out.o] if from_output and queries else [])]
        found.append(([*read], gradients(read, given)))
    (expected, wanted), (actual, grads) = found
    assert_near(actual, [x.detach() for x in expected], 5e-6)
    assert [x is None for x in grads] == [x is None for x in wanted]
    known = [(a, e) for a, e in zip(grads, wanted, strict=True) if e is not None]
    assert len(known) >= len(inputs) - 1
    assert_near([a for a, _ in known], [e for _, e in known], 5e-6)


@gated_or_not
def test_without_queries_only_the_state_moves(gated):
    _, *rest = make_inputs(1, 21, 1, 16, 16, gated)
    *sequences, state = (x.float().to(DEVICE) for x in rest)
    k, v, beta = sequences[:3]
    g = sequences[3] if gated else None
    o, final, *_ = triton_chunk.chunk_rule(None, k, v, beta, g, None, None, state, 16, False)
    assert o is None
    expected = definition([torch.zeros_like(rest[0]), *rest], 16, None)[1]
    assert_near([final], [expected], 5e-6)


@gated_or_not
def test_masked_tokens_leave_the_state_bitwise_unchanged(gated):
    inputs = [x.float().to(DEVICE) for x in make_inputs(1, 21, 1, 16, 16, gated)]
    inputs[3:-1] = [torch.zeros_like(x) for x in inputs[3:-1]]
    assert torch.equal(kernels(inputs, 16, None)[1], inputs[-1])


def test_dispatch_says_what_runs(caplog):
    """Triton where it is wanted, torch for what it does not take, and a plain word on both."""
    caplog.set_level(logging.INFO, logger="refine_kernels.dispatch")
    dispatch._log_backend.cache_clear()
    inputs = [x.to(DEVICE) for x in make_inputs(1, 21, 1, 16, 16, True)]
    *sequences, state = (x.float() for x in inputs)
    dispatch.use(delta_rule="torch")
    options: dict[str, Any] = {"initial_state": state, "chunk_size": 16}
    by_torch = dispatch.chunk_gated_delta_rule(*sequences, **options)
    dispatch.use(delta_rule="triton")
    by_triton = dispatch.chunk_gated_delta_rule(*sequences, **options)
    assert by_torch[0] is not None and by_triton[0] is not None
    assert not torch.equal(by_torch[0], by_triton[0])
    torch.testing.assert_close(by_triton, by_torch, rtol=1e-4, atol=1e-5)
    dispatch.chunk_delta_rule(*inputs[:4], chunk_size=16)
    assert [r.getMessage().split(f" on {DEVICE}: ")[1] for r in caplog.records] == [
        "torch",
        "triton",
        "torch, as torch.float64 is none of bfloat16, float16 and float32",
    ]
    with pytest.raises(ValueError, match="'fast', must be one of 'auto', 'torch', 'triton', 'fla'"):
        dispatch.use(delta_rule="fast")


@pytest.mark.skipif(DEVICE != "cpu", reason="the group of ranks is on the CPU")
@pytest.mark.parametrize(
    "name",
    ["delta_net", pytest.param("gated_delta_net-value_heads-negative", marks=pytest.mark.slow)],
)
def test_a_model_and_its_tape(caplog, single_rank, name):
    """Text and branches of a model: states read off the tape, and every weight's gradient."""
    config = transformer_config(zoo.ARCHITECTURES[name], dtype=torch.float32)
    model = build_model(config, single_rank)
    initialize(model, seed=3)
    tokens, positions = zoo.random_tokens(1, 37), [16, 20, 37]
    caplog.set_level(logging.INFO, logger="refine_kernels.dispatch")
    dispatch._log_backend.cache_clear()
    found = []
    for backend in ("torch", "triton"):
        dispatch.use(delta_rule=backend)
        with zoo.short_chunks(16, 32):
            out = model(tokens, record=True)
            states = out.tape.at([0] * len(positions), positions)
            read = [x for stream in range(3) for x in zoo.contents(model, states, stream)]
            total = sum((x * zoo.weights_like(x)).sum() for x in (out.hidden, *read))
            found.append((read, zoo.gradients(model, total)))
    assert any(r.getMessage().endswith(" on cpu: triton") for r in caplog.records)
    (expected, expected_grads), (actual, grads) = found
    zoo.assert_same(actual, expected, 1e-5)
    zoo.assert_same_gradients(grads, expected_grads, 1e-4)


def test_the_tape_keeps_no_more_than_its_states():
    """The kernels hand out views of one buffer with the states of all chunks."""
    buffer = torch.zeros(8, 1, 2, 16, 16)
    for state in (buffer[3], torch.zeros(1, 2, 16, 16)):
        (own,) = _own([state])
        assert torch.equal(own, state)
        assert own.untyped_storage().nbytes() == own.nbytes
        assert (own.data_ptr() == state.data_ptr()) == (state._base is None)


@pytest.mark.parametrize(
    ("tokens", "kernel", "argument", "wrong"),
    [
        (17, "inputs", 16, "gradient of beta"),
        (17, "output", 7, "output"),
        (5, "few_backward", 9, "gradient of beta"),
        (5, "few_forward", 6, "output"),
    ],
)
def test_kernels_that_disagree_with_torch_are_refused(monkeypatch, tokens, kernel, argument, wrong):
    """As if the compiler had got one wrong."""
    caches = triton_chunk._disagreement, triton_few.disagreement
    run = launch.run

    def wrong_run(given: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        run(given, grid, *arguments, **constants)
        if given.fn.__name__ == kernel:
            arguments[argument][:, 3] = 0.5

    monkeypatch.setattr(launch, "run", wrong_run)
    x = torch.zeros(1, tokens, 1, 16, device=DEVICE)
    for cache in caches:
        cache.cache_clear()
    why = triton_chunk.refusal(x, x, x, x[..., 0], x[..., 0], chunk_size=16)
    assert why is not None and wrong in why
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


COMMAND = Path(__file__).parents[2] / "tools" / "compile_kernels.py"


def compile_kernels(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here Triton interprets."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(COMMAND), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_compiles_for_hopper(tmp_path):
    """With tensor cores, without spills, within shared memory.  Needs no GPU."""
    done = compile_kernels(tmp_path, "--arch", "sm_90", "--heads", "128x128", "--gates", "yes")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = done.stdout.splitlines()[2:]
    assert sum("gated_delta_rule_" in row for row in rows) == 9
    for name in ("recurrent", "rms_norm_backward", "conv_backward", "swiglu", "row_statistics"):
        assert any(f"| {name}" in row for row in rows)
    spilled = [row for row in rows if not re.fullmatch(r"\| \w+ \| \d+, 0, \d+ \|", row)]
    wide = re.compile(r"\| few_backward_k(192|256)_\w+ \| \d+, \d+, \d+ \|")
    assert all(wide.fullmatch(row) for row in spilled), spilled


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiles_for_all_chips(tmp_path):
    done = compile_kernels(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_over_budget_are_named(capsys, monkeypatch):
    variant = SimpleNamespace(
        name="gated_delta_rule_scan_k128_v128", products=True, may_spill=False
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command sets, for itself
    faults = {
        Compiled(255, 24, 1024, True): "24 bytes a thread are spilled, more than 16",
        Compiled(255, 0, 233000, True): "233000 bytes of shared memory, the chip has 232448",
        Compiled(255, 0, 1024, False): "no wgmma",
    }
    for found, fault in faults.items():
        assert _faults(variant, "sm_90", found) == [fault]
    monkeypatch.setattr("tools.compile_kernels.compiled", lambda *_: next(iter(faults)))
    with pytest.raises(SystemExit) as exit_code:
        compile_main(["--arch", "sm_90", "--heads", "128x128", "--gates", "yes"])
    assert exit_code.value.code == 1
    assert "over budget: gated_delta_rule_scan_k128_v128 for sm_90" in capsys.readouterr().out
    for options in (["--arch", "sm_70"], ["--heads", "128"], ["--kernels", "attention"]):
        with pytest.raises(UserError):
            compile_main(options)


def test_states_that_lie_together_are_stacked_without_a_copy():
    x = torch.randn(4, 1, 2, 3)
    rows = list(x.split(1))
    assert triton_chunk._stacked(rows[1:]).data_ptr() == x[1].data_ptr()
    for parts in (
        rows,
        rows[1:3],
        rows[::-1],
        rows[::2],
        [x[0], x[0].mT.contiguous().mT],
        rows[:1],
    ):
        assert torch.equal(triton_chunk._stacked(parts), torch.stack(parts))


@pytest.mark.parametrize("streams", [1, 2])
def test_sparse_gradients_of_writes_are_their_dense_ones(streams):
    """Some tokens' alone, one of them twice; beside the gradient of the output and without."""
    gen = torch.Generator().manual_seed(streams)
    q, k, v = (torch.randn(streams, 70, 2, 16, generator=gen) for _ in range(3))
    beta = torch.rand(streams, 70, 2, generator=gen)
    tokens = torch.tensor([[3, 69, 3, 20], [64, 0, 5, 64]])[:streams].flatten()
    texts = torch.arange(streams).repeat_interleave(4)
    rows = torch.randn(len(tokens), 2, 16, generator=gen)
    places = torch.stack((texts, tokens))
    sparse = torch.sparse_coo_tensor(places, rows, v.shape, check_invariants=True)
    for form in (triton_chunk.chunk_delta_rule, chunk.chunk_delta_rule):
        found = []
        for grad in (sparse, sparse.to_dense()):
            for of_o in (None, torch.ones_like(v)):
                given = [x.to(DEVICE).requires_grad_() for x in (q, k, v, beta)]
                out = form(*given, chunk_size=32, output_writes=True, qk_norm_eps=1e-6)
                outputs: Any = [out.writes] if of_o is None else [out.writes, out.o]
                grads = [grad.to(DEVICE)] + [x.to(DEVICE) for x in (of_o,) if x is not None]
                found.append(torch.autograd.grad(outputs, given[1:], grads))
        for ours, theirs in zip(found[:2], found[2:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
