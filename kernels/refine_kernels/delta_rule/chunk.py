"""Chunkwise parallel form of the delta rule, with and without decay, in plain torch.

In a chunk with incoming state S and cumulated log decay c_t = g_1 + ... + g_t, the prediction
errors e_t = v_t - exp(g_t) S_{t-1}^T k_t of all tokens solve one unit lower triangular system,

    (I + G diag(beta)) E = V - exp(c) K S,        G_ts = exp(c_t - c_s) k_t.k_s  for s < t,

and with the writes U = beta * E the output and the outgoing state are matrix products:

    O  = exp(c) Q S + P U,      P_ts = exp(c_t - c_s) q_t.k_s  for s <= t,     q scaled
    S' = exp(c_C) S + (exp(c_C - c) K)^T U.

(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", section 3, and "Gated
Delta Networks", section 3.3; they solve for U.  Solving for E makes every gradient, that of beta
included, free of a division by beta, which may be zero.)

Products within chunks run over several chunks at once; only products with the state are in a loop.
The backward pass through that loop is written by hand: it keeps the inputs as they came and one
state per call, and makes everything else again, unit queries and keys included, where autograd
would keep every intermediate.  Nothing is padded: the tokens after the last full chunk are a chunk
of their own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Products within chunks are batched over this many chunks: enough for wide matrix products, few
# enough for the temporaries of a call to stay in cache (measured on CPU: 8 to 16 are best).
_CHUNKS_AT_ONCE = 8


class ChunkOutput(NamedTuple):
    """o [B,T,H,V] in the dtype of v, or None; the state after the tokens [B,H,K,V] unless it is not
    asked for; the states before each chunk, counted from the start of the piece; the writes U
    [B,T,H,V] if asked for.
    States and writes are part of the autograd graph; states are at least float32, writes have the
    dtype `dtype_of_writes`, and take a gradient that is sparse in B and T too."""

    o: Tensor | None
    final_state: Tensor | None
    states: list[Tensor]
    writes: Tensor | None


class _DenseGradient(torch.autograd.Function):
    """Identity, whose gradient may be sparse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad


def dtype_of_writes(dtype: torch.dtype) -> torch.dtype:
    """Of values of a dtype: at least float32 but for bfloat16, which has its range, and whose
    products on a GPU round the writes to it before they reach the state."""
    return dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)


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
    """Delta rule over a piece of text.

    q, k [B,T,G,K]; v [B,T,H,V]; beta [B,T,H]; initial_state [B,H,K,V] or None for zeros; scale
    defaults to K**-0.5.  Value head h reads and writes with query and key head h // (H / G).  With
    ``qk_norm_eps``, q and k are first divided by sqrt(sum of squares + eps), in at least float32.
    q=None only advances the state.  A token with beta = 0 leaves the state as it is.  Without
    ``output_final_state`` the state after the tokens is not made.

    States are returned before every ``chunk_size`` tokens; those in between follow from the writes
    (`state_from_writes`).  Differentiable once.
    """
    options = (scale, qk_norm_eps, initial_state, chunk_size, output_writes, output_final_state)
    return chunk_rule(q, k, v, beta, None, *options)


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
    b, t, h, v_dim = v.shape
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    if initial_state is None:
        initial_state = k.new_zeros(b, h, k.shape[-1], v_dim)
    states = [initial_state.to(torch.promote_types(v.dtype, torch.float32))]
    rest = t % chunk_size
    group = _CHUNKS_AT_ONCE * chunk_size
    lengths = [min(group, t - rest - i) for i in range(0, t - rest, group)] + [rest] * (rest > 0)
    pieces = [
        # split, not slicing: its backward joins the pieces once.
        [None] * len(lengths) if x is None else x.split(lengths, 1)
        for x in (q, k, v, beta, g)
    ]
    outputs, writes = [], []
    for i, (n, *piece) in enumerate(zip(lengths, *pieces, strict=True)):
        last = output_final_state or i + 1 < len(lengths)
        options = _Options(scale, qk_norm_eps, min(chunk_size, n), output_writes, last)
        o, u, *new_states = _ChunkRule.apply(*piece, states[-1], options)
        outputs.append(o)
        writes.append(u)
        states += new_states
    final_state = states.pop() if output_final_state else None
    return ChunkOutput(
        None if q is None else _joined(outputs),
        final_state,
        states,
        _DenseGradient.apply(_joined(writes)) if output_writes else None,
    )


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class _Options(NamedTuple):
    """Arguments of a call that are no tensors."""

    scale: float
    qk_norm_eps: float | None
    chunk_size: int
    output_writes: bool
    last_state: bool


