"""Time, rate and memory of single operations in each of their forms, at the sizes of presets.

`torch` is plain torch, `compile` the same through torch.compile, `triton` the project's kernels,
`flash` FlashAttention, `fla` and `liger` what flash-linear-attention and Liger have for the same;
Liger's forward makes the gradients too. A form is timed once its results, gradients included, agree
with torch's in float32 on the first tokens; otherwise it has an error in place of a time. The forms
take turns round by round. Rates are the forward's: bytes that have to be read and written once, and
operations of products, over its seconds, beside what this machine reaches in a plain copy and a
plain product of the same dtype.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from refine_kernels import dispatch
from refine_kernels.attention.branches import Span
from refine_kernels.attention.decode import TextPlaces
from refine_kernels.delta_rule import fla_chunk
from refine_kernels.lact.fast_weights import FastWeights
from torch import Tensor

from refine_mcore.models.architecture import (
    Architecture,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
)
from refine_mcore.models.attention import rotary_table

FORMS = ("torch", "compile", "triton", "flash", "fla", "liger")
OPERATIONS = (
    "rms_norm",
    "rotary",
    "attention",
    "branches",
    "branch_decode",
    "short_conv",
    "swiglu",
    "delta_rule",
    "delta_gates",
    "decode",
    "score",
    "read",
    "lact",
    "lact_read",
    "features",
    "vocabulary",
)
# Operations on eight branches of a text, whatever its length: streams and tokens of each.
BRANCHES = {"decode": (8, 1), "score": (8, 5), "read": (8, 64), "lact_read": (8, 5)}
_LIMIT = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
# Newton-Schulz multiplies the smallest singular values, and the rounding in them, by hundreds:
# torch's own bfloat16 comes to 2e-2 at the sizes of LaCT-760M.
_MUON_LIMIT = 0.1
_L2_EPS = 1e-6

Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Case:
    """An operation on inputs of given shapes, of which all but the `fixed` ones have tokens."""

    shapes: Mapping[str, tuple[int, ...]]
    run: Run
    products: float  # operations of the forward's products
    packages: Mapping[str, Run] = field(default_factory=dict)  # of others, by their form
    wide: frozenset[str] = frozenset()  # float32 whatever the dtype
    integers: Mapping[str, int] | None = None  # inputs that are numbers below a bound
    fixed: frozenset[str] = frozenset()
    gradients: bool = True
    muon: bool = False
    checked: int = 1024  # tokens of the comparison
    kernels: str = "triton"  # the form beside torch's that dispatch has

    @property
    def forms(self) -> frozenset[str]:
        """All that there are of it."""
        return frozenset({"torch", "compile", self.kernels, *self.packages})

    def inputs(self, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Drawn anew, the same for the same number of tokens; the second dimension is cut."""
        gen = torch.Generator().manual_seed(0)
        found: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            if name not in self.fixed:
                shape = (shape[0], min(tokens, shape[1]), *shape[2:])
            if self.integers and name in self.integers:
                found[name] = torch.randint(self.integers[name], shape, generator=gen).to(device)
                continue
            x = torch.randn(shape, generator=gen)
            if name in ("beta", "lr", "momentum"):
                x = x.sigmoid() / (10 if name == "lr" else 1)
            if name == "g":
                x = -x.sigmoid()
            elif name in ("w0", "w1", "w2", "w02", "weight", "fq", "fk"):
                x = x / shape[-1] ** 0.5
            wide = dtype if name not in self.wide else torch.float32
            found[name] = x.to(device, wide).requires_grad_(self.gradients)
        return found


def case_of(name: str, architecture: Architecture, tokens: int) -> Case | None:
    """The operation at these sizes, if the architecture has it."""
    hidden, mixer = architecture.hidden_size, architecture.mixer
    text = (1, tokens)
    if name == "rms_norm":
        return Case(
            {"x": (*text, hidden), "gain": (hidden,)},
            lambda x, gain: [dispatch.rms_norm(x, gain, 1e-6)],
            0.0,
            fixed=frozenset({"gain"}),
        )
    if name == "swiglu":
        return Case(
            {"x": (*text, 2 * architecture.intermediate_size)},
            lambda x: [dispatch.swiglu(x)],
            0.0,
        )
    if name == "vocabulary":
        return _vocabulary(architecture, tokens)
    if name == "rotary":
        return _rotary(architecture, tokens)
    if name in ("attention", "branches", "branch_decode"):
        return _attention(name, architecture, tokens)
    if name in _OF_LACT:
        return _OF_LACT[name](mixer, hidden, tokens) if isinstance(mixer, LaCTOptions) else None
    if isinstance(mixer, DeltaNetOptions | GatedDeltaNetOptions):
        return _delta_rule_layer(name, mixer, hidden, tokens)
    return None


