"""The Triton kernels of norms, convolutions, SwiGLU, decoding and the vocabulary against their
definitions in float64."""

import functools
import importlib.util
from itertools import product
from typing import Any

import pytest
import torch
from refine_kernels import dispatch, launch
from refine_kernels.delta_rule.naive import naive_delta_rule
from refine_kernels.gated_delta_rule.naive import naive_gated_delta_rule
from refine_kernels.lact import chunk as lact_chunk
from refine_kernels.lact import forms
from refine_kernels.lact.fast_weights import FastWeights
from refine_kernels.lact.naive import naive_attention_and_fast_features
from refine_kernels.rms_norm.naive import naive_rms_norm
from refine_kernels.rotary.naive import naive_rotate
from refine_kernels.short_conv.naive import naive_causal_conv1d
from refine_kernels.swiglu.naive import naive_swiglu
from refine_kernels.vocab import sampling
from refine_kernels.vocab.random import combine_keys
from refine_kernels.vocab.shard import VocabShard
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from refine_kernels.delta_gates import gates
from refine_kernels.delta_gates import triton_gates as delta_gates
from refine_kernels.delta_rule import read, triton_read, triton_recurrent
from refine_kernels.lact import (
    newton_schulz,
    triton_features,
    triton_forms,
    triton_gates,
    triton_momentum,
    triton_moved,
    triton_newton_schulz,
)
from refine_kernels.rms_norm import triton_rms_norm
from refine_kernels.rotary import triton_rotary
from refine_kernels.short_conv import triton_conv
from refine_kernels.swiglu import triton_swiglu
from refine_kernels.vocab import triton_rows, triton_sampling

from tests.kernels.interpreter import (
    DEVICE,
    assert_near,
    compare,
    gradients,
    interpreter_and_poison,  # noqa: F401
    leaves,
)

# float32: sums of up to some thousand terms; bfloat16: gradients come in and go out rounded
PRECISIONS = [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
precision = pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["float32", "bfloat16"])


def randn(*shape: int) -> Tensor:
    gen = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=gen)


@precision
@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 20), (1, 37, 3, 128), (5, 5000)])
@pytest.mark.parametrize("gate", ["none", "full", "row"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
def test_rms_norm(monkeypatch, shape, gate, added, dtype, tolerance):
    monkeypatch.setattr(triton_rms_norm, "_PROGRAMS", 3)  # several blocks of rows a program
    inputs = [randn(*shape), 1 + randn(shape[-1]) / 2]
    names = [*(["gate"] if gate != "none" else []), *(["base"] if added else [])]
    if gate != "none":
        inputs.append(randn(*shape[:-1], shape[-1] if gate == "full" else 1))
    if added:
        inputs.append(randn(*shape) / 3)

    def of(form: Any) -> Any:
        def run(x: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor]:
            return [form(x, weight, 1e-5, **dict(zip(names, others, strict=True)))]

        return run

    compare(of(triton_rms_norm.rms_norm), of(naive_rms_norm), inputs, dtype, tolerance)


def test_rms_norm_of_views():
    """A gate as the mixer has it, side by side with other projections, and a gradient that was
    transposed."""
    packed = randn(2, 9, 4 * 16 + 3).float().to(DEVICE)
    x, gate = randn(2, 9, 4, 16).float().to(DEVICE), packed[..., 2:66].unflatten(-1, (4, 16))
    weight = torch.ones(16, device=DEVICE)
    found = []
    for form in (triton_rms_norm.rms_norm, naive_rms_norm):
        given = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        view = gate.detach().requires_grad_()
        y = form(given[0], given[1], 1e-5, view)
        found.append([y, *torch.autograd.grad(y.transpose(1, 2).cos().sum(), [*given, view])])
    assert_near(found[0], [x.double().cpu() for x in found[1]], 2e-6)


@precision
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 2 * 1500)])
def test_swiglu(shape, dtype, tolerance):
    compare(
        lambda x: [triton_swiglu.swiglu(x)],
        lambda x: [naive_swiglu(x)],
        [3 * randn(*shape)],
        dtype,
        tolerance,
    )


@precision
@pytest.mark.parametrize("doubled", [True, False], ids=["doubled", "once"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 35, 5), (1, 300, 16)])
def test_delta_gates(shape, gated, doubled, dtype, tolerance):
    """From views of one projection; decays from nearly none to nearly all, and rates of all
    sizes."""
    heads = shape[-1]
    parts = 8 * randn(*shape[:2], 2 * heads + 1)
    inputs = [parts[..., :heads]]
    if gated:
        inputs += [parts[..., heads : 2 * heads], randn(heads), 2 * randn(heads)]

    def of(form: Any) -> Any:
        return lambda *given: [x for x in form(*given, doubled=doubled) if x is not None]

    compare(of(delta_gates.delta_gates), of(gates.delta_gates), inputs, dtype, tolerance)


