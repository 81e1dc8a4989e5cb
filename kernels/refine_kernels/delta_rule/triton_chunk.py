"""Chunkwise parallel form of both delta rules by Triton kernels: what chunk.py computes, on a GPU.

Arguments, results and the states handed out are those of chunk.py, whose docstrings say what they
are; the kernels and where they deviate in precision are in triton_kernels.py.  The whole piece of
text is one call of three kernels, and of five in the backward, whatever number of states has a
gradient.  The backward keeps the inputs as they came and the initial state, and makes the rest again.

On CPU tensors the kernels run in Triton's interpreter, if TRITON_INTERPRET=1 was set before the
first import of triton.  That is slow and for tests.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from refine_kernels.delta_rule import triton_kernels as kernels

# By input dtype: the products' operands on a GPU.  float16 takes TF32, which holds each of its
# numbers and the range of float32, so that states and gradients cannot overflow.
PRODUCTS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
EXACT = "tf32x3"  # of the triangular inverse, always
CHUNKS = (64, 32, 16)
LARGEST_KEY = 256


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
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """As chunk.chunk_delta_rule.  States are views of one buffer, but for the first and the last."""
    return chunk_rule(q, k, v, beta, None, scale, qk_norm_eps, initial_state, chunk_size)


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
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """As gated_delta_rule.chunk.chunk_gated_delta_rule.  States as in chunk_delta_rule."""
    return chunk_rule(q, k, v, beta, g, scale, qk_norm_eps, initial_state, chunk_size)


def refusal(k: Tensor, v: Tensor, chunk_size: int) -> str | None:
    """Why the kernels do not take these arguments, None if they do."""
    if v.dtype not in PRODUCTS:
        return f"{v.dtype} is none of bfloat16, float16 and float32"
    if k.shape[-1] > LARGEST_KEY:
        return f"keys are {k.shape[-1]} wide, above {LARGEST_KEY}"
    if chunk_size % CHUNKS[-1]:
        return f"chunks of {chunk_size} are no multiple of {CHUNKS[-1]}"
    return None


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
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Both rules; g [B,T,H] is the log decay (<= 0), None for no decay."""
    why = refusal(k, v, chunk_size)
    if why is not None:
        raise ValueError(f"delta rule kernels: {why}")
    b, _, h, v_dim = v.shape
    if initial_state is None:
        initial_state = k.new_zeros(b, h, k.shape[-1], v_dim, dtype=torch.float32)
    state = initial_state.float()
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    options = _Options(scale, qk_norm_eps, chunk_size)
    o, final_state, *states = _ChunkRule.apply(q, k, v, beta, g, state, options)
    return o, final_state, [state, *states]


class _Options(NamedTuple):
    """Arguments of a call that are no tensors."""

    scale: float
    qk_norm_eps: float | None
    tap_interval: int  # tokens between the states handed out