def _vocabulary(architecture: Architecture, tokens: int) -> Case:
    """The next-token loss of a text from its hidden states."""
    hidden, words = architecture.hidden_size, architecture.vocab_size

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> Sequence[Tensor]:
        log_probs, _ = dispatch.linear_log_probs_and_entropy(x, weight, targets, with_entropy=False)
        return [-log_probs.mean()]

    def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Sequence[Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return [loss(weight, x.flatten(0, 1), targets.flatten())]

    return Case(
        {"hidden": (1, tokens, hidden), "weight": (words, hidden), "targets": (1, tokens)},
        run,
        2.0 * tokens * hidden * words,
        {"liger": liger},
        fixed=frozenset({"weight"}),
        integers={"targets": words},
    )


def _rotary(architecture: Architecture, tokens: int) -> Case | None:
    """Of the queries of an attention layer."""
    hidden, mixer, attention = architecture.hidden_size, architecture.mixer, architecture.attention
    if isinstance(mixer, LaCTOptions):
        heads, base = mixer.num_attention_heads, mixer.rope_theta
        dim = turned = hidden // heads
    elif attention is not None and attention.rope_theta is not None:
        heads, base = attention.num_heads, attention.rope_theta
        dim, turned = attention.head_dim(hidden), attention.rotary_dim(hidden)
    else:
        return None

    def run(x: Tensor) -> Sequence[Tensor]:
        # made once for all calls, as for all layers of a model
        return [dispatch.rotate(x, *rotary_table((0,), x.shape[1], turned, base, x))]

    return Case({"x": (1, tokens, heads, dim)}, run, 0.0)


def _attention(name: str, architecture: Architecture, tokens: int) -> Case | None:
    """Of a text from its first token on, or of rollouts from all over it, all their tokens or the
    last."""
    hidden, mixer, attention = architecture.hidden_size, architecture.mixer, architecture.attention
    window: int | None
    if isinstance(mixer, LaCTOptions):
        heads = kv_heads = mixer.num_attention_heads
        dim, window = hidden // heads, mixer.window_size
    elif attention is not None:
        heads, kv_heads = attention.num_heads, attention.kv_heads
        dim, window = attention.head_dim(hidden), attention.window_size
    else:
        return None

    reach = tokens if window is None else min(window, tokens)
    if name != "attention":
        streams, length = BRANCHES["score"]
        queries = length if name == "branches" else 1
        # made once for all passes of a text
        places: dict[tuple[int, ...], tuple[Tensor, TextPlaces]] = {}

        def of_branches(q: Tensor, *keys_and_values: Tensor) -> Sequence[Tensor]:
            own, text = keys_and_values[:2], keys_and_values[2:]
            size = text[0].shape[1]
            limit = [(i + 1) * size // streams for i in range(streams)]
            if queries == 1 and dispatch.backend("branches", q.device.type) == "triton":
                key = text[0].data_ptr(), text[1].data_ptr(), size
                if key not in places:
                    count = torch.full((1,), own[0].shape[1], device=q.device)
                    placed = TextPlaces.of(text[0], text[1], (0,) * streams, limit)
                    places[key] = count, placed
                return [dispatch.decode_attention(q, own, *places[key], window=window)]
            return [
                dispatch.branch_attention(
                    *(q, own, [text]),
                    spans=(Span(0, size, 0),),
                    rows=(0,) * streams,
                    limit=limit,
                    window=window,
                )
            ]

        shapes = {"q": (streams, queries, heads, dim)}
        shapes |= dict.fromkeys(("own k", "own v"), (streams, length, kv_heads, dim))
        shapes |= dict.fromkeys(("text k", "text v"), (1, tokens, kv_heads, dim))
        seen = streams * queries * (reach if window else tokens / 2)
        gradients = name == "branches"
        return Case(shapes, of_branches, 4.0 * seen * heads * dim, gradients=gradients)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        return [dispatch.text_attention(q, k, v, window=window)]

    seen = tokens * reach - reach * (reach - 1) // 2
    shapes = {"q": (1, tokens, heads, dim)} | dict.fromkeys("kv", (1, tokens, kv_heads, dim))
    return Case(shapes, run, 4.0 * seen * heads * dim, kernels="flash")


def _features(mixer: LaCTOptions, hidden: int, tokens: int) -> Case:
    head_dim = hidden // mixer.num_attention_heads
    options: dict[str, Any] = {
        "column": 0,
        "head_dim": mixer.fast_head_dim(hidden),
        "silu": mixer.qkv_silu,
        "fast_rope": mixer.fast_rope,
    }

    def run(x: Tensor, scale: Tensor, offset: Tensor) -> Sequence[Tensor]:
        table = rotary_table((0,), x.shape[1], head_dim, mixer.rope_theta, x)
        return dispatch.attention_and_fast_features(x, scale, offset, *table, **options)

    return Case(
        {"x": (1, tokens, hidden), "scale": (hidden, 2), "offset": (hidden, 2)},
        run,
        0.0,
        fixed=frozenset({"scale", "offset"}),
    )


def _delta_rule_layer(
    name: str, mixer: DeltaNetOptions | GatedDeltaNetOptions, hidden: int, tokens: int
) -> Case:
    gated = isinstance(mixer, GatedDeltaNetOptions)
    if isinstance(mixer, GatedDeltaNetOptions):
        keys, heads = mixer.num_heads, mixer.value_heads
        k_dim, v_dim = mixer.head_dim, mixer.value_head_dim
    else:
        keys = heads = mixer.num_heads
        k_dim, v_dim = mixer.key_head_dim(hidden), mixer.value_head_dim(hidden)
    if name == "short_conv":
        channels = 2 * keys * k_dim + heads * v_dim
        return Case(
            {"x": (1, tokens, channels), "taps": (channels, 1, mixer.conv_size)},
            lambda x, taps: [dispatch.causal_conv1d(x, taps, None, "silu")[0]],
            0.0,
            fixed=frozenset({"taps"}),
        )
    if name == "delta_gates":
        return _delta_gates(tokens, heads, gated)
    rows, length = BRANCHES.get(name, (1, tokens))
    if name == "read":
        return _read_states(rows, length, (keys, heads, k_dim, v_dim), gated)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (rows, length, keys, k_dim),
        "k": (rows, length, keys, k_dim),
        "v": (rows, length, heads, v_dim),
        "beta": (rows, length, heads),
    }
    shapes |= {"g": (rows, length, heads)} if gated else {}
    shapes["state"] = (rows, heads, k_dim, v_dim)
    # the state is read for the error and the output, and written
    products = 6.0 * rows * length * heads * k_dim * v_dim
    wide, fixed = frozenset({"beta", "g", "state"}), frozenset({"state"})

    def run(*given: Tensor) -> Sequence[Tensor]:
        *tokens_of, state = given
        options: dict[str, Any] = {"initial_state": state, "qk_norm_eps": _L2_EPS}
        if name == "decode":
            form: Any = dispatch.recurrent_delta_rule
            form = dispatch.recurrent_gated_delta_rule if gated else form
            return form(*tokens_of, **options)
        form = dispatch.chunk_gated_delta_rule if gated else dispatch.chunk_delta_rule
        out = form(*tokens_of, **options)
        return [out.o, out.final_state]

    if name == "decode":
        return Case(shapes, run, products, wide=wide, fixed=fixed, gradients=False)
    packages: dict[str, Run] = {}
    if name == "delta_rule":

        def fla(*given: Tensor) -> Sequence[Tensor]:
            *tokens_of, state = given
            form: Any = fla_chunk.chunk_gated_delta_rule if gated else fla_chunk.chunk_delta_rule
            out = form(*tokens_of, initial_state=state, qk_norm_eps=_L2_EPS)
            return [out.o, out.final_state]

        packages["fla"] = fla
    return Case(shapes, run, products, packages, wide=wide, fixed=fixed)


def _read_states(rows: int, length: int, widths: tuple[int, int, int, int], gated: bool) -> Case:
    """A state after a chunk's writes."""
    keys, heads, k_dim, v_dim = widths
    shapes: dict[str, tuple[int, ...]] = {
        "state": (rows, heads, k_dim, v_dim),
        "k": (rows, length, keys, k_dim),
        "writes": (rows, length, heads, v_dim),
    }
    shapes |= {"g": (rows, length, heads)} if gated else {}
    return Case(
        shapes,
        lambda *given: [dispatch.state_from_writes(*given, qk_norm_eps=_L2_EPS)],
        2.0 * rows * length * heads * k_dim * v_dim,
        wide=frozenset({"g", "state"}),
        fixed=frozenset({"state"}),
    )


def _delta_gates(tokens: int, heads: int, gated: bool) -> Case:
    shapes: dict[str, tuple[int, ...]] = {"b": (1, tokens, heads)}
    if gated:
        shapes |= {"a": (1, tokens, heads), "bias": (heads,), "log_rate": (heads,)}
    fixed = frozenset({"bias", "log_rate"})

    def run(*given: Tensor) -> Sequence[Tensor]:
        beta, g = dispatch.delta_gates(*given)
        return [beta] if g is None else [beta, g]

    return Case(shapes, run, 0.0, wide=fixed, fixed=fixed)


def _lact(mixer: LaCTOptions, hidden: int, tokens: int) -> Case:
    heads, chunk = mixer.num_fast_heads, mixer.chunk_size
    width, inner = mixer.fast_head_dim(hidden), mixer.fast_hidden_dim(hidden)
    of_tokens = (1, tokens, heads, width)
    shapes: dict[str, tuple[int, ...]] = {
        "fq": of_tokens,
        "fk": of_tokens,
        "fv": of_tokens,
        "lr": (1, tokens, heads, 3),
        "momentum": (1, tokens, heads),
        "w0": (1, heads, inner, width),
        "w1": (1, heads, width, inner),
        "w2": (1, heads, inner, width),
    }

    def run(*given: Tensor) -> Sequence[Tensor]:
        fq, fk, fv, lr, momentum, w0, w1, w2 = given
        weights = FastWeights.of(w0, w1, w2)
        o, _ = dispatch.chunk_lact(
            *(fq, fk, fv, lr, momentum),
            weights,
            weights.row_norms(),
            chunk_size=chunk,
            muon=mixer.use_muon,
            muon_dtype=torch.bfloat16,  # as published, and in the recipes
        )
        return [o]

    # reading is three products, the gradients of an update six, but of the last chunk, which makes
    # none; Newton-Schulz is not counted
    written = (tokens - 1) // chunk * chunk
    products = 2.0 * (3 * tokens + 6 * written) * heads * width * inner
    fixed = frozenset({"w0", "w1", "w2"})
    wide = fixed | {"lr", "momentum"}
    return Case(
        shapes, run, products, wide=wide, fixed=fixed, muon=mixer.use_muon, checked=chunk + 512
    )


def _lact_read(mixer: LaCTOptions, hidden: int, tokens: int) -> Case:
    """Of rollouts that meet weights of their own, as those of positions in different chunks do."""
    streams, _ = BRANCHES["lact_read"]
    heads = mixer.num_fast_heads
    width, inner = mixer.fast_head_dim(hidden), mixer.fast_hidden_dim(hidden)
    return Case(
        {
            "fq": (streams, tokens, heads, width),
            "w02": (streams, heads, 2 * inner, width),
            "w1": (streams, heads, width, inner),
        },
        lambda fq, *weights: [dispatch.apply_fast_weights(FastWeights(*weights), fq)],
        6.0 * streams * tokens * heads * width * inner,
        fixed=frozenset({"w02", "w1"}),
    )


_OF_LACT: dict[str, Callable[[LaCTOptions, int, int], Case]] = {
    "lact": _lact,
    "lact_read": _lact_read,
    "features": _features,
}


@dataclass(frozen=True)
class Row:
    """What one form of a case came to; seconds are medians over the rounds."""

    form: str
    error: float | None = None  # the largest relative one, of outputs and gradients
    why: str | None = None  # there are no times
    forward: float | None = None
    both: float | None = None  # forward and backward
    moved: float = 0.0  # bytes a second
    products: float = 0.0  # operations a second
    peak: int | None = None  # bytes of forward and backward above the inputs, on a GPU


def measure(
    case: Case,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    forms: Sequence[str],
    rounds: int,
) -> list[Row]:
    """Those of the forms that there are of a case, those that disagree with torch without times."""
    forms = [form for form in forms if form in case.forms]
    few = case.inputs(case.checked, dtype, device)
    exact = _results(case, "torch", {name: _widened(x) for name, x in few.items()})
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[bool], None]] = {}
    inputs = case.inputs(tokens, dtype, device)
    for form in forms:
        limit = _MUON_LIMIT if case.muon else _LIMIT[dtype]
        try:
            found = _results(case, form, few)
            error = max(_relative(a, e) for a, e in zip(found, exact, strict=True))
        except Exception as failure:  # a compiler's or another package's: the row says so
            rows[form] = Row(form, why=f"{type(failure).__name__}: {failure}".splitlines()[0])
            continue
        rows[form] = Row(form, error, None if error <= limit else "differs from torch's")
        if rows[form].why is None:
            steps[form] = _step(case, form, inputs)
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in steps}
    for number in range(rounds + 1):
        for form, step in steps.items():
            seconds = (_seconds(step, False, device), _seconds(step, True, device))
            if number > 0:  # the first one compiles
                times[form].append(seconds)
    for form, measured in times.items():
        forward, both = (statistics.median(x) for x in zip(*measured, strict=True))
        rows[form] = Row(
            form,
            rows[form].error,
            None,
            forward,
            both if case.gradients else None,
            _bytes(case, inputs) / forward,
            case.products / forward,
            _peak(steps[form], device),
        )
    return list(rows.values())