@precision
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    ("texts", "tokens", "channels", "width", "past"),
    [
        (1, 1, 5, 4, True),
        (2, 2, 70, 4, True),
        (2, 3, 3, 2, False),
        (1, 70, 40, 4, False),
        (2, 21, 6, 3, True),
        (1, 9, 4, 1, False),
    ],
)
def test_short_conv(
    monkeypatch, texts, tokens, channels, width, past, activation, dtype, tolerance
):
    monkeypatch.setattr(triton_conv, "_BLOCKS", 2)
    inputs = [randn(texts, tokens, channels), randn(channels, 1, width)]
    if past:
        inputs.append(randn(texts, width - 1, channels + 2))

    def of(form: Any) -> Any:
        def run(x: Tensor, weight: Tensor, packed: Tensor | None = None) -> Any:
            past = None if packed is None else packed[..., 1 : channels + 1]
            return form(x, weight, past, activation)

        return run

    compare(of(triton_conv.causal_conv1d), of(naive_causal_conv1d), inputs, dtype, tolerance)


def test_short_conv_of_a_view():
    """The channels as the mixer has them, side by side with other projections."""
    packed = randn(2, 70, 30).float().to(DEVICE)
    weight = randn(12, 1, 4).float().to(DEVICE)
    found = []
    for form in (triton_conv.causal_conv1d, naive_causal_conv1d):
        given = [packed.detach().requires_grad_(), weight.detach().requires_grad_()]
        y, last = form(given[0][..., 5:17], given[1], None, "silu")
        found.append([y, last, *torch.autograd.grad(y.transpose(1, 2).cos().sum(), given)])
    assert_near(found[0], [x.double().cpu() for x in found[1]], 2e-6)


@precision
@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
@pytest.mark.parametrize(
    ("batch", "tokens", "groups", "k_dim", "v_dim", "norm"),
    [
        (1, 1, 1, 16, 16, None),
        (3, 1, 2, 20, 40, 1e-6),
        (2, 5, 1, 96, 192, 0.5),
        (1, 2, 1, 256, 16, 1e-6),
    ],
)
def test_decode(batch, tokens, groups, k_dim, v_dim, norm, gated, dtype, tolerance):
    q, k = randn(batch, tokens, 2, k_dim), randn(batch, tokens, 2, k_dim) / 3
    if norm is None:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    heads = 2 * groups
    inputs = [q, k, randn(batch, tokens, heads, v_dim), 2 * randn(batch, tokens, heads).sigmoid()]
    if gated:
        inputs.append(-randn(batch, tokens, heads).exp())
    state = randn(batch, heads, k_dim, v_dim).float()
    given = [x.to(dtype) for x in inputs]
    name = "recurrent_gated_delta_rule" if gated else "recurrent_delta_rule"
    rule: Any = getattr(triton_recurrent, name)
    naive: Any = naive_gated_delta_rule if gated else naive_delta_rule
    with torch.no_grad():
        options = {"initial_state": state.to(DEVICE), "qk_norm_eps": norm}
        found = rule(*(x.to(DEVICE) for x in given), **options)
    options = {"initial_state": state.double(), "qk_norm_eps": norm}
    expected = naive(*(x.double() for x in given), **options)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert_near(found[:1], expected[:1], tolerance)
    assert_near(found[1:], expected[1:], 2e-6)


def test_decode_from_nothing_without_queries():
    k, v = (randn(2, 3, 2, 16).float().to(DEVICE) for _ in range(2))
    beta = randn(2, 3, 2).sigmoid().float().to(DEVICE)
    o, state = triton_recurrent.recurrent_delta_rule(None, k, v, beta)
    exact = [x.double().cpu() for x in (k, v, beta)]
    assert o is None
    assert_near([state], [naive_delta_rule(exact[0], *exact)[1]], 2e-6)


