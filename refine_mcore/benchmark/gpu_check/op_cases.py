"""How `ops.py` calls each operation, on what, and what its definition makes of that.

On a GPU the shapes have the widths of the presets and fill more than one group of chunks; `tiny`
ones are for a CPU. Where the kernels have a naive form that is the definition; noise and keys are
computed once more in Python's integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from refine_kernels.attention.branches import Span
from refine_kernels.attention.decode import TextPlaces
from refine_kernels.attention.naive import naive_branch_attention, naive_text_attention
from refine_kernels.delta_rule.naive import naive_delta_rule, naive_gated_delta_rule
from refine_kernels.dispatch import backend, branch_attention, state_from_writes
from refine_kernels.lact.fast_weights import FastWeights
from refine_kernels.lact.naive import naive_attention_and_fast_features, naive_lact, naive_read
from refine_kernels.rms_norm.naive import naive_rms_norm
from refine_kernels.rotary.naive import naive_rotate
from refine_kernels.short_conv.naive import naive_causal_conv1d
from refine_kernels.swiglu.naive import naive_swiglu
from torch import Tensor

from refine_mcore.benchmark.gpu_check.ops import OpCase, Tensors

# exp, log, rsqrt and silu are within a few units of the last place on every device; a handful of
# operations in a row comes on top of the longest sum.
_POINTWISE = 16
# Five Newton-Schulz iterations with first coefficients 4.08, 3.95, 3.74, 2.88, 2.84 multiply the
# smallest singular values, and the rounding in them, by their product.
_MUON_GAIN = 493.0
# Reading fast weights or the gradients they are written with: operands, three products in a row
# with what stands between them, and as much again in the backward.
_PRODUCT_ROUNDINGS = 16
_TF32_ROUNDOFF = 2.0**-11
# Scores are rounded by no kernel, weights and their gradients by all.
_ATTENTION_ROUNDINGS = 4
# Tokens after a border of chunks whose writes are read.
_PAST_BORDER = 3


class Sizes(NamedTuple):
    """Tokens of the recurrences and their chunk, heads, key and value width; LaCT's fast head
    width, its chunk and tokens; rows, vocabulary and channels of the rest, and rows to sample."""

    tokens: int
    chunk: int
    heads: int
    key: int
    value: int
    fast: int
    fast_chunk: int
    fast_tokens: int
    rows: int
    vocabulary: int
    channels: int
    sampled: int


TINY = Sizes(75, 4, 2, 8, 12, 8, 32, 75, 37, 83, 24, 37)
FULL = Sizes(583, 64, 2, 128, 128, 128, 256, 600, 1031, 32000, 2048, 16)


def op_cases(sizes: Sizes) -> dict[str, list[OpCase]]:
    """The cases of every operation, by its name."""
    cases = [
        *_delta_rules(sizes),
        *_written_states(sizes),
        *_delta_gates(sizes),
        *_attention(sizes),
        *_branches(sizes),
        *_decoded_branches(sizes),
        *_lact(sizes),
        *_features(sizes),
        *_rotations(sizes),
        *_convolutions(sizes),
        *_norms(sizes),
        *_activations(sizes),
        *_vocabulary(sizes),
        *_random(sizes),
    ]
    found: dict[str, list[OpCase]] = {}
    for case in cases:
        found.setdefault(case.operation, []).append(case)
    return found


class _Draw:
    """Random inputs, the same every time."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self._generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator)