def _form(case: Case, form: str) -> Run:
    if form in case.packages:
        return case.packages[form]
    return torch.compile(case.run) if form == "compile" else case.run


def _use(form: str) -> None:
    others = form in ("triton", "flash")
    dispatch.use(**dispatch.ON_A_GPU if others else dict.fromkeys(dispatch.CHOICES, "torch"))


def _widened(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    return x.detach().float().requires_grad_(x.requires_grad)


def _results(case: Case, form: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Outputs and the gradients of a projection of them."""
    leaves = [x for x in inputs.values() if x.requires_grad]
    _use(form)
    try:
        with torch.set_grad_enabled(case.gradients):
            outputs = list(_form(case, form)(*inputs.values()))
        gradients: Sequence[Tensor] = []
        if case.gradients:
            gradients = torch.autograd.grad(
                outputs, leaves, _projections(outputs), allow_unused=True, materialize_grads=True
            )
        return [x.detach().float() for x in (*outputs, *gradients)]
    finally:
        dispatch.use()


def _projections(outputs: Sequence[Tensor]) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=gen).to(x.device, x.dtype) for x in outputs]


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def _step(case: Case, form: str, inputs: Mapping[str, Tensor]) -> Callable[[bool], None]:
    """Runs the form forward, and backward if asked to."""
    given, run = list(inputs.values()), _form(case, form)
    leaves = [x for x in given if x.requires_grad]
    projections: list[Tensor] = []

    def step(backward: bool) -> None:
        _use(form)
        with torch.set_grad_enabled(case.gradients):
            outputs = list(run(*given))
        if backward and case.gradients:
            if not projections:
                projections.extend(_projections(outputs))
            torch.autograd.grad(outputs, leaves, projections, allow_unused=True)
        dispatch.use()

    return step


def _seconds(step: Callable[[bool], None], backward: bool, device: torch.device) -> float:
    """Of several runs in a row, each."""
    runs = 5 if device.type == "cuda" else 1
    _wait(device)
    started = time.perf_counter()
    for _ in range(runs):
        step(backward)
    _wait(device)
    return (time.perf_counter() - started) / runs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(case: Case, inputs: Mapping[str, Tensor]) -> int:
    """Inputs read and outputs written once."""
    with torch.no_grad():
        outputs = case.run(*inputs.values())
    return sum(x.numel() * x.element_size() for x in (*inputs.values(), *outputs))


def _peak(step: Callable[[bool], None], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(True)
    return torch.cuda.max_memory_allocated(device) - before


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and operations a second of a product."""
    size = 2**28 if device.type == "cuda" else 2**25
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    width = 8192 if device.type == "cuda" else 1024
    a = torch.randn(width, width, device=device).to(dtype)

    def best(step: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            _wait(device)
            started = time.perf_counter()
            step()
            _wait(device)
            times.append(time.perf_counter() - started)
        return min(times)

    return 2 * size / best(lambda: y.copy_(x)), 2 * width**3 / best(lambda: a @ a)


def available(forms: Sequence[str]) -> list[str]:
    """Those of the forms that are installed here."""
    package = {"triton": "triton", "fla": "fla", "liger": "liger_kernel"}
    return [
        form
        for form in forms
        if form not in package or importlib.util.find_spec(package[form]) is not None
    ]