@precision
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "padding"), [(1, 2, 0), (7, 70, 3), (3, 9000, 100), (2, 40, 39)]
)
def test_vocabulary(rows, vocabulary, padding, linear, dtype, tolerance):
    """A target within, one at the edge and one outside, with tiles of few rows and columns."""
    targets = torch.arange(rows) * (vocabulary // rows)
    targets[-1] = vocabulary - padding - 1
    if rows > 2:
        targets[0] = -100
    options: dict[str, Any] = {
        "with_entropy": True,
        "temperature": 0.7,
        "vocab_size": vocabulary - padding,
    }
    inputs = [3 * randn(rows, vocabulary)]
    form: Any = triton_rows.log_probs_and_entropy
    if linear:
        inputs = [randn(rows, 8), randn(vocabulary, 8)]
        form = functools.partial(
            triton_rows.linear_log_probs_and_entropy, tile_entries=2 * max(rows, vocabulary)
        )

    def definition(*given: Tensor) -> list[Tensor]:
        logits = given[0] @ given[1].t() if linear else given[0]
        if linear and dtype != torch.float32:
            logits = logits + (logits.detach().to(dtype).double() - logits.detach())
        log_p = (logits / 0.7)[:, : vocabulary - padding].log_softmax(-1)
        held = (targets >= 0)[:, None]
        column = targets.clamp_min(0)[:, None]
        # an ignored target is read as logit 0
        of_target = log_p.gather(1, column)
        lse = (logits / 0.7)[:, : vocabulary - padding].logsumexp(-1, keepdim=True)
        return [torch.where(held, of_target, -lse)[:, 0], -(log_p.exp() * log_p).sum(-1).detach()]

    given = [x.to(dtype) for x in inputs]
    exact, actual = leaves(given, dtype=torch.float64), leaves(given, device=DEVICE)
    expected, found = definition(*exact), form(*actual, targets.to(DEVICE), **options)
    assert all(x.dtype == torch.float32 for x in found)
    assert_near(found, [x.detach() for x in expected], 2e-6 if not linear else tolerance)
    grads = gradients(found[:1], actual)
    # of hidden states: sums over all words, tile by tile
    tolerance = max(tolerance, 6e-6) if linear else tolerance
    assert_near(grads, gradients(expected[:1], exact), tolerance)


def test_extreme_logits():
    """Of all sizes, and a row of which one token has everything."""
    logits = torch.tensor([[-3e4, 3e4, 0.0, 3e4], [0.0, -1e4, -1e4, -1e4], [-3e38] * 4])
    targets = torch.tensor([1, 0, 2])
    found = []
    for form in (triton_rows.log_probs_and_entropy, dispatch.log_probs_and_entropy):
        x = logits.detach().to(DEVICE).requires_grad_()
        log_p, entropy = form(x, targets.to(DEVICE), with_entropy=True)
        found.append([log_p, entropy, *torch.autograd.grad(log_p.sum(), x)])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("greedy", [False, True], ids=["drawn", "likeliest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary", "padding"), [(1, 2, 0), (5, 70, 3), (4, 2500, 400)])
def test_samples_are_torchs(monkeypatch, rows, vocabulary, padding, dtype, greedy):
    """To the token, with the noise of the same keys; of equals the first, in any block."""
    monkeypatch.setattr(triton_sampling, "_CONSTANTS", {"BLOCK": 512, "num_warps": 4})
    logits = (2 * randn(rows, vocabulary)).to(DEVICE, dtype)
    if greedy:
        logits = logits.round()
    keys = None if greedy else combine_keys(3, torch.arange(2 * rows)).to(DEVICE)[::2]
    options: dict[str, Any] = {"vocab_size": vocabulary - padding}
    if not greedy:
        options["temperature"] = 1.3
    found = triton_sampling.sample_tokens(logits, keys, **options)
    assert found.dtype == torch.int64
    assert torch.equal(found, sampling.sample_tokens(logits, keys, **options))


def test_the_noise_of_samples_is_torchs():
    """To rounding: so few columns that every one is its row's best."""
    keys = combine_keys(3, torch.arange(200)).to(DEVICE)
    logits = torch.zeros(200, 1, device=DEVICE)
    shard = VocabShard(7, 1, None)
    found, _ = triton_sampling.best_columns(logits, keys, 1.3, shard)
    expected, _ = sampling.best_columns(logits, keys, 1.3, shard)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_rank_of_padding_has_no_best_column():
    best, token = triton_sampling.best_columns(
        torch.ones(3, 8, device=DEVICE), None, 1.0, VocabShard(8, 0, None)
    )
    assert token.tolist() == [0, 0, 0] and best.tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("texts", "heads", "tokens", "width"), [(1, 1, 1, 16), (2, 3, 5, 40)])
def test_lact_hidden(texts, heads, tokens, width, dtype):
    (actual,) = leaves([2 * randn(texts, heads, tokens, 2 * width + 1)], device=DEVICE, dtype=dtype)
    exact = actual.detach().double().cpu().requires_grad_()
    found = triton_gates.hidden(actual[..., :-1], dtype)
    expected = forms.hidden(exact[..., :-1], torch.float64)
    assert found.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    assert_near([found], [expected.detach()], tolerance)
    assert_near(gradients([found], [actual]), gradients([expected], [exact]), tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("texts", "heads", "tokens", "width"), [(1, 1, 1, 16), (2, 3, 5, 40)])