def _to_chunks(x: Tensor, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B,T,H,D] -> [T/C, B*H, C, D]."""
    x = x.unflatten(1, (-1, chunk_size)).permute(1, 0, 3, 2, 4)
    return x.to(dtype).flatten(1, 2).contiguous()


def _from_chunks(x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """[T/C, B*H, C, D] -> [B,T,H,D]."""
    return x.unflatten(1, (batch, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2).to(dtype)


class _Terms(NamedTuple):
    """What q, k and g contribute to the equations above, for all chunks; None where absent."""

    k_in: Tensor  # exp(c) K            [N,BH,C,K]
    k_out: Tensor  # exp(c_C - c) K     [N,BH,C,K]
    gram: Tensor  # G                   [N,BH,C,C]
    q_in: Tensor | None  # exp(c) Q     [N,BH,C,K]
    scores: Tensor | None  # P          [N,BH,C,C]
    retain: Tensor | None  # exp(c_C)   [N,BH,1,1]

    @classmethod
    def of(cls, q: Tensor | None, k: Tensor, g: Tensor | None) -> "_Terms":
        """From q (scaled), k [N,BH,C,K] and g [N,BH,C,1]."""
        gram = (k @ k.transpose(-1, -2)).tril(-1)
        scores = None if q is None else (q @ k.transpose(-1, -2)).tril()
        if g is None:
            return cls(k, k, gram, q, scores, None)
        c = g.cumsum(-2)
        size = c.shape[-2]
        later = torch.ones(size, size, dtype=torch.bool, device=c.device).triu(1)
        # -inf before exp: for s > t the difference is positive and could overflow.
        decay = (c - c.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
        from_start = c.exp()
        return cls(
            k_in=from_start * k,
            k_out=decay[..., -1:, :].transpose(-1, -2) * k,
            gram=decay * gram,
            q_in=None if q is None else from_start * q,
            scores=None if scores is None else decay * scores,
            retain=from_start[..., -1:, :],
        )

    def inverse(self, beta: Tensor) -> Tensor:
        """(I + G diag(beta))^-1, for beta [N,BH,C,1]."""
        return _unit_lower_inverse(self.gram * beta.transpose(-1, -2))

    def retained(self, state: Tensor, i: int) -> Tensor:
        """exp(c_C) S of chunk i."""
        return state if self.retain is None else self.retain[i] * state

    def advance(self, state: Tensor, writes: Tensor, i: int) -> Tensor:
        """The state after chunk i."""
        return torch.baddbmm(self.retained(state, i), self.k_out[i].transpose(-1, -2), writes[i])


def _unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower triangular a [..., n, n], by halves.

    Block substitution: as accurate as a triangular solve also when keys repeat (summing powers of a
    is not), and batched matrix products are faster on CPU than a batched solve.
    """
    n = a.shape[-1]
    if n == 1:
        return torch.ones_like(a)
    h = n // 2
    first, second = a[..., :h, :h], a[..., h:, h:]
    if n % 2:
        first, second = _unit_lower_inverse(first), _unit_lower_inverse(second)
    else:
        first, second = _unit_lower_inverse(torch.stack((first, second)))
    inverse = torch.zeros_like(a)
    inverse[..., :h, :h] = first
    inverse[..., h:, h:] = second
    inverse[..., h:, :h] = (second @ (a[..., h:, :h] @ first)).neg_()
    return inverse