def _delta_rules(sizes: Sizes) -> list[OpCase]:
    """Write strengths up to 2, some of them 0; two value heads to a key head; norms inside. Of a
    few tokens also the chunkwise form, as rollouts are scored, and a token at a time also without
    gradients, as they are decoded: there are kernels for both."""
    cases = []
    for gated in (False, True):
        for chunked in (True, False):
            tokens = sizes.tokens if chunked else min(5, sizes.tokens)
            draw, heads = _Draw(1 + gated), sizes.heads
            inputs = {
                "q": draw.normal(1, tokens, heads // 2, sizes.key),
                "k": draw.normal(1, tokens, heads // 2, sizes.key),
                "v": draw.normal(1, tokens, heads, sizes.value),
                "beta": 2 * draw.normal(1, tokens, heads).sigmoid(),
                "state": draw.normal(1, heads, sizes.key, sizes.value),
            }
            inputs["beta"] *= draw.normal(1, tokens, heads) > -1
            if gated:
                inputs["g"] = -draw.normal(1, tokens, heads).exp() / 8
            form, rule = "chunk" if chunked else "recurrent", "gated_" if gated else ""
            cases.append(
                OpCase(
                    f"{form}_{rule}delta_rule",
                    "",
                    inputs,
                    _delta_run(sizes.chunk if chunked else None),
                    _delta_expected(gated, sizes.chunk if chunked else None),
                    # every token's write goes through the states of all later ones
                    chain=tokens + sizes.key + _POINTWISE,
                    wide=frozenset({"beta", "g", "state"}),
                    # the kernels round every operand of their products, torch's form none
                    narrow_in_triton=_PRODUCT_ROUNDINGS if chunked else None,
                )
            )
            if not chunked:
                decoding = replace(
                    cases[-1],
                    variant="decoding",
                    run=torch.no_grad()(cases[-1].run),
                    without_gradient=frozenset({"o", "state"}),
                )
                scoring = replace(
                    cases[-1],
                    operation=f"chunk_{rule}delta_rule",
                    variant="scoring",
                    run=_few_tokens_run,
                    narrow_in_triton=_PRODUCT_ROUNDINGS,
                )
                cases += [decoding, scoring]
    return cases


def _delta_arguments(x: Tensors) -> tuple[list[Tensor], dict[str, Any]]:
    given = [x[name] for name in ("q", "k", "v", "beta", "g") if name in x]
    return given, {"initial_state": x["state"], "qk_norm_eps": 1e-6}


def _few_tokens_run(operation: Callable[..., Any], x: Tensors) -> Tensors:
    given, options = _delta_arguments(x)
    out = operation(*given, **options)
    return {"o": out.o, "state": out.final_state}


def _delta_run(chunk: int | None) -> Callable[[Callable[..., Any], Tensors], Tensors]:
    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        given, options = _delta_arguments(x)
        if chunk is None:
            o, final = operation(*given, **options)
            return {"o": o, "state": final}
        out = operation(*given, **options, chunk_size=chunk, output_writes=True)
        stop = _middle_border(x, chunk)
        border, rest = out.states[stop // chunk], slice(stop, stop + _PAST_BORDER)
        inner = state_from_writes(
            border,
            x["k"][:, rest],
            out.writes[:, rest],
            x["g"][:, rest] if "g" in x else None,
            qk_norm_eps=options["qk_norm_eps"],
        )
        return {"o": out.o, "state": out.final_state, "at a border": border, "by writes": inner}

    return run


def _delta_expected(gated: bool, chunk: int | None) -> Callable[[Tensors], Tensors]:
    naive: Callable[..., Any] = naive_gated_delta_rule if gated else naive_delta_rule

    def expected(x: Tensors) -> Tensors:
        given, options = _delta_arguments(x)

        def after(tokens: int) -> Tensor:
            _, state = naive(*(y[:, :tokens] for y in given), **options)
            return state

        o, final = naive(*given, **options)
        if chunk is None:
            return {"o": o, "state": final}
        stop = _middle_border(x, chunk)
        inner = after(stop + _PAST_BORDER)
        return {"o": o, "state": final, "at a border": after(stop), "by writes": inner}

    return expected


def _middle_border(x: Tensors, chunk: int) -> int:
    return -(-x["v"].shape[1] // chunk) // 2 * chunk


def _written_states(sizes: Sizes) -> list[OpCase]:
    """States after the writes of two chunks and a few tokens, and after half of them, with and
    without decay."""
    cases, tokens = [], 2 * sizes.chunk + _PAST_BORDER
    for gated in (False, True):
        draw, heads = _Draw(5 + gated), sizes.heads
        inputs = {
            "state": draw.normal(2, heads, sizes.key, sizes.value),
            "k": draw.normal(2, tokens, heads // 2, sizes.key),
            "writes": draw.normal(2, tokens, heads, sizes.value),
        }
        if gated:
            inputs["g"] = -draw.normal(2, tokens, heads).exp() / 8
        cases.append(
            OpCase(
                "state_from_writes",
                "decay" if gated else "",
                inputs,
                _read_states,
                _written_expected,
                chain=tokens + sizes.key + _POINTWISE,
                wide=frozenset({"state", "writes", "g"}),
            )
        )
    return cases


def _written_counts(x: Tensors) -> Tensor:
    tokens = x["writes"].shape[1]
    return torch.tensor([tokens, tokens // 2], device=x["writes"].device)


def _read_states(operation: Callable[..., Any], x: Tensors) -> Tensors:
    return {"state": operation(**x, counts=_written_counts(x), qk_norm_eps=1e-6)}


def _written_expected(x: Tensors) -> Tensors:
    state = x["state"]
    keys = x["k"] / (x["k"].square().sum(-1, keepdim=True) + 1e-6).sqrt()
    keys = keys.repeat_interleave(state.shape[1] // keys.shape[2], 2)
    for t in range(keys.shape[1]):
        counts = (t < _written_counts(x))[:, None, None, None]
        written = keys[:, t, :, :, None] * x["writes"][:, t, :, None, :]
        decay = x["g"][:, t, :, None, None].exp() if "g" in x else 1.0
        state = torch.where(counts, state * decay + written, state)
    return {"state": state}


def _delta_gates(sizes: Sizes) -> list[OpCase]:
    """Alone, and doubled beside a decay."""
    cases = []
    for gated in (False, True):
        draw, heads = _Draw(7 + gated), sizes.heads
        inputs = {"b": draw.normal(2, sizes.rows, heads)}
        if gated:
            inputs |= {
                "a": 4 * draw.normal(2, sizes.rows, heads),
                "bias": draw.normal(heads),
                "log_rate": draw.normal(heads),
            }
        cases.append(
            OpCase(
                "delta_gates",
                "decay" if gated else "",
                inputs,
                _gates_run(doubled=gated),
                lambda x: _gates_expected(**x),
                # of bias and rate, sums over all tokens
                chain=2 * sizes.rows + _POINTWISE,
                wide=frozenset({"bias", "log_rate"}),
            )
        )
    return cases


def _gates_run(*, doubled: bool) -> Callable[[Callable[..., Any], Tensors], Tensors]:
    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        beta, g = operation(**x, doubled=doubled)
        return {"beta": beta} if g is None else {"beta": beta, "g": g}

    return run


def _gates_expected(
    b: Tensor,
    a: Tensor | None = None,
    bias: Tensor | None = None,
    log_rate: Tensor | None = None,
) -> Tensors:
    beta = 1 / (1 + (-b).exp())
    if a is None or bias is None or log_rate is None:
        return {"beta": beta}
    return {"beta": 2 * beta, "g": -log_rate.exp() * torch.log1p((a + bias).exp())}


def _attention(sizes: Sizes) -> list[OpCase]:
    """Two query heads to a key head, as wide as values; the rest of a text, which sees all of it or
    a window. Values lie among others, at no multiple of 16 bytes."""
    cases = []
    for window in (None, sizes.tokens // 3):
        draw = _Draw(16)
        inputs = {"q": draw.normal(2, sizes.tokens - sizes.chunk, sizes.heads, sizes.value)}
        for name, width in (("k", sizes.value), ("v", sizes.value + 4)):
            inputs[name] = draw.normal(2, sizes.tokens, sizes.heads // 2, width)

        def run(operation: Callable[..., Any], x: Tensors, window: int | None = window) -> Tensors:
            v = x["v"][..., : x["q"].shape[-1]]
            return {"o": operation(x["q"], x["k"], v, window=window)}

        cases.append(
            OpCase(
                "text_attention",
                "" if window is None else "window",
                inputs,
                run,
                partial(run, naive_text_attention),
                chain=2 * sizes.tokens + sizes.value + _POINTWISE,
                narrow=_ATTENTION_ROUNDINGS,
            )
        )
    return cases


def _branches(sizes: Sizes) -> list[OpCase]:
    """Three streams of two texts, two query heads to a key head; all of the text or a window."""
    cases = []
    for window in (None, sizes.tokens // 3):
        draw, key_heads = _Draw(17), sizes.heads // 2
        inputs = {"q": draw.normal(3, 3, sizes.heads, sizes.value)}
        for name, shape in (("own", (3, 5)), ("text", (2, sizes.tokens))):
            inputs |= {f"{name} {x}": draw.normal(*shape, key_heads, sizes.value) for x in "kv"}
        options: dict[str, Any] = {
            "spans": (Span(0, sizes.tokens, 7),),
            "rows": (1, 0, 1),
            "limit": (7 + sizes.tokens, 7 + sizes.tokens // 2, 9),
            "window": window,
        }

        def run(
            operation: Callable[..., Any], x: Tensors, options: dict[str, Any] = options
        ) -> Tensors:
            own, text = ((x[f"{name} k"], x[f"{name} v"]) for name in ("own", "text"))
            return {"o": operation(x["q"], own, [text], **options)}

        cases.append(
            OpCase(
                "branch_attention",
                "" if window is None else "window",
                inputs,
                run,
                partial(run, naive_branch_attention),
                chain=2 * sizes.tokens + sizes.value + _POINTWISE,
                narrow=_ATTENTION_ROUNDINGS,
            )
        )
    return cases


def _decoded_branches(sizes: Sizes) -> list[OpCase]:
    """A token of each of those streams, the third since it left. Texts are found by address in
    kernels alone; without them branches decode as they are scored."""
    cases, count = [], 3
    rows, limit = (1, 0, 1), (sizes.tokens, sizes.tokens // 2, 2)
    for window in (None, sizes.tokens // 3):
        draw, key_heads = _Draw(18), sizes.heads // 2
        inputs = {"q": draw.normal(3, 1, sizes.heads, sizes.value)}
        for name, shape in (("own", (3, count + 2)), ("text", (2, sizes.tokens))):
            inputs |= {f"{name} {x}": draw.normal(*shape, key_heads, sizes.value) for x in "kv"}

        def behind_text(
            operation: Callable[..., Any], x: Tensors, window: int | None = window
        ) -> Tensors:
            text, own = (x["text k"], x["text v"]), (x["own k"][:, :count], x["own v"][:, :count])
            spans = (Span(0, sizes.tokens, 0),)
            options: dict[str, Any] = {"spans": spans, "rows": rows, "limit": limit}
            return {"o": operation(x["q"], own, [text], window=window, **options)}

        def run(operation: Callable[..., Any], x: Tensors, window: int | None = window) -> Tensors:
            device = x["q"].device
            if backend("branches", device.type) == "torch":
                return behind_text(branch_attention, x, window)
            places = TextPlaces.of(x["text k"], x["text v"], rows, limit)
            own, made = (x["own k"], x["own v"]), torch.full((1,), count, device=device)
            return {"o": operation(x["q"], own, made, places, window=window)}

        cases.append(
            OpCase(
                "decode_attention",
                "" if window is None else "window",
                inputs,
                run,
                partial(behind_text, naive_branch_attention),
                chain=2 * sizes.tokens + sizes.value + _POINTWISE,
                narrow=_ATTENTION_ROUNDINGS,
                without_gradient=frozenset({"o"}),
            )
        )
    return cases


# Tokens of one rollout, and of those that share a chunk: as many rows of a product as kernels have.
_FEW = (5, 20, 40)

_LACT_OPTIONS: dict[str, dict[str, Any]] = {
    "": {"muon": False},
    "prenorm": {"muon": False, "prenorm": True},
    # products in float32, so that Muon amplifies no rounding of bfloat16
    "muon": {"muon": True, "precision": "float32"},
    "tf32": {"muon": False, "precision": "tf32"},
}


def _lact(sizes: Sizes) -> list[OpCase]:
    """Chunks of more tokens than fast heads are wide, as in every preset; with momentum but where
    prenorm stands, and an update that begins with momentum of its own."""
    cases = []
    for number, (variant, options) in enumerate(_LACT_OPTIONS.items()):
        momentum = variant != "prenorm"
        gain = _MUON_GAIN if options["muon"] else 1.0
        tf32 = variant == "tf32"
        runs = [("update_fast_weights", sizes.fast_chunk), ("chunk_lact", sizes.fast_tokens)]
        if not options["muon"]:
            runs += [("apply_fast_weights", tokens) for tokens in (sizes.fast_chunk, *_FEW)]
        for operation, tokens in runs:
            few = f"{tokens} tokens" if tokens in _FEW else ""
            cases.append(
                OpCase(
                    operation,
                    ", ".join(filter(None, (variant, few))),
                    _lact_inputs(sizes, tokens, momentum, 10 + number),
                    _LACT_RUNS[operation](options, sizes.fast_chunk),
                    _lact_expected(operation, options, sizes.fast_chunk),
                    # the sum over a chunk, once per chunk that is written
                    chain=tokens + sizes.fast + _POINTWISE,
                    narrow=1 if variant == "muon" else _PRODUCT_ROUNDINGS,
                    gain=gain,
                    product_roundoff=_PRODUCT_ROUNDINGS * _TF32_ROUNDOFF if tf32 else 0.0,
                    wide=frozenset({"lr", "momentum", "w0", "w1", "w2", "m0", "m1", "m2"}),
                    dtypes=(torch.float32,) if tf32 else (torch.float32, torch.bfloat16),
                )
            )
    return cases


def _lact_inputs(sizes: Sizes, tokens: int, momentum: bool, seed: int) -> Tensors:
    draw, d, n = _Draw(seed), sizes.fast, sizes.heads
    inputs = {name: draw.normal(1, tokens, n, d) for name in ("fq", "fk", "fv")}
    # keys and queries of unit norm, as the mixer makes them
    inputs |= {name: inputs[name] / d**0.5 for name in ("fq", "fk")}
    inputs["lr"] = draw.normal(1, tokens, n, 3).sigmoid() / 10
    inputs |= {name: draw.normal(1, n, d, d) / d**0.5 for name in ("w0", "w1", "w2")}
    if momentum:
        inputs["momentum"] = draw.normal(1, tokens, n).sigmoid()
        inputs |= {name: draw.normal(1, n, d, d) / 10 for name in ("m0", "m1", "m2")}
    return inputs


def _fast_weights(x: Tensors) -> FastWeights:
    buffers = torch.stack((x["m0"], x["m2"], x["m1"].mT), 2) if "m0" in x else None
    return FastWeights.of(x["w0"], x["w1"], x["w2"], buffers)


def _named(weights: FastWeights) -> Tensors:
    found = {"w0": weights.w0, "w1": weights.w1, "w2": weights.w2}
    if weights.momentum is not None:
        found |= zip(("m0", "m2", "m1"), weights.momentum.unbind(2), strict=True)
    return found


def _apply_run(options: dict[str, Any], chunk: int) -> Callable[..., Tensors]:
    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        return {"o": operation(_fast_weights(x), x["fq"], precision=options.get("precision"))}

    return run


def _update_run(options: dict[str, Any], chunk: int) -> Callable[..., Tensors]:
    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        weights = _fast_weights(x)
        written = (x["fk"], x["fv"], x["lr"], x.get("momentum"))
        return _named(operation(weights, weights.row_norms(), *written, **options))

    return run


def _chunk_run(options: dict[str, Any], chunk: int) -> Callable[..., Tensors]:
    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        weights = _fast_weights(x)
        tokens = (x["fq"], x["fk"], x["fv"], x["lr"], x.get("momentum"))
        o, borders = operation(*tokens, weights, weights.row_norms(), chunk_size=chunk, **options)
        return {"o": o} | _named(borders[-1])

    return run


_LACT_RUNS = {
    "apply_fast_weights": _apply_run,
    "update_fast_weights": _update_run,
    "chunk_lact": _chunk_run,
}


def _lact_expected(
    operation: str, options: dict[str, Any], chunk: int
) -> Callable[[Tensors], Tensors]:
    kept = {name: value for name, value in options.items() if name != "precision"}

    def expected(x: Tensors) -> Tensors:
        if operation == "apply_fast_weights":
            return {"o": naive_read(_fast_weights(x), x["fq"])}
        tokens: list[Any] = [x["fq"], x["fk"], x["fv"], x["lr"], x.get("momentum")]
        if operation == "update_fast_weights":  # one more token, which finds the weights written
            tokens = [None if y is None else torch.cat((y, y[:, :1]), 1) for y in tokens]
        fq, fk, fv, lr, momentum = tokens
        weights = _fast_weights(x)
        norms = weights.row_norms()
        o, borders = naive_lact(fq, fk, fv, lr, momentum, weights, norms, chunk_size=chunk, **kept)
        written = _named(borders[-1])
        return written if operation == "update_fast_weights" else {"o": o} | written

    return expected


def _features(sizes: Sizes) -> list[OpCase]:
    """Keys, of which queries share scales and offsets; each text at positions of its own."""
    draw, width = _Draw(20), sizes.heads * sizes.fast
    inputs = {
        "x": draw.normal(2, sizes.rows, width),
        "scale": 1 + draw.normal(width, 2) / 4,
        "offset": draw.normal(width, 2) / 4,
    }
    angles = 100 * draw.normal(2, sizes.rows, 1, sizes.fast // 8)  # four heads of the attention

    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        given = (x["x"], x["scale"], x["offset"], *_table(angles, x["x"]))
        options = {"column": 1, "head_dim": sizes.fast, "silu": True, "fast_rope": True}
        k, fk = operation(*given, **options)
        return {"k": k, "fk": fk}

    return [
        OpCase(
            "attention_and_fast_features",
            "",
            inputs,
            run,
            partial(run, naive_attention_and_fast_features),
            # the gradients of scale and offset are sums over all tokens
            chain=2 * sizes.rows + sizes.fast + _POINTWISE,
            narrow=8,  # product, sum, SiLU, the result; as many in the backward
        )
    ]


def _table(angles: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as operations take them beside a tensor."""
    wide = torch.promote_types(like.dtype, torch.float32)
    cos, sin = (table.to(like.device, wide) for table in (angles.cos(), angles.sin()))
    return cos, sin


def _rotations(sizes: Sizes) -> list[OpCase]:
    """Each text at positions of its own; a quarter of a head's dimensions as they are."""
    draw, dim = _Draw(25), sizes.fast
    angles = 100 * draw.normal(2, sizes.tokens, 1, dim * 3 // 8)

    def run(operation: Callable[..., Any], x: Tensors) -> Tensors:
        return {"y": operation(x["x"], *_table(angles, x["x"]))}

    return [
        OpCase(
            "rotate",
            "",
            {"x": draw.normal(2, sizes.tokens, sizes.heads, dim)},
            run,
            partial(run, naive_rotate),
            chain=_POINTWISE,
        )
    ]


def _convolutions(sizes: Sizes) -> list[OpCase]:
    cases = []
    for activation in ("silu", None):
        draw = _Draw(20)
        inputs = {
            "x": draw.normal(2, sizes.rows, sizes.channels),
            "weight": draw.normal(sizes.channels, 1, 4),
            "state": draw.normal(2, 3, sizes.channels),
        }
        cases.append(
            OpCase(
                "causal_conv1d",
                activation or "",
                inputs,
                partial(_convolve, activation=activation),
                partial(_convolve, naive_causal_conv1d, activation=activation),
                chain=2 * sizes.rows + _POINTWISE,  # the weight's gradient sums over all tokens
            )
        )
    return cases


def _convolve(operation: Callable[..., Any], x: Tensors, *, activation: str | None) -> Tensors:
    y, state = operation(x["x"], x["weight"], x["state"], activation)
    return {"y": y, "state": state}


def _norms(sizes: Sizes) -> list[OpCase]:
    cases = []
    for variant, gate in {"": None, "gate": sizes.channels, "added, one gate a row": 1}.items():
        draw = _Draw(30)
        inputs = {
            "x": draw.normal(2, sizes.rows, sizes.channels),
            "weight": draw.normal(sizes.channels),
        }
        if gate is not None:
            inputs["gate"] = draw.normal(2, sizes.rows, gate)
        if gate == 1:  # as LaCT adds what it reads
            inputs["base"] = draw.normal(2, sizes.rows, sizes.channels)
        cases.append(
            OpCase(
                "rms_norm",
                variant,
                inputs,
                _normalise,
                partial(_normalise, naive_rms_norm),
                chain=max(2 * sizes.rows, sizes.channels) + _POINTWISE,
            )
        )
    return cases


def _normalise(operation: Callable[..., Any], x: Tensors) -> Tensors:
    return {"y": operation(x["x"], x["weight"], 1e-5, x.get("gate"), x.get("base"))}


def _activations(sizes: Sizes) -> list[OpCase]:
    inputs = {"x": _Draw(40).normal(2, sizes.rows, 2 * sizes.channels)}
    return [
        OpCase(
            "swiglu",
            "",
            inputs,
            lambda operation, x: {"y": operation(x["x"])},
            lambda x: {"y": naive_swiglu(x["x"])},
            chain=_POINTWISE,
            narrow=2,  # silu(gate), then the product
        )
    ]


def _vocabulary(sizes: Sizes) -> list[OpCase]:
    """A padded vocabulary, a temperature, and an ignored target, which is read as logit 0."""
    draw, padding, temperature = _Draw(50), 5, 0.7
    logits = 5 * draw.normal(sizes.rows, sizes.vocabulary + padding)
    options: dict[str, Any] = {"temperature": temperature, "vocab_size": sizes.vocabulary}
    targets = draw.integers(0, sizes.vocabulary, sizes.rows)
    targets[1] = -100
    keys = draw.integers(-(2**62), 2**62, sizes.sampled)

    def log_probs(operation: Callable[..., Any], x: Tensors) -> Tensors:
        found, entropy = operation(x["logits"], x["targets"], with_entropy=True, **options)
        return {"log_probs": found, "entropy": entropy}

    def linear(operation: Callable[..., Any], x: Tensors) -> Tensors:
        given = (x["hidden"], x["weight"], x["targets"])
        tiles = x["hidden"].shape[0] * x["weight"].shape[0] // 3  # logits at a time
        found, entropy = operation(*given, with_entropy=True, tile_entries=tiles, **options)
        return {"log_probs": found, "entropy": entropy}

    def log_softmax(x: Tensors) -> Tensors:
        logits = x["logits"] if "logits" in x else x["hidden"] @ x["weight"].t()
        scaled = logits[:, : sizes.vocabulary] / temperature
        every, targets = scaled.log_softmax(-1), x["targets"]
        of_target = scaled.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
        return {
            "log_probs": of_target - scaled.logsumexp(-1),
            "entropy": -(every.exp() * every).sum(-1),
        }

    def gumbel(x: Tensors) -> Tensors:
        noise = _uniform(x["keys"], sizes.vocabulary).log().neg().log()
        scaled = x["logits"][:, : sizes.vocabulary] / temperature
        return {"tokens": (scaled - noise).argmax(-1)}

    return [
        OpCase(
            "log_probs_and_entropy",
            "",
            {"logits": logits, "targets": targets},
            log_probs,
            log_softmax,
            chain=sizes.vocabulary + _POINTWISE,
            without_gradient=frozenset({"entropy"}),
        ),
        OpCase(
            "linear_log_probs_and_entropy",
            "",
            {
                "hidden": draw.normal(sizes.rows, sizes.key),
                "weight": draw.normal(sizes.vocabulary + padding, sizes.key) * sizes.key**-0.5,
                "targets": targets,
            },
            linear,
            log_softmax,
            chain=sizes.vocabulary + sizes.rows + sizes.key + _POINTWISE,
            # a logit's rounding is relative to it, and it is an exponent
            narrow=8,
            without_gradient=frozenset({"entropy"}),
        ),
        OpCase(
            "sample_tokens",
            "drawn",
            {"logits": logits[: sizes.sampled], "keys": keys},
            lambda operation, x: {"tokens": operation(x["logits"], x["keys"], **options)},
            gumbel,
            chain=0,
        ),
        OpCase(
            "sample_tokens",
            "greedy",
            {
                "logits": logits[: sizes.sampled].round()
            },  # many equal ones, of which the first counts
            lambda operation, x: {
                "tokens": operation(x["logits"], None, vocab_size=sizes.vocabulary)
            },
            lambda x: {"tokens": _first_maximum(x["logits"][:, : sizes.vocabulary])},
            chain=0,
        ),
    ]


def _random(sizes: Sizes) -> list[OpCase]:
    draw = _Draw(60)
    parts = {"a": draw.integers(0, 2**62, sizes.rows, 1), "b": draw.integers(-(2**62), 2**62, 7)}
    keys = draw.integers(-(2**62), 2**62, 5)
    return [
        OpCase(
            "combine_keys",
            "",
            parts,
            lambda operation, x: {"keys": operation(3, x["a"], x["b"], -1)},
            lambda x: {"keys": _combined(3, x["a"], x["b"], -1)},
            chain=0,
            dtypes=(torch.float32,),  # the inputs are integers
        ),
        OpCase(
            "counter_uniform",
            "",
            {"keys": keys, "counters": torch.arange(sizes.channels)},
            lambda operation, x: {"u": operation(x["keys"], x["counters"])},
            lambda x: {"u": _uniform(x["keys"], sizes.channels)},
            chain=0,
            without_gradient=frozenset({"u"}),
            dtypes=(torch.float32,),
        ),
    ]


def _first_maximum(x: Tensor) -> Tensor:
    """The lowest column [R] with the largest value of each row."""
    return torch.tensor([row.index(max(row)) for row in x.tolist()])


_WORD, _GOLDEN = 1 << 64, 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _WORD
    return x ^ (x >> 31)


def _combined(*parts: int | Tensor) -> Tensor:
    """One key for each broadcast entry."""
    tensors = torch.broadcast_tensors(*(torch.as_tensor(part) for part in parts))
    keys = []
    for entry in zip(*(x.flatten().tolist() for x in tensors), strict=True):
        key = 0
        for part in entry:
            key = _mix((key + _GOLDEN) % _WORD ^ part % _WORD)
        keys.append(key - _WORD if key >= _WORD // 2 else key)
    return torch.tensor(keys).reshape(tensors[0].shape)


def _uniform(keys: Tensor, counters: int) -> Tensor:
    """Noise in (0, 1) for counters 0, 1, ...: [R, counters], from the top 52 bits."""
    steps = [_mix(i * _GOLDEN % _WORD) for i in range(counters)]
    return torch.tensor(
        [
            [((_mix((key + step) % _WORD) >> 12) + 0.5) * 2.0**-52 for step in steps]
            for key in keys.tolist()
        ],
        dtype=torch.float64,
    )