def test_lact_factors(texts, heads, tokens, width, dtype):
    """Against autograd, the kernels and in float64 torch's form; rates as a chunk has them, a piece
    of the text's."""
    form: Any = forms if dtype == torch.float64 else triton_gates
    device = "cpu" if dtype == torch.float64 else DEVICE
    zh, d = (2 * randn(texts, heads, tokens, size + 1)[..., :size] for size in (2 * width, width))
    rates = randn(texts, tokens + 2, heads, 3).sigmoid()[:, 2:]
    of_rates = torch.promote_types(dtype, torch.float32)
    given = [x.to(device, of_rates if x is rates else dtype) for x in (zh, d, rates)]
    exact = leaves(given, device="cpu", dtype=torch.float64)
    factors = forms.factors(exact[0], exact[1], exact[2], torch.float64)
    grads = [randn(*x.shape).to(device, dtype) for x in factors]
    expected = list(torch.autograd.grad(factors, exact, [g.double().cpu() for g in grads]))
    found = [*form.factors(*given, dtype), *form.factors_gradients(*given, *grads)]
    assert [x.dtype for x in found] == [*[dtype] * 4, of_rates]
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    assert_near(found, [*(x.detach() for x in factors), *expected], tolerance)


@precision
@pytest.mark.parametrize("rope", [False, True], ids=["still", "turned"])
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize(
    ("texts", "tokens", "heads", "head_dim", "turned", "shared"),
    [(1, 1, 1, 16, 16, True), (2, 5, 3, 40, 10, False), (2, 150, 2, 72, 24, True)],
)
def test_features(
    monkeypatch, texts, tokens, heads, head_dim, turned, shared, silu, rope, dtype, tolerance
):
    """Of a text's projections where they lie among others, with each of three columns of scales
    and offsets; texts at one position or each at its own."""
    monkeypatch.setattr(triton_features, "_PROGRAMS", 2)
    width = heads * head_dim
    packed, scales = randn(texts, tokens, 2 * width + 2), 1 + randn(width, 3) / 2
    angles = randn(1 if shared else texts, tokens, 1, turned // 2)

    def of(form: Any, kind: torch.dtype) -> Any:
        table = (angles.cos().to(kind), angles.sin().to(kind))

        def run(packed: Tensor, scales: Tensor, offsets: Tensor) -> list[Tensor]:
            x = packed[..., 2 : width + 2]
            angles = [t.to(packed.device) for t in table]
            options = {"head_dim": head_dim, "silu": silu, "fast_rope": rope}
            return [
                y
                for column in (0, 2)
                for y in form(x, scales, offsets, *angles, column=column, **options)
            ]

        return run

    compare(
        of(triton_features.attention_and_fast_features, torch.float32),
        of(naive_attention_and_fast_features, torch.float64),
        [packed, scales, randn(width, 3) / 3],
        dtype,
        tolerance,
    )


@precision
@pytest.mark.parametrize(
    ("streams", "tokens", "heads", "dim", "turned", "shared"),
    [(1, 1, 1, 2, 2, True), (3, 5, 2, 20, 20, False), (2, 70, 3, 24, 6, True)],
)
def test_rotary(streams, tokens, heads, dim, turned, shared, dtype, tolerance):
    """Heads where they lie among others; all streams at one position or each at its own; part of
    a head's dimensions."""
    angles = randn(1 if shared else streams, tokens, 1, turned // 2)

    def of(form: Any, kind: torch.dtype) -> Any:
        table = (angles.cos().to(kind), angles.sin().to(kind))

        def run(packed: Tensor) -> list[Tensor]:
            x = packed[..., 3:].unflatten(-1, (heads, dim))
            return [form(x, *(t.to(packed.device) for t in table))]

        return run

    compare(
        of(triton_rotary.rotate, torch.float32),
        of(naive_rotate, torch.float64),
        [randn(streams, tokens, heads * dim + 3)],
        dtype,
        tolerance,
    )


@pytest.mark.parametrize("form", [triton_moved, forms], ids=["kernels", "torch"])
@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
@pytest.mark.parametrize(
    ("streams", "heads", "rows", "columns"), [(1, 1, 1, 3), (2, 3, 5, 40), (1, 2, 7, 2500)]
)
def test_moved_fast_weights(streams, heads, rows, columns, prenorm, form: Any):
    """Against autograd: weights that all streams share, a step in less precision that is a
    transposed view, gradients of any layout, of both results, one or none; a row of zeros, which
    has no direction."""
    weight = randn(1, heads, rows, columns).expand(streams, -1, -1, -1).clone()
    step = (randn(streams, heads, columns, rows) / 3).to(torch.bfloat16)
    norm = randn(1, heads, rows, 1).abs()
    weight[:, :, 0], step[..., 0] = 0.0, 0.0
    # as bfloat16 holds them: gradients of operands come in that
    grads = [randn(streams, heads, columns, rows).to(torch.bfloat16) for _ in range(2)]
    exact = [x.double().requires_grad_() for x in (weight, step, norm)]
    r = exact[0] + exact[1].mT
    scaled = r * (exact[2] / (torch.linalg.vector_norm(r, dim=-1, keepdim=True) + 1e-5))
    expected = r if prenorm else scaled

    device = "cpu" if form is forms else DEVICE
    shared = weight[:1].float().to(device).expand(streams, -1, -1, -1)
    given = (shared, step.to(device).mT, norm.float().to(device))
    result = form.moved(*given, torch.bfloat16, prenorm=prenorm)
    assert result.operand is not None and result.operand.dtype == torch.bfloat16
    assert_near([result.weight], [expected.detach()], 2e-6)
    assert_near([result.operand], [scaled.detach()], 3e-3)
    for of_weight, of_operand in product((False, True), repeat=2):
        chosen = [(expected, grads[0])] * of_weight + [(scaled, grads[1])] * of_operand
        total = r.sum() * 0 + sum((x * g.mT.double()).sum() for x, g in chosen)
        wanted = torch.autograd.grad(
            total, exact, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        of_step = torch.empty_like(step, device=device)
        found = form.moved_gradients(
            *given,
            grads[0].float().to(device).mT if of_weight else None,
            grads[1].to(device).mT if of_operand else None,
            of_step.mT,
            prenorm=prenorm,
        )
        of_norm = found[1].sum_to_size(norm.shape)
        assert_near([found[0], of_norm], [wanted[0], wanted[2]], 3e-6)
        assert_near([of_step], [wanted[1]], 3e-3)


@pytest.mark.parametrize("shape", [(40, 5, 7), (20, 16, 16), (2, 70, 150), (5, 70, 20)])
def test_newton_schulz(shape):
    """The five steps and their backward, of matrices wide and tall: as near to float64 as the
    library's products are."""
    dtype = torch.bfloat16
    given = [randn(*shape, 1)[..., 0].to(DEVICE, dtype) for _ in range(2)]
    given[1] = given[1].flip(-1) + given[0] / 2
    exact, kept = newton_schulz.steps(given[0].double().cpu(), torch.float64)
    expected = exact, newton_schulz.steps_backward(kept, given[1].double().cpu())
    errors = []
    for products in (triton_newton_schulz.BY_KERNELS, newton_schulz.BY_LIBRARY):
        out, kept = newton_schulz.steps(given[0], dtype, products)
        found = out, newton_schulz.steps_backward(kept, given[1], products)
        assert all(x.dtype == dtype for x in found)
        pairs = zip(found, expected, strict=True)
        errors.append([((x.double().cpu() - e).norm() / e.norm()).item() for x, e in pairs])
    for ours, librarys in zip(*errors, strict=True):
        assert ours <= 1.3 * librarys < 0.5


def test_symmetric_products_are_symmetric():
    x, y, base = (randn(2, 70, 70).to(DEVICE, torch.bfloat16) for _ in range(3))
    base = base + base.mT
    for found in (
        triton_newton_schulz.symmetric(x),
        triton_newton_schulz.symmetric(x, y.flip(-1), base=base, beta=0.5, alpha=-2.0),
    ):
        assert torch.equal(found, found.mT)


def test_newton_schulz_of_wide_floats_is_the_librarys():
    x = randn(2, 5, 7).to(DEVICE, torch.float32)
    found, _ = newton_schulz.steps(x, x.dtype, triton_newton_schulz.BY_KERNELS)
    assert torch.equal(found, newton_schulz.steps(x, x.dtype)[0])


def test_newton_schulz_keeps_zeros_and_their_gradient_finite():
    x, grad = torch.zeros(2, 3, 4, device=DEVICE), torch.ones(2, 3, 4, device=DEVICE)
    y, norm = triton_newton_schulz.normalised(x, torch.bfloat16)
    found = triton_newton_schulz.normalised_gradient(grad.bfloat16(), y, norm)
    assert not y.any() and not norm.any() and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "first"])
@pytest.mark.parametrize("size", [(1, 1, 2, 3), (2, 3, 40, 50)])
def test_accumulated_gradients_of_updates(size, momentum, dtype) -> None:
    """Several pieces a head; a decay that lies among those of other updates; with and without what
    else the momentum's gradient has."""
    streams, heads, rows, width = size
    of_w02, of_w1 = (randn(streams, heads, n * rows, width).to(dtype) for n in (2, 1))
    before = randn(streams, heads, 3, rows, width).float()
    decays = randn(streams, 2, heads, 1, 1, 1).sigmoid().float()
    grad = randn(streams, heads, 3, rows, width + 1)[..., 1:].to(dtype)
    further = randn(streams, heads, 3, rows, width + 2)[..., 2:].float()
    exact = leaves((of_w02, of_w1, before, decays), dtype=torch.float64)
    expected = torch.cat(exact[:2], 2).unflatten(2, (3, -1))
    expected = expected + exact[3][:, 1] * exact[2] if momentum else expected
    given = [x.to(DEVICE) for x in (of_w02, of_w1)]
    decay, buffer = decays.to(DEVICE)[:, 1], before.to(DEVICE) if momentum else None
    module: Any
    for module in (triton_momentum, forms):
        found = module.accumulated(*given, decay, buffer, torch.float32)
        assert_near([found], [expected.detach()], 2e-6)
        for others in (None, further):
            total = grad.double() if others is None else grad.double() + others
            wanted = torch.autograd.grad(
                expected, exact, total, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            *products, of_buffer, of_decay = module.accumulated_gradients(
                grad.to(DEVICE), None if others is None else others.to(DEVICE), decay, buffer, dtype
            )
            assert all(x.dtype == dtype for x in products)
            assert_near(products, wanted[:2], 2e-6 if dtype == torch.float32 else 3e-3)
            if momentum:
                parts = of_decay.sum(-1)[..., None, None, None]
                assert_near([of_buffer, parts], [wanted[2], wanted[3][:, 1]], 2e-5)
            else:
                assert of_buffer is None and of_decay is None


@pytest.mark.parametrize("prenorm", [False, True], ids=["postnorm", "prenorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lact_by_kernels_is_torchs(prenorm, dtype):
    """A text of four chunks, with momentum: outputs, last weights and gradients, from the same
    inputs. In bfloat16 the kernels' distance from float64 is held against torch's."""
    tokens = [randn(2, 13, 2, 6 + i)[..., :6].to(dtype) for i in range(3)]
    rates, decay = randn(2, 13, 2, 3).sigmoid() / 3, randn(2, 13, 2).sigmoid()
    weights = [randn(1, 2, *shape) / 2 for shape in ((10, 6), (6, 10), (10, 6))]
    found = []
    for module, kind in (
        (triton_forms, dtype),
        (lact_chunk, dtype),
        (lact_chunk, torch.float64),
    ):
        device = "cpu" if kind == torch.float64 else DEVICE
        wide = torch.promote_types(kind, torch.float32)
        leaf = [x.to(device, kind).requires_grad_() for x in tokens]
        leaf += [x.float().to(device, wide).requires_grad_() for x in (rates, decay, *weights)]
        initial = FastWeights.of(*(w.expand(2, -1, -1, -1) for w in leaf[5:]))
        o, borders = module.chunk_lact(
            *leaf[:5],
            initial,
            FastWeights.of(*leaf[5:]).row_norms(),
            chunk_size=4,
            muon=False,
            prenorm=prenorm,
        )
        outputs = [o, *borders[-1][:3]]
        found.append([x.detach().double().cpu() for x in (*outputs, *gradients(outputs, leaf))])
    kernels, torchs, exact = found
    if dtype == torch.float32:
        assert_near(kernels, exact, 4e-6)
        return
    for i, (ours, theirs, true) in enumerate(zip(kernels, torchs, exact, strict=True)):
        error, torchs_error = ((x - true).norm() / true.norm() for x in (ours, theirs))
        assert error <= 1.4 * torchs_error <= 0.04, f"tensor {i}: {error:.1e}, {torchs_error:.1e}"


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("tokens", "counts", "heads", "groups", "k_dim", "v_dim"),
    [
        (1, [1], 1, 1, 16, 16),
        (21, [21, 8], 2, 2, 20, 70),
        (63, [0, 63, 1], 1, 1, 32, 24),
        (150, [150, 70], 1, 1, 16, 16),
    ],
)
def test_states_from_writes(tokens, counts, heads, groups, k_dim, v_dim, gated, norm):
    """Keys as a convolution leaves them, among others; decays from nearly none to nearly all;
    streams of which all tokens count, a few or none."""
    streams = len(counts)
    inputs = [
        randn(streams, heads * groups, k_dim, v_dim),
        randn(streams, tokens, heads, k_dim + 3)[..., 1 : k_dim + 1],
        randn(streams, tokens, heads * groups, v_dim),
    ]
    if gated:
        inputs.append(-(4 * randn(streams, tokens, heads * groups) - 4).exp())
    options = {"counts": torch.tensor(counts), "qk_norm_eps": 1e-6 if norm else None}

    def of(form: Any) -> Any:
        return lambda *given: [form(*given, **options)]

    compare(
        of(triton_read.state_from_writes),
        of(read.state_from_writes),
        inputs,
        torch.float32,
        4e-6,
    )


def test_launches_of_a_long_reading_take_their_own_tokens_alone():
    """Behind a piece of one text lie the decays of the next piece; with gradients, and without."""
    given = [randn(1, 1, 16, 16), randn(1, 100, 1, 16), randn(1, 100, 1, 16)]
    given = [x.to(DEVICE, torch.float32) for x in (*given, torch.full((1, 100, 1), -0.02))]
    options: dict[str, Any] = {"counts": torch.tensor([100], device=DEVICE), "qk_norm_eps": 1e-6}
    expected = read.state_from_writes(*given, **options)
    torch.testing.assert_close(triton_read.state_from_writes(*given, **options), expected)
    found = triton_read.state_from_writes(given[0].requires_grad_(), *given[1:], **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_states_after_many_writes_are_one_launch(monkeypatch, gated):
    """Of two texts, of which the tokens of one end within the second piece."""
    run, launched = launch.run, []

    def counted(kernel: Any, *given: Any, **constants: Any) -> None:
        launched.append(kernel)
        run(kernel, *given, **constants)

    monkeypatch.setattr(launch, "run", counted)
    given = [randn(2, 2, 16, 16), randn(2, 150, 1, 16), randn(2, 150, 2, 16)]
    given += [-randn(2, 150, 2).exp() / 8] if gated else []
    options: dict[str, Any] = {"counts": torch.tensor([150, 70]), "qk_norm_eps": 1e-6}
    found = triton_read.state_from_writes(*(x.to(DEVICE, torch.float32) for x in given), **options)
    assert len(launched) == 1
    assert_near([found], [read.state_from_writes(*given, **options)], 2e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU they run")
def test_on_a_cpu_without_the_interpreter_torch_runs(monkeypatch, caplog):
    caplog.set_level("INFO", logger="refine_kernels.dispatch")
    monkeypatch.delenv("TRITON_INTERPRET")
    dispatch.use(swiglu="triton")
    for cache in (dispatch._without_triton, dispatch._log_backend):
        cache.cache_clear()
    x = torch.randn(3, 8)
    try:
        torch.testing.assert_close(dispatch.swiglu(x), naive_swiglu(x))
    finally:
        dispatch._without_triton.cache_clear()
    (said,) = (r.getMessage() for r in caplog.records)
    assert said.startswith("swiglu on cpu: torch, as on a CPU Triton runs in its interpreter")


KEYWORDS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("x", "weight", "eps"),
    "swiglu": ("x",),
    "causal_conv1d": ("x", "weight"),
    "log_probs_and_entropy": ("logits", "targets", "with_entropy"),
    "linear_log_probs_and_entropy": ("hidden", "weight", "targets", "with_entropy"),
    "sample_tokens": ("logits", "keys"),
    "apply_fast_weights": ("weights", "fq"),
    "attention_and_fast_features": (
        *("x", "scale", "offset", "cos", "sin"),
        *("column", "head_dim", "silu", "fast_rope"),
    ),
    "rotate": ("x", "cos", "sin"),
    "recurrent_delta_rule": ("q", "k", "v", "beta"),
    "chunk_delta_rule": ("q", "k", "v", "beta"),
    "delta_gates": ("b", "a", "bias", "log_rate"),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_arguments_by_name_reach_the_kernels(name):
    operation = getattr(dispatch, name)
    x, heads = torch.randn(1, 3, 16, device=DEVICE), torch.randn(1, 3, 1, 16, device=DEVICE)
    square = torch.randn(1, 1, 16, 16, device=DEVICE)
    values: dict[str, Any] = {
        "x": x,
        "weight": x[0, 0, :, None, None].expand(-1, 1, 2) if "conv" in name else x[0, 0],
        "logits": x[0],
        "hidden": x,
        "targets": torch.zeros(3, dtype=torch.long, device=DEVICE),
        "with_entropy": True,
        "keys": torch.arange(3, device=DEVICE),
        "eps": 1e-5,
        "weights": FastWeights.of(square, square, square),
        **dict.fromkeys(("fq", "q", "k", "v"), heads),
        "beta": heads[..., 0],
        **dict.fromkeys(("a", "b"), x),
        **dict.fromkeys(("bias", "log_rate"), x[0, 0]),
    }
    if name.startswith("linear"):
        values |= {"weight": torch.randn(7, 16, device=DEVICE), "targets": values["targets"][None]}
    dispatch.use(**dispatch.ON_A_GPU)
    dispatch._log_backend.cache_clear()
    if name == "rotate":
        values |= {"x": heads}
    half = 8 if name == "rotate" else 2
    values |= dict.fromkeys(("cos", "sin"), torch.rand(1, 3, 1, half, device=DEVICE))
    values |= {"scale": x[0, :1].mT, "offset": x[0, 1:].mT} | FEATURES
    operation(**{x: values[x] for x in KEYWORDS[name]})
    assert dispatch.ran()[f"{name} on {DEVICE}"] == "triton"
    dispatch.use(**dict.fromkeys(dispatch.CHOICES, "torch"))
    assert not dispatch.ran()
    operation(**{x: values[x] for x in KEYWORDS[name]})  # the log has said so before
    assert dispatch.ran()[f"{name} on {DEVICE}"] == "torch"


FEATURES = {"column": 0, "head_dim": 8, "silu": True, "fast_rope": True}
CALLS: dict[str, tuple[Any, Any]] = {
    "rms_norm": (triton_rms_norm, lambda x: (x, x[0, 0], 1e-5)),
    "swiglu": (triton_swiglu, lambda x: (x,)),
    "short_conv": (triton_conv, lambda x: (x, x[0, 0, :, None, None].expand(-1, 1, 2))),
    "vocabulary": (triton_rows, lambda x: (x,)),
    "lact": (triton_forms, lambda x: (FastWeights.of(*[x[None]] * 3), x)),
    "features": (
        triton_features,
        lambda x: (x, *[x[0].mT] * 2, *[x[:, :, None, :4]] * 2),
    ),
    "rotary": (triton_rotary, lambda x: (x[:, :, None], x[:, :, None, :8], x[:, :, None, :8])),
    "read": (triton_read, lambda x: (x[:, :, :, None], x[:, :, None], x[:, :, None, :1])),
    "gates": (delta_gates, lambda x: (x,)),
    "sampling": (triton_sampling, lambda x: (x, None)),
    "delta_rule": (triton_recurrent, lambda x: (*[x[:, :, None]] * 3, x[..., :1])),
}


BACKWARD = ("features", "gates", "lact", "read", "rms_norm", "swiglu", "short_conv", "vocabulary")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, "forward") for name in CALLS] + [(name, "backward") for name in BACKWARD],
)
def test_kernels_that_disagree_with_torch_are_refused(monkeypatch, name, wrong):
    """As if the compiler had got the last tensor that it writes wrong."""
    module, arguments = CALLS[name]
    x = torch.ones(1, 1, 16, device=DEVICE)
    run = launch.run

    def wrong_run(kernel: Any, grid: Any, *given: Any, **constants: Any) -> None:
        run(kernel, grid, *given, **constants)
        backward = "backward" in kernel.fn.__name__ or "gradient" in kernel.fn.__name__
        if backward == (wrong == "backward"):
            written = [x for x in given if isinstance(x, Tensor)][-1]
            part = written[..., written.shape[-1] // 3 :]
            part.copy_(part * 1.2 + 1)

    module._disagreement.cache_clear()
    options: dict[str, Any] = FEATURES if name == "features" else {}
    with torch.inference_mode():  # as where text is generated
        assert module.refusal(*arguments(x), **options) is None
    module._disagreement.cache_clear()
    monkeypatch.setattr(launch, "run", wrong_run)
    why = module.refusal(*arguments(x), **options)
    module._disagreement.cache_clear()
    assert why is not None and "differs from torch's" in why
    assert ("gradient" in why) == (wrong == "backward")


@pytest.mark.parametrize("name", CALLS)
def test_kernels_that_do_not_run_are_refused(monkeypatch, name):
    """As on a chip with less memory than they need, or without a compiler."""
    module, arguments = CALLS[name]

    def failing(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(launch, "run", failing)
    options: dict[str, Any] = FEATURES if name == "features" else {}
    given = arguments(torch.ones(1, 1, 16, device=DEVICE))
    module._disagreement.cache_clear()
    failure: Exception = RuntimeError("out of resource: shared memory\nRequired: 233472")
    why = module.refusal(*given, **options)
    module._disagreement.cache_clear()
    expected = "the kernels do not run (RuntimeError: out of resource: shared memory)"
    assert why is not None and expected in why
    failure = torch.OutOfMemoryError("no memory")  # of which the run should hear
    with pytest.raises(torch.OutOfMemoryError):
        module.refusal(*given, **options)


@pytest.mark.parametrize("wrong", ["symmetric_product", "combined_product"])
def test_newton_schulz_that_disagrees_is_refused(monkeypatch, wrong):
    x = torch.ones(1, 1, 1, 16, device=DEVICE)
    given = FastWeights.of(x, x, x), x
    options: dict[str, Any] = {"muon": True, "muon_dtype": torch.bfloat16}
    run = launch.run

    def wrong_run(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        run(kernel, grid, *arguments, **constants)
        if kernel.fn.__name__ == wrong:
            written = [x for x in arguments if isinstance(x, Tensor)][-1]
            written[..., -3:].mul_(1.2)

    triton_forms._newton_schulz_disagreement.cache_clear()
    assert triton_forms.refusal(*given, **options) is None
    triton_forms._newton_schulz_disagreement.cache_clear()
    monkeypatch.setattr(launch, "run", wrong_run)
    why = triton_forms.refusal(*given, **options)
    triton_forms._newton_schulz_disagreement.cache_clear()
    assert why is not None and "Newton-Schulz differs from torch's" in why