class _Inputs(NamedTuple):
    """A call's inputs as chunks, in the dtype of the state; None where absent."""

    q: Tensor | None  # unit if asked for, scaled   [N,BH,C,K]
    k: Tensor  # unit if asked for                  [N,BH,C,K]
    v: Tensor  # [N,BH,C,V]
    beta: Tensor  # [N,BH,C,1]
    g: Tensor | None  # [N,BH,C,1]

    @classmethod
    def of(
        cls,
        q: Tensor | None,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None,
        dtype: torch.dtype,
        options: _Options,
    ) -> "_Inputs":
        """From the tensors as the caller has them."""
        size, heads = options.chunk_size, v.shape[2]

        def keyed(x: Tensor) -> Tensor:
            x = unit_per_head(x.to(dtype), heads, options.qk_norm_eps)
            return _to_chunks(x, size, dtype)

        return cls(
            None if q is None else keyed(q) * options.scale,
            keyed(k),
            _to_chunks(v, size, dtype),
            _to_chunks(beta.unsqueeze(-1), size, dtype),
            None if g is None else _to_chunks(g.unsqueeze(-1), size, dtype),
        )


def unit_per_head(x: Tensor, heads: int, eps: float | None) -> Tensor:
    """x [B,T,G,K], divided by sqrt(sum of squares + eps) unless eps is None, once for each of the
    ``heads`` / G value heads that share it: [B,T,heads,K]."""
    if eps is not None:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
    groups = heads // x.shape[2]
    return x if groups == 1 else x.repeat_interleave(groups, 2)


class _ChunkRule(torch.autograd.Function):
    """The rule over full chunks: (o or None, U or None, *states after each chunk, the last one if
    asked for)."""

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
        inputs = _Inputs.of(q, k, v, beta, g, state.dtype, options)
        terms = _Terms.of(inputs.q, inputs.k, inputs.g)
        inverse, first = terms.inverse(inputs.beta), state.flatten(0, 1)
        states, _, writes = _scan(terms, inverse, inputs, first, last_state=options.last_state)
        o = None
        if terms.q_in is not None and terms.scores is not None:
            out = terms.scores @ writes
            for i, q_i in enumerate(terms.q_in):
                out[i].baddbmm_(q_i, states[i])
            o = _from_chunks(out, k.shape[0], v.dtype)
        ctx.save_for_backward(q, k, v, beta, g, state)
        ctx.options = options
        ctx.set_materialize_grads(False)
        u = None
        if options.output_writes:
            u = _from_chunks(writes, k.shape[0], dtype_of_writes(v.dtype))
        return o, u, *(s.unflatten(0, state.shape[:2]) for s in states[1:])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_u: Tensor | None, *grad_states: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, beta, g, state = ctx.saved_tensors
        if grad_o is None:
            q = None
        # what the terms are made of; v and beta have their gradients by hand
        q, g = (None if x is None else x.detach().requires_grad_() for x in (q, g))
        k = k.detach().requires_grad_()
        with torch.enable_grad():
            inputs = _Inputs.of(q, k, v, beta, g, state.dtype, ctx.options)
            terms = _Terms.of(inputs.q, inputs.k, inputs.g)
        grad_o, grad_u = (
            None if x is None else _to_chunks(x, ctx.options.chunk_size, state.dtype)
            for x in (grad_o, grad_u)
        )
        grad_terms, grad_v, grad_beta, grad_state = _loop_backward(
            terms,
            inputs,
            state.flatten(0, 1),
            grad_o,
            grad_u,
            [None if x is None else x.flatten(0, 1) for x in grad_states],
        )
        used = [
            (x, d)
            for x, d in zip(terms, grad_terms, strict=True)
            if x is not None and d is not None
        ]
        torch.autograd.backward([x for x, _ in used], [d for _, d in used])
        return (
            None if q is None else q.grad,
            k.grad,
            _from_chunks(grad_v, v.shape[0], v.dtype),
            _from_chunks(grad_beta, v.shape[0], beta.dtype).view(beta.shape),
            None if g is None else g.grad,
            grad_state.view(state.shape),
            None,
        )


