"""What the delta rules' kernels share: tiles of tensors in memory, norms and decays.

Tensors are laid out as triton_kernels.py says.
"""

import triton
import triton.language as tl

# exp(-104) is less than half of the least number above zero in float32.  Sums of a chunk's log
# decays stay below 64 * 104, so that their differences keep an absolute accuracy of 5e-4 even
# after decays that erase everything, and -inf does no harm.
LEAST_LOG_DECAY = tl.constexpr(-104.0)


@triton.jit
def load_rows(
    x, stride_b, stride_t, stride_h, b, head, first, n, cols, D: tl.constexpr, C: tl.constexpr
):
    """Rows first..first+C of x[b, :, head, cols]; zero past row n and column D."""
    rows = tl.arange(0, C)
    x += b * stride_b + head * stride_h + tl.cast(first, tl.int64) * stride_t
    mask = (first + rows < n)[:, None] & (cols < D)[None, :]
    return tl.load(x + rows[:, None] * stride_t + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_dense(x, b, head, first, n, cols, H, D: tl.constexpr, C: tl.constexpr):
    """load_rows of a dense [B,T,H,D]."""
    return load_rows(x, tl.cast(n, tl.int64) * H * D, H * D, D, b, head, first, n, cols, D, C)


@triton.jit
def store_dense(x, value, b, head, first, n, cols, H, D: tl.constexpr, C: tl.constexpr):
    """`value` into rows first..first+C of x[b, :, head, cols], as far as x reaches."""
    rows = tl.arange(0, C)
    x += (b * n + first) * (H * D) + head * D
    mask = (first + rows < n)[:, None] & (cols < D)[None, :]
    tl.store(x + rows[:, None] * (H * D) + cols[None, :], value, mask=mask)


@triton.jit
def load_per_token(x, b, head, first, n, H, C: tl.constexpr):
    """x[b, first:first+C, head] of a dense [B,T,H] as float32, zero past n."""
    rows = tl.arange(0, C)
    x += (b * n + first) * H + head
    return tl.load(x + rows * H, mask=first + rows < n, other=0.0).to(tl.float32)


@triton.jit
def store_per_token(x, value, b, head, first, n, H, C: tl.constexpr):
    rows = tl.arange(0, C)
    x += (b * n + first) * H + head
    tl.store(x + rows * H, value, mask=first + rows < n)


@triton.jit
def load_chunk(x, number, cols, D: tl.constexpr, C: tl.constexpr):
    """Columns `cols` of chunk `number` of [BH*N,C,D], zero past D."""
    at = x + number * (C * D) + tl.arange(0, C)[:, None] * D + cols[None, :]
    return tl.load(at, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def store_chunk(x, value, number, cols, D: tl.constexpr, C: tl.constexpr):
    at = x + number * (C * D) + tl.arange(0, C)[:, None] * D + cols[None, :]
    tl.store(at, value, mask=(cols < D)[None, :])


@triton.jit
def load_state(x, number, rows, cols, K: tl.constexpr, V: tl.constexpr):
    """Part of state `number` of [...,K,V], zero past its edges."""
    at = x + number * (K * V) + rows[:, None] * V + cols[None, :]
    return tl.load(at, mask=(rows < K)[:, None] & (cols < V)[None, :], other=0.0)


@triton.jit
def store_state(x, value, number, rows, cols, K: tl.constexpr, V: tl.constexpr):
    at = x + number * (K * V) + rows[:, None] * V + cols[None, :]
    tl.store(at, value, mask=(rows < K)[:, None] & (cols < V)[None, :])


@triton.jit
def inverse_norms(x, first, n, eps, NORM: tl.constexpr, C: tl.constexpr):
    """1 / sqrt(sum of squares + eps) of each row, zero past n; ones if no norm is asked for."""
    valid = first + tl.arange(0, C) < n
    if NORM:
        x = x.to(tl.float32)
        return tl.where(valid, tl.rsqrt(tl.sum(x * x, 1) + eps), 0.0)
    else:
        return tl.where(valid, 1.0, 0.0)


@triton.jit
def decays_between(c, C: tl.constexpr):
    """exp(c_t - c_s) for s <= t, else zero; no exp of what is above the diagonal."""
    i = tl.arange(0, C)
    causal = i[:, None] >= i[None, :]
    return tl.where(causal, tl.exp(tl.where(causal, c[:, None] - c[None, :], 0.0)), 0.0)


@triton.jit
def invert_block(transposed):
    """(I + a)^-1 from a^T, a strictly lower triangular [16,16]: forward substitution."""
    i = tl.arange(0, 16)
    x = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for row in range(1, 16):
        a_row = tl.sum(tl.where(i[None, :] == row, transposed, 0.0), 1)
        known = tl.sum(a_row[:, None] * x, 0)
        x = tl.where(i[:, None] == row, x - known[None, :], x)
    return x


@triton.jit
def dot32(a, b):
    """a @ b in float32 proper."""
    return tl.dot(a, b, input_precision="ieee")