def launch_options(kernel: str, k_dim: int, v_dim: int, itemsize: int) -> dict[str, int]:
    """Columns of V that a program takes at a time, warps and pipeline stages."""
    wide = k_dim > 128
    block = 32 if kernel in ("scan", "reverse") else 64
    block = min(block, max(16, triton.next_power_of_2(v_dim)))
    return {
        "BV": block,
        "num_warps": 8 if wide else 4,
        "num_stages": 1,
    }


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory whose every element a kernel writes before it is read."""
    return torch.empty(shape, dtype=dtype, device=device)


class _Call:
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
        self.q, self.k, self.v = (
            x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)
        )
        self.beta, self.g = beta.contiguous(), None if g is None else g.contiguous()
        self.batch, self.n, self.heads, self.v_dim = v.shape
        self.k_dim = k.shape[-1]
        self.chunk = next(c for c in CHUNKS if options.tap_interval % c == 0)
        self.count = triton.cdiv(self.n, self.chunk)
        self.products = PRODUCTS[v.dtype]
        if self.products == "bf16" and v.device.type == "cpu":
            self.products = "bf16-as-fp32"
        self.scratch_dtype = v.dtype if self.products.startswith("bf16") else torch.float32
        self.eps = 0.0 if options.qk_norm_eps is None else options.qk_norm_eps
        self.norm = options.qk_norm_eps is not None
        self.scale = options.scale

    def scratch(self, *width: int, dtype: torch.dtype | None = None) -> Tensor:
        """[B*H, chunks, *width]."""
        shape = (self.batch * self.heads, self.count, *width)
        return _empty(shape, dtype or self.scratch_dtype, self.v.device)

    def run(self, name: str, *arguments: Any, scan: bool = False, **constants: Any) -> None:
        """Launch a kernel: over blocks of V and heads, chunks too unless `scan`."""
        launch = launch_options(name, self.k_dim, self.v_dim, self.v.element_size())
        grid = (self.count, self.batch * self.heads)
        if name not in ("prepare", "inputs"):
            blocks = triton.cdiv(self.v_dim, launch["BV"])
            grid = (blocks, grid[1]) if scan else (blocks, *grid)
        getattr(kernels, name)[grid](
            *arguments,
            GROUPS=self.heads // self.k.shape[2],
            K=self.k_dim,
            V=self.v_dim,
            C=self.chunk,
            BK=max(16, triton.next_power_of_2(self.k_dim)),
            GATED=self.g is not None,
            PRODUCTS=self.products,
            **launch,
            **constants,
        )

    def q_strides(self) -> tuple[int, ...]:
        return (0, 0, 0) if self.q is None else self.q.stride()[:3]

    def scan(self, state: Tensor, keep_inverse: bool) -> "_Scanned":
        """Kernels prepare and scan."""
        c, w = self.chunk, self.scratch(self.chunk, self.k_dim)
        errors = self.scratch(c, self.v_dim)
        inverse = self.scratch(c, c) if keep_inverse else None
        log_decays = self.scratch(c, dtype=torch.float32)
        k_norms = self.scratch(c, dtype=torch.float32)
        k_strides, v_strides = self.k.stride()[:3], self.v.stride()[:3]
        size = (self.n, self.heads)
        self.run(
            "prepare",
            *(self.k, self.v, self.beta, self.g, w, errors, inverse, log_decays, k_norms),
            *(*size, self.eps, *k_strides, *v_strides),
            NORM=self.norm,
            KEEP_INVERSE=keep_inverse,
            EXACT=EXACT,
        )
        state = state.contiguous()
        states = _empty((self.count, *state.shape), torch.float32, state.device)
        final_state = _empty(tuple(state.shape), torch.float32, state.device)
        self.run(
            "scan",
            *(self.k, self.beta, w, errors, log_decays, k_norms, state, states, final_state),
            *(*size, *k_strides),
            scan=True,
        )
        return _Scanned(w, errors, inverse, log_decays, k_norms, states, final_state)


class _Scanned(NamedTuple):
    """What the kernels prepare and scan leave."""

    w: Tensor
    errors: Tensor
    inverse: Tensor | None
    log_decays: Tensor
    k_norms: Tensor
    states: Tensor
    final_state: Tensor


class _ChunkRule(torch.autograd.Function):
    """The rule over a piece of text: (o or None, final state, *states between)."""

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
        call = _Call(q, k, v, beta, g, options)
        scanned = call.scan(state, keep_inverse=False)
        o = None
        if call.q is not None:
            o = _empty(tuple(v.shape), v.dtype, v.device)
            call.run(
                "output",
                *(call.q, call.k, call.beta, scanned.errors, scanned.log_decays, scanned.k_norms),
                *(scanned.states, o, call.n, call.heads, call.scale, call.eps),
                *(*call.q_strides(), *call.k.stride()[:3]),
                NORM=call.norm,
            )
        ctx.save_for_backward(q, k, v, beta, g, state)
        ctx.options = options
        ctx.set_materialize_grads(False)
        step = options.tap_interval // call.chunk
        return o, scanned.final_state, *scanned.states[step::step].unbind(0)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_final: Tensor | None, *grad_states: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, state = ctx.saved_tensors
        call = _Call(None if grad_o is None else q, k, v, beta, g, ctx.options)
        scanned = call.scan(state, keep_inverse=True)
        slots, given = _given(call, ctx.options, grad_final, grad_states)
        grad_writes = call.scratch(call.chunk, call.v_dim)
        q_norms = None
        strides = (*call.q_strides(), *call.k.stride()[:3])
        if grad_o is not None:
            grad_o = grad_o.contiguous()
            q_norms = call.scratch(call.chunk, dtype=torch.float32)
            call.run(
                "local",
                *(call.q, call.k, grad_o, scanned.log_decays, scanned.k_norms, q_norms),
                *(grad_writes, call.n, call.heads, call.scale, call.eps, *strides),
                NORM=call.norm,
            )
        after_chunks = call.scratch(call.k_dim, call.v_dim)
        grad_state = _empty(tuple(state.shape), torch.float32, v.device)
        call.run(
            "reverse",
            *(call.q, call.k, call.beta, grad_o, scanned.w, scanned.log_decays, scanned.k_norms),
            *(q_norms, slots, given, grad_writes, after_chunks, grad_state),
            *(call.n, call.heads, *strides),
            scan=True,
            OUTPUT=grad_o is not None,
        )
        per_head = k.shape[2] == call.heads
        keyed = (*v.shape[:3], call.k_dim)
        dtype = k.dtype if per_head else torch.float32
        grad_q = None if grad_o is None else _empty(keyed, dtype, v.device)
        grad_k = _empty(keyed, dtype, v.device)
        grad_v = _empty(tuple(v.shape), v.dtype, v.device)
        grad_beta = _empty(tuple(beta.shape), beta.dtype, v.device)
        grad_g = None if g is None else _empty(tuple(g.shape), g.dtype, v.device)
        call.run(
            "inputs",
            *(call.q, call.k, call.beta, call.g, grad_o, scanned.inverse, scanned.errors),
            *(scanned.log_decays, scanned.k_norms, scanned.states, after_chunks, grad_writes),
            *(grad_q, grad_k, grad_v, grad_beta, grad_g),
            *(call.n, call.heads, call.scale, call.eps, *strides),
            NORM=call.norm,
            OUTPUT=grad_o is not None,
        )
        if not per_head:  # value heads that share a key
            grad_q, grad_k = (
                None if x is None else x.unflatten(2, (k.shape[2], -1)).sum(3).to(k.dtype)
                for x in (grad_q, grad_k)
            )
        return grad_q, grad_k, grad_v, grad_beta, grad_g, grad_state, None


def _given(
    call: _Call, options: _Options, grad_final: Tensor | None, grad_states: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    """slots and given of the kernel `reverse`: the gradients that the states have."""
    step = options.tap_interval // call.chunk
    after = [(i * step - 1, x) for i, x in enumerate(grad_states, 1) if x is not None]
    if grad_final is not None:
        after.append((call.count - 1, grad_final))
    slots = torch.full((call.count,), -1, dtype=torch.int32)
    for slot, (chunk, _) in enumerate(after):
        slots[chunk] = slot
    if call.v.device.type == "cuda":  # from pinned memory the host does not wait for the copy
        slots = slots.pin_memory()
    given = torch.stack([x for _, x in after]) if after else call.v.new_empty(0).float()
    return slots.to(call.v.device, non_blocking=True), given