def _scan(
    terms: _Terms, inverse: Tensor, inputs: _Inputs, state: Tensor, *, last_state: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The states before each chunk, the one after the last if asked for, E and U."""
    errors, writes = torch.empty_like(inputs.v), torch.empty_like(inputs.v)
    states = [state]
    for i, v_i in enumerate(inputs.v):
        unexplained = torch.baddbmm(v_i, terms.k_in[i], states[i], alpha=-1)
        torch.bmm(inverse[i], unexplained, out=errors[i])
        torch.mul(errors[i], inputs.beta[i], out=writes[i])
        if last_state or i + 1 < len(writes):
            states.append(terms.advance(states[i], writes, i))
    return states, errors, writes


def _loop_backward(
    terms: _Terms,
    inputs: _Inputs,
    state: Tensor,
    grad_o: Tensor | None,
    grad_u: Tensor | None,
    grad_states: Sequence[Tensor | None],
) -> tuple[_Terms, Tensor, Tensor, Tensor]:
    """Gradients of (terms, V, beta, initial state), from those of O, of U and of each chunk's end
    state.

    With dU the gradient of the writes as all that reads them uses them, the adjoint of the
    triangular system is L = (I + G diag(beta))^-T (beta * dU), and the gradient of U in full is
    dU - G^T L: later tokens' errors see it too.  L is the gradient of V.
    """
    beta, inverse = inputs.beta, terms.inverse(inputs.beta)
    states, errors, writes = _scan(terms, inverse, inputs, state, last_state=False)
    adjoint = inverse.transpose(-1, -2)
    grad_k_in, grad_k_out = torch.empty_like(terms.k_in), torch.zeros_like(terms.k_out)
    grad_v = torch.empty_like(errors)
    grad_retain = None if terms.retain is None else torch.zeros_like(terms.retain)
    grad_writes = torch.zeros_like(writes)
    grad_q_in, grad_scores = None, None
    if grad_o is not None:
        assert terms.q_in is not None and terms.scores is not None
        grad_writes = terms.scores.transpose(-1, -2) @ grad_o
        grad_scores = grad_o @ writes.transpose(-1, -2)
        grad_q_in = torch.empty_like(terms.q_in)
    if grad_u is not None:
        grad_writes += grad_u
    # None: nothing reads the state after the last chunk, or it has no gradient
    grad_state = grad_states[-1] if len(grad_states) == len(writes) else None
    for i in reversed(range(len(writes))):
        if grad_state is not None:
            grad_writes[i].baddbmm_(terms.k_out[i], grad_state)
            torch.bmm(writes[i], grad_state.transpose(-1, -2), out=grad_k_out[i])
        torch.bmm(adjoint[i], grad_writes[i] * beta[i], out=grad_v[i])
        torch.bmm(grad_v[i], states[i].transpose(-1, -2), out=grad_k_in[i])
        k_in = terms.k_in[i].transpose(-1, -2)
        if grad_state is None:
            grad_state = torch.bmm(k_in, grad_v[i].neg())
        else:
            if grad_retain is not None:
                torch.sum(grad_state * states[i], (-2, -1), keepdim=True, out=grad_retain[i])
            grad_state = terms.retained(grad_state, i)
            grad_state = torch.baddbmm(grad_state, k_in, grad_v[i], alpha=-1)
        if grad_o is not None and terms.q_in is not None and grad_q_in is not None:
            grad_state.baddbmm_(terms.q_in[i].transpose(-1, -2), grad_o[i])
            torch.bmm(grad_o[i], states[i].transpose(-1, -2), out=grad_q_in[i])
        if i and (given := grad_states[i - 1]) is not None:
            grad_state = grad_state + given
    grad_writes.flatten(0, 1).baddbmm_(
        terms.gram.transpose(-1, -2).flatten(0, 1), grad_v.flatten(0, 1), alpha=-1
    )
    grad_beta = (grad_writes * errors).sum(-1, keepdim=True)
    grad_gram = (grad_v @ writes.transpose(-1, -2)).neg_()
    grad_terms = _Terms(
        grad_k_in.neg_(), grad_k_out, grad_gram, grad_q_in, grad_scores, grad_retain
    )
    assert grad_state is not None
    return grad_terms, grad_v, grad_beta, grad_state
