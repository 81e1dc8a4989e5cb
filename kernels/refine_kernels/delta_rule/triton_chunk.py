"""Chunkwise parallel form of both delta rules by Triton kernels: what chunk.py computes, on a GPU.

Arguments, results and the states handed out are those of chunk.py, whose docstrings say what they
are; the kernels and where they deviate in precision are in triton_kernels.py.  A piece of text of
any length is five launches, and eight in the backward, however many states have a gradient; a few
tokens are one each way (triton_few.py).  The backward keeps the inputs as they came and the initial
state, and makes the rest again.

On CPU tensors the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before the
first import of triton.  That is slow and for tests.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels import agreement, launch
from refine_kernels.delta_rule import chunk, triton_few
from refine_kernels.delta_rule import triton_kernels as kernels
from refine_kernels.delta_rule.chunk import ChunkOutput
from refine_kernels.host import without_waiting
from refine_kernels.triton_products import padded, products_of

# The most tokens the kernels take at a time, by input dtype.  float32 is for checks; its chunks of
# 64 would not fit into registers.
_MOST_TOKENS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
_LEAST_CHUNK = 16
_LARGEST_KEY = 256


def chunk_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_writes: bool = False,
    output_final_state: bool = True,
) -> ChunkOutput:
    """As chunk.chunk_delta_rule.  The states between first and last are views of one buffer; the
    last is made, at the end of a kernel that goes through the tokens, whether asked for or not."""
    options = (scale, qk_norm_eps, initial_state, chunk_size, output_writes, output_final_state)
    return chunk_rule(q, k, v, beta, None, *options)


def chunk_gated_delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_writes: bool = False,
    output_final_state: bool = True,
) -> ChunkOutput:
    """As gated_delta_rule.chunk.chunk_gated_delta_rule.  States as in chunk_delta_rule."""
    options = (scale, qk_norm_eps, initial_state, chunk_size, output_writes, output_final_state)
    return chunk_rule(q, k, v, beta, g, *options)


def refusal(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    qk_norm_eps: float | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    output_writes: bool = False,
    output_final_state: bool = True,
) -> str | None:
    """Why the kernels are not for these arguments here, None if they are.

    The first arguments of a kind on a device have the kernels compared with the torch form on a
    small text, gradients too: a miscompiled kernel is not noticed otherwise.
    """
    unknown = agreement.unknown_dtype(v.dtype)
    if unknown is not None:
        return unknown
    if k.shape[-1] > _LARGEST_KEY:
        return f"keys are {k.shape[-1]} wide, above {_LARGEST_KEY}"
    if chunk_size % _LEAST_CHUNK:
        return f"chunks of {chunk_size} are no multiple of {_LEAST_CHUNK}"
    groups = v.shape[2] // k.shape[2]
    widths = (k.shape[-1], v.shape[-1], groups)
    if _few(q, v, output_writes):
        products = products_of(v)
        return triton_few.disagreement(
            widths, g is not None, qk_norm_eps, products, v.dtype, v.device
        )
    shape = (*widths, chunk_of(chunk_size, v.dtype))
    return _disagreement(shape, g is not None, qk_norm_eps, v.dtype, v.device)


def _few(q: Tensor | None, v: Tensor, output_writes: bool) -> bool:
    """Whether a piece is one for triton_few.py."""
    return q is not None and not output_writes and v.shape[1] <= triton_few.MOST_TOKENS


@functools.cache
def _disagreement(
    shape: tuple[int, int, int, int],
    gated: bool,
    qk_norm_eps: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    k_dim, v_dim, groups, size = shape
    n, heads = 2 * size + 5, 2 * groups
    gen = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 2, k_dim, generator=gen) for _ in range(2))
    if qk_norm_eps is None:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    inputs = {
        "q": q,
        "k": k,
        "v": torch.randn(1, n, heads, v_dim, generator=gen),
        # larger ones wipe narrow states out
        "beta": torch.rand(1, n, heads, generator=gen) / 2,
    }
    if gated:
        inputs["g"] = -torch.rand(1, n, heads, generator=gen)
    inputs["state"] = torch.randn(1, heads, k_dim, v_dim, generator=gen)

    def of(rule: Any) -> agreement.Form:
        def run(*given: Tensor) -> list[Tensor]:
            *tokens, state = given
            g = [] if gated else [None]
            out = rule(*tokens, *g, None, qk_norm_eps, state.float(), size, True)
            return [out.o, out.final_state, out.states[1], out.writes]

        return run

    return agreement.disagreement(
        of(chunk_rule),
        of(chunk.chunk_rule),
        # rates and states come in float32 whatever the tokens are
        {name: x.to(device, dtype if name in "qkv" else None) for name, x in inputs.items()},
        ["output", "final state", "state between", "writes"],
        tolerance=agreement.TOLERANCE[dtype],
    )


def chunk_of(tap_interval: int, dtype: torch.dtype) -> int:
    """Tokens the kernels take at a time where the states between have this distance."""
    return min(math.gcd(tap_interval, 64), _MOST_TOKENS[dtype])


def chunk_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    scale: float | None,
    qk_norm_eps: float | None,
    initial_state: Tensor | None,
    chunk_size: int,
    output_writes: bool,
    output_final_state: bool = True,
) -> ChunkOutput:
    """Both rules; g [B,T,H] is the log decay (<= 0), None for no decay."""
    b, _, h, v_dim = v.shape
    if initial_state is None:
        initial_state = k.new_zeros(b, h, k.shape[-1], v_dim, dtype=torch.float32)
    state = initial_state.float()
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if q is not None and _few(q, v, output_writes):
        o, final_state = triton_few.few_tokens_rule(
            q, k, v, beta, g, scale, qk_norm_eps, state, products_of(v)
        )
        return ChunkOutput(o, final_state if output_final_state else None, [state], None)
    options = _Options(scale, qk_norm_eps, chunk_size, output_writes)
    o, writes, final_state, *states = _ChunkRule.apply(q, k, v, beta, g, state, options)
    return ChunkOutput(o, final_state if output_final_state else None, [state, *states], writes)


class _Options(NamedTuple):
    """Arguments of a call that are no tensors."""

    scale: float
    qk_norm_eps: float | None
    tap_interval: int  # tokens between the states handed out
    output_writes: bool


class Call(NamedTuple):
    """What a kernel is compiled for."""

    k_dim: int
    v_dim: int
    groups: int  # value heads that share a key head
    chunk: int  # tokens a kernel takes at a time
    gated: bool
    norm: bool
    output: bool  # there are queries (forward) or the output has a gradient (backward)
    writes: bool  # they are returned
    products: str

    def constants(self, kernel: str) -> dict[str, Any]:
        """The compile-time arguments of the kernel of this name."""
        every = {
            "GROUPS": self.groups,
            "K": self.k_dim,
            "V": self.v_dim,
            "C": self.chunk,
            "BK": padded(self.k_dim),
            "BV": self._columns(kernel),
            "GATED": self.gated,
            "NORM": self.norm,
            "OUTPUT": self.output,
            "WRITES": self.writes,
            "PRODUCTS": self.products,
        }
        return {x: every[x] for x in getattr(kernels, kernel).arg_names if x in every}

    def launch(self, kernel: str) -> dict[str, int]:
        """Warps and pipeline stages of the kernel of this name."""
        warps = 4 if self.k_dim <= _WIDE else 8
        if kernel == "invert":
            warps = 2
        elif kernel in ("queries", "inputs"):
            warps = 8
        pipelined = kernel in ("scan", "reverse") and (
            self.k_dim <= _WIDE or self.products.startswith("bf16")
        )
        return {"num_warps": warps, "num_stages": 2 if pipelined else 1}

    def _columns(self, kernel: str) -> int:
        """Columns of V that a program of the kernel of this name takes at a time."""
        few = kernel in ("scan", "reverse", "inputs") or (
            kernel in ("queries", "output") and self.k_dim > _WIDE
        )
        return min(32 if few else 64, padded(self.v_dim))


# Keys above this width take more warps or smaller blocks.  Chosen by what the compiler says of
# registers and shared memory, without a GPU; docs/kernels.md has the figures.
_WIDE = 128


class _Run:
    """The inputs of one call as the kernels take them, and the kernels run on them."""

    def __init__(
        self,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        options: _Options,
    ) -> None:
        self.q = None if q is None else launch.dense_rows(q)
        self.k, self.v = launch.dense_rows(k), launch.dense_rows(v)
        self.beta, self.g = beta.contiguous(), None if g is None else g.contiguous()
        self.batch, self.n, self.heads, v_dim = v.shape
        products = products_of(v)
        self.scratch_dtype = v.dtype if products.startswith("bf16") else torch.float32
        self.compiled = Call(
            k_dim=k.shape[-1],
            v_dim=v_dim,
            groups=self.heads // k.shape[2],
            chunk=chunk_of(options.tap_interval, v.dtype),
            gated=g is not None,
            norm=options.qk_norm_eps is not None,
            output=q is not None,
            writes=options.output_writes,
            products=products,
        )
        self.count = triton.cdiv(self.n, self.compiled.chunk)
        self.size = (self.n, self.heads)
        self.numbers = (options.scale, options.qk_norm_eps or 0.0)
        self.q_strides = (0, 0, 0) if self.q is None else self.q.stride()[:3]
        self.k_strides, self.v_strides = self.k.stride()[:3], self.v.stride()[:3]

    def scratch(self, *width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B*H, chunks, *width]."""
        shape = (self.batch * self.heads, self.count, *width)
        return launch.empty(shape, dtype or self.scratch_dtype, self.v.device)

    def tokens(self, x: Tensor) -> Tensor:
        """A view [B,T,H,D] of what scratch [B*H, chunks, C, D] holds of the text's tokens."""
        x = x.view(self.batch, self.heads, -1, x.shape[-1])
        return x[:, :, : self.n].transpose(1, 2)

    def add_to_tokens(self, x: Tensor, values: Tensor) -> None:
        """Add [B,T,H,D], dense or sparse in B and T, to scratch [B*H, chunks, C, D] in place."""
        if not values.is_sparse:
            self.tokens(x).add_(values)
            return
        (texts, tokens), rows = values._indices(), values._values().to(x.dtype)
        x = x.flatten(1, 2)
        if self.batch == 1:
            x.index_add_(1, tokens, rows.transpose(0, 1))
            return
        heads = torch.arange(self.heads, device=x.device)
        at = (texts[:, None] * self.heads + heads) * x.shape[1] + tokens[:, None]
        x.flatten(0, 1).index_add_(0, at.flatten(), rows.flatten(0, 1))

    def run(self, name: str, *arguments: Any) -> None:
        """Launch a kernel: a program for each head and, as it is made, chunk and block of V."""
        constants = self.compiled.constants(name)
        heads = self.batch * self.heads
        if name == "invert":
            grid: tuple[int, ...] = (heads * self.count,)
        elif name in ("gram", "apply", "queries", "inputs"):
            grid = (self.count, heads)
        else:
            blocks = triton.cdiv(self.compiled.v_dim, constants["BV"])
            grid = (blocks, heads) if name in ("scan", "reverse") else (blocks, self.count, heads)
        launch.run(
            getattr(kernels, name), grid, *arguments, **constants, **self.compiled.launch(name)
        )

    def scan(self, state: Tensor) -> "_Scanned":
        """Kernels gram, invert, apply and scan."""
        writes = None
        if self.compiled.writes:
            dtype = chunk.dtype_of_writes(self.v.dtype)
            writes = launch.empty(self.v.shape, dtype, self.v.device)
        c, k_dim, v_dim = self.compiled.chunk, self.compiled.k_dim, self.compiled.v_dim
        w, errors = self.scratch(c, k_dim), self.scratch(c, v_dim)
        inverse = self.scratch(c, c, dtype=torch.float32)
        norms = self.scratch(c, dtype=torch.float32)
        decays = self.scratch(c, dtype=torch.float32) if self.g is not None else None
        self.run(
            "gram",
            *(self.k, self.beta, self.g, inverse, decays, norms),
            *(*self.size, self.numbers[1], *self.k_strides),
        )
        self.run("invert", inverse)
        self.run(
            "apply",
            *(self.k, self.v, inverse, decays, norms, w, errors),
            *(*self.size, *self.k_strides, *self.v_strides),
        )
        state = state.contiguous()
        states = launch.empty((self.count, *state.shape), torch.float32, state.device)
        final_state = launch.empty(tuple(state.shape), torch.float32, state.device)
        self.run(
            "scan",
            *(self.k, self.beta, w, errors, decays, norms, state, states, final_state),
            *(writes, *self.size, *self.k_strides),
        )
        return _Scanned(w, errors, inverse, decays, norms, states, final_state, writes)


class _Scanned(NamedTuple):
    """What the kernels gram, invert, apply and scan leave."""

    w: Tensor
    errors: Tensor
    inverse: Tensor
    decays: Tensor | None
    norms: Tensor
    states: Tensor
    final_state: Tensor
    writes: Tensor | None


class _ChunkRule(torch.autograd.Function):
    """The rule over a piece of text: (o or None, U or None, final state, *states between)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        state: Tensor,
        options: _Options,
    ) -> tuple[Tensor | None, ...]:
        call = _Run(q, k, v, beta, g, options)
        _, errors, _, decays, norms, states, final_state, writes = call.scan(state)
        o = None
        if q is not None:
            o = launch.empty(tuple(v.shape), v.dtype, v.device)
            call.run(
                "output",
                *(call.q, call.k, call.beta, errors, decays, norms, states, o),
                *(*call.size, *call.numbers, *call.q_strides, *call.k_strides),
            )
        ctx.save_for_backward(q, k, v, beta, g, state)
        ctx.options = options
        ctx.set_materialize_grads(False)
        step = options.tap_interval // call.compiled.chunk
        return o, writes, final_state, *states[step::step].unbind(0)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_o: Tensor | None,
        grad_u: Tensor | None,
        grad_final: Tensor | None,
        *grad_states: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, state = ctx.saved_tensors
        wanted = grad_o is not None
        if grad_o is None and grad_u is not None:
            # the kernels add to the output's share of the writes' gradient, here zero for any q
            grad_o, q = torch.zeros_like(v), k if q is None else q
        options = ctx.options._replace(output_writes=False)
        call = _Run(None if grad_o is None else q, k, v, beta, g, options)
        w, errors, inverse, decays, norms, states, _, _ = call.scan(state)
        c, k_dim, v_dim = call.compiled.chunk, call.compiled.k_dim, call.compiled.v_dim
        step = ctx.options.tap_interval // c
        after = [(i * step - 1, x) for i, x in enumerate(grad_states, 1) if x is not None]
        if grad_final is not None:
            after.append((call.count - 1, grad_final))
        slots, given = _given(after, call.count, v.device)

        q_norms, grad_q, grad_scores, grad_decays = None, None, None, None
        shared = call.compiled.groups > 1
        keyed, keyed_dtype = (*v.shape[:3], k_dim), torch.float32 if shared else k.dtype
        grad_writes = call.scratch(c, v_dim)
        strides = (*call.q_strides, *call.k_strides)
        if grad_o is not None:
            grad_o = grad_o.contiguous()
            q_norms = call.scratch(c, dtype=torch.float32)
            call.run(
                "local",
                *(call.q, call.k, grad_o, decays, norms, q_norms, grad_writes),
                *(*call.size, *call.numbers, *strides),
            )
            if grad_u is not None:
                call.add_to_tokens(grad_writes, grad_u)
            grad_q = launch.empty(keyed, keyed_dtype, v.device)
            grad_scores = call.scratch(c, c)
            grad_decays = call.scratch(c, dtype=torch.float32)
            call.run(
                "queries",
                *(call.q, call.k, call.beta, grad_o, errors, decays, norms, states),
                *(grad_q, grad_scores, grad_decays, *call.size, *call.numbers, *strides),
            )
        grad_after = call.scratch(k_dim, v_dim)
        grad_state = launch.empty(tuple(state.shape), torch.float32, v.device)
        call.run(
            "reverse",
            *(call.q, call.k, call.beta, grad_o, w, decays, norms, q_norms),
            *(slots, given, grad_writes, grad_after, grad_state, *call.size, *strides),
        )
        grad_k = launch.empty(keyed, keyed_dtype, v.device)
        grad_v = launch.empty(tuple(v.shape), v.dtype, v.device)
        grad_beta = launch.empty(tuple(beta.shape), beta.dtype, v.device)
        grad_g = None if g is None else launch.empty(tuple(g.shape), g.dtype, v.device)
        call.run(
            "inputs",
            *(call.q, call.k, call.beta, call.g, inverse, errors, decays, norms, q_norms),
            *(states, grad_after, grad_writes, grad_scores, grad_decays),
            *(grad_k, grad_v, grad_beta, grad_g, *call.size, *strides),
        )
        if shared:
            grad_k = _of_key_heads(grad_k, k)
            grad_q = None if grad_q is None else _of_key_heads(grad_q, k)
        return grad_q if wanted else None, grad_k, grad_v, grad_beta, grad_g, grad_state, None


def _of_key_heads(x: Tensor, k: Tensor) -> Tensor:
    """The sum over the value heads that share a key head."""
    return x.unflatten(2, (k.shape[2], -1)).sum(3).to(k.dtype)


def _given(
    after: list[tuple[int, Tensor]], count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """slots and given of the kernel `reverse`, from gradients of the states after some chunks."""
    slots = torch.full((count,), -1, dtype=torch.int32)
    for slot, (number, _) in enumerate(after):
        slots[number] = slot
    given = _stacked([x for _, x in after]) if after else torch.empty(0, device=device)
    return without_waiting(slots, device), given


def _stacked(parts: list[Tensor]) -> Tensor:
    """torch.stack, without a copy where they lie one behind the other, as the gradients of states
    do that were read together."""
    first = parts[0]
    memory, at, size = first.untyped_storage()._cdata, first.storage_offset(), first.numel()
    for i, x in enumerate(parts):
        there = x.untyped_storage()._cdata == memory and x.storage_offset() == at + i * size
        if not (there and x.is_contiguous()):
            return torch.stack(parts)
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))
