"""LaCT (Zhang et al. 2025, arXiv 2505.23884): window attention plus large-chunk fast weights, as
`lact_swiglu` computes it.

One qkv feeds both branches; the fast branch reads each chunk with the weights from before that
chunk's own update. Departures from the published code, none of which changes a
padding-free text:

* The chunk grid is anchored at each stream's own first token, and a branch keeps its text's grid.
  The published rollouts left-pad, which shifts the grid and writes the padding into the fast
  weights.
* A chunk's update is made when its next token arrives, so a state between chunks is the last
  weights plus the open chunk.
* Newton-Schulz runs in the precision `muon_dtype` says (the published code always casts to
  bfloat16).
* The products over a chunk's tokens run in the dtype of the activations, as there under autocast,
  or in the one that `model.fast_weight_matmul` says; what lies between them is in float32.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from refine_kernels.dispatch import (
    ChunkWeights,
    FastWeights,
    RowNorms,
    apply_fast_weights,
    attention_and_fast_features,
    chunk_lact,
    rms_norm,
    rotate,
    update_fast_weights,
)
from refine_kernels.recompute import remade
from refine_kernels.streams import StreamGroups, take_streams
from torch import Tensor

from refine_mcore.models.attention import (
    AttentionState,
    AttentionTape,
    attend,
)
from refine_mcore.models.lact_state import (
    FastInputs,
    FixedLaCT,
    LaCTState,
    LaCTTape,
    WeightRows,
    open_chunk_length,
    weight_rows,
    weights_index,
)
from refine_mcore.models.mixer import Mixer, MixerOutput, MixerSubmodules
from refine_mcore.models.parallel_layers import (
    PackedColumnParallelLinear,
    Projection,
    at_least_float32,
    full_width_norm,
    norm_gain,
    replicated_parameter,
    row_sharded_parameter,
    shared_by_heads,
    with_zero_gradients,
)
from refine_mcore.models.state import (
    FastWeightState,
    TokenHistory,
    inverse,
)
from refine_mcore.models.transformer_config import FastWeightConfig

_QUERIES, _KEYS = 0, 1  # columns of qk_scale and qk_offset
_NORM_EPS = 1e-5  # of the output norm and the qk norm
_BASE_RATE = 0.001
_RATE_SHIFT = _BASE_RATE + math.log(-math.expm1(-_BASE_RATE))  # softplus(_RATE_SHIFT) = _BASE_RATE


class LaCT(Mixer):
    """Window attention and SwiGLU fast weights in parallel; fast heads are sharded with the
    attention heads they hold."""

    def __init__(
        self,
        config: FastWeightConfig,
        submodules: MixerSubmodules,
        layer_number: int,
        pg_collection: Any,
    ) -> None:
        super().__init__(config, pg_collection.tp)
        options: Any = config.arch.mixer
        self.options = options
        hidden, heads = config.hidden_size, options.num_fast_heads
        self.head_dim = hidden // options.num_attention_heads
        self.fast_dim = options.fast_head_dim(hidden)
        self.in_proj = PackedColumnParallelLinear(
            submodules.in_proj,
            config,
            [
                *(Projection(f"{name}_proj", hidden, options.qkv_bias) for name in "qkv"),
                # small and compounding over the text: their biases keep all their digits
                Projection("lr_proj", 3 * heads, True, True),
                *([Projection("momentum_proj", heads, True, True)] * options.use_momentum),
                *([Projection("ttt_scale_proj", heads, True, True)] * options.learnable_scale),
            ],
            self.tp_group,
        )
        self._precision = config.fast_weight_matmul
        self._rates = ["lr_proj", *(["momentum_proj"] if options.use_momentum else [])]
        self._build_fast_weights(hidden // self.tp_size, heads // self.tp_size)
        self.o_proj = self.build_output_projection(submodules, hidden)

    def _build_fast_weights(self, width: int, heads: int) -> None:
        options, config, dim = self.options, self.config, self.fast_dim
        hidden = options.fast_hidden_dim(config.hidden_size)
        shapes = {"qk_scale": (width, 2), "qk_offset": (width, 2), "w1": (heads, dim, hidden)}
        for name in ("w0", "w2"):
            if options.low_rank is None:
                shapes[name] = (heads, hidden, dim)
            else:
                shapes[f"{name}.w_left"] = (heads, hidden, options.low_rank)
                shapes[f"{name}.w_right"] = (heads, options.low_rank, dim)
        if options.qk_norm:
            shapes |= {"q_norm.weight": (width,), "k_norm.weight": (width,)}
        self.raw_parameters = {name.replace(".", "_"): name for name in shapes}
        self.row_sharded = frozenset(self.raw_parameters)
        for attribute, name in self.raw_parameters.items():
            dtype = config.params_dtype
            # an update of a gain is far below the precision of bfloat16
            if name.startswith("qk_") or name.endswith("norm.weight"):
                dtype = at_least_float32(dtype)
            self.register_parameter(attribute, row_sharded_parameter(shapes[name], config, dtype))
        self.raw_parameters["ttt_norm"] = "ttt_norm.weight"
        self.ttt_norm = replicated_parameter((dim,), config)

    def mix(
        self, tokens: Tensor, state: FastWeightState | None, output_state: bool, record: bool
    ) -> MixerOutput:
        assert state is None or isinstance(state, LaCTState | FixedLaCT)
        streams, length = tokens.shape[:2]
        before: Any = AttentionState.start(streams) if state is None else state.attention
        writes = self._writes(state, length, kept=output_state or record)
        parts = self.in_proj.split(tokens, without=() if writes else self._rates)
        q, k, v = parts["q_proj"], parts["k_proj"], parts["v_proj"]
        if self.options.qk_norm:
            q, k = self._qk_norm(q, self.q_norm_weight), self._qk_norm(k, self.k_norm_weight)
        table = before.rotary(length, self.head_dim, self.options.rope_theta, q)
        q, fq = remade(self._features, _QUERIES, q, self.qk_scale, self.qk_offset, *table)
        inputs = None
        if writes:
            k, fk = self._features(_KEYS, k, self.qk_scale, self.qk_offset, *table)
            inputs = self._fast_inputs(fk, v, parts)
        else:
            k = rotate(k.unflatten(-1, (-1, self.head_dim)), *table)
        v = v.unflatten(-1, (-1, self.head_dim))
        window = self.options.window_size
        history = before.history.append((k, v))
        attended = attend(q, history, window)

        read, weights = self._read_next(fq, inputs, state)
        gate = parts["ttt_scale_proj"][..., None] if self.options.learnable_scale else None
        gain = shared_by_heads(self.ttt_norm, self.tp_group)
        out = remade(_add_read, attended, read, gain, gate)
        if isinstance(state, FixedLaCT):
            assert not record, "states in fixed places are branches"
            return MixerOutput(out, state.after(history), None)
        if max(weights_index(p + length, self.options.chunk_size) for p in before.position) == 0:
            # no token is read with weights that were written
            out = with_zero_gradients(out, [self.in_proj.bias(name) for name in self._rates])
        if not (output_state or record):
            return MixerOutput(out, None, None)
        assert inputs is not None and weights is not None
        pending = TokenHistory.extend(state.pending if state else None, inputs.tensors())
        new_state = tape = None
        if output_state:
            after = before.after(history, length, window)
            new_state = self._next_state(after, pending, weights)
        if record:
            attention_tape = before.record(history, length, window)
            tape = self._record(attention_tape, pending, attention_tape.start + length, weights)
        return MixerOutput(out, new_state, tape)

    def fixed_state(
        self, state: FastWeightState, tokens: int, rollouts: int
    ) -> FastWeightState | None:
        """None for streams of which some would reach the end of their chunk."""
        assert isinstance(state, LaCTState)
        if self._fills_chunk(state, tokens):
            return None
        attention = state.attention.fixed(tokens, self.head_dim, self.options.rope_theta)
        if attention is None:
            return None
        return FixedLaCT(attention, state.weights_of_forks(rollouts))

    def _writes(self, state: LaCTState | FixedLaCT | None, tokens: int, *, kept: bool) -> bool:
        """Whether weights are written with some of the next tokens, now or, as the streams' states
        are kept, maybe later."""
        if isinstance(state, FixedLaCT):
            return False
        return kept or state is None or self._fills_chunk(state, tokens)

    def _fills_chunk(self, state: LaCTState, tokens: int) -> bool:
        """Whether a stream goes past its chunk's end with so many tokens more."""
        size = self.options.chunk_size
        return any(open_chunk_length(p, size) + tokens > size for p in state.position)

    def _features(
        self, column: int, x: Tensor, scale: Tensor, offset: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q or k [R, T, heads, dim], and fq or fk [R, T, n, d]."""
        return attention_and_fast_features(
            *(x, scale, offset, cos, sin),
            column=column,
            head_dim=self.fast_dim,
            silu=self.options.qkv_silu,
            fast_rope=self.options.fast_rope,
        )

    def _fast_inputs(self, fk: Tensor, v: Tensor, parts: dict[str, Tensor]) -> FastInputs:
        """What the weights are written with."""
        fv = remade(F.silu, v) if self.options.qkv_silu and self.options.v_silu else v
        fv = fv.reshape(fk.shape)
        dtype = at_least_float32(v.dtype)
        rates = F.softplus(parts["lr_proj"].to(dtype) + _RATE_SHIFT)
        mu = None
        if self.options.use_momentum:
            mu = torch.sigmoid(parts["momentum_proj"].to(dtype))
        return FastInputs(fk, fv, rates.reshape(*rates.shape[:2], -1, 3), mu)

    def _qk_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        gain = norm_gain(weight, self.config.layernorm_zero_centered_gamma)
        return full_width_norm(x, gain, _NORM_EPS, self.tp_group)

    def initial_weights(self, streams: int) -> tuple[FastWeights, RowNorms]:
        """The learned initial fast weights for each stream, and their row norms."""
        compute = at_least_float32(self.w1.dtype)

        def matrix(name: str) -> Tensor:
            if self.options.low_rank is None:
                return getattr(self, name).to(compute)
            left, right = getattr(self, f"{name}_w_left"), getattr(self, f"{name}_w_right")
            half = _half_identity(left.shape[1], right.shape[2], compute, left.device)
            return torch.baddbmm(half, left.to(compute), right.to(compute))

        initial = FastWeights.of(matrix("w0")[None], self.w1.to(compute)[None], matrix("w2")[None])
        shape = (streams, -1, -1, -1)
        w02, w1 = (w.expand(shape) for w in initial[:2])
        return FastWeights(w02, w1), initial.row_norms()

    @property
    def _update_options(self) -> dict[str, Any]:
        muon_dtype = getattr(torch, self.options.muon_dtype)
        if muon_dtype == torch.float32:
            muon_dtype = None  # the weights' own precision, at least float32
        return {
            "muon": self.options.use_muon,
            "muon_dtype": muon_dtype,
            "prenorm": self.options.prenorm,
            "precision": self._precision,
        }

    def _read_next(
        self, fq: Tensor, inputs: FastInputs | None, state: LaCTState | FixedLaCT | None
    ) -> tuple[Tensor, _WeightsInForce | None]:
        """Read [R, T, n, d] of all new tokens, and the weights that were in force; `inputs` where
        some may be written."""
        if isinstance(state, FixedLaCT):
            return self._read_rows(state.weights, fq), None
        if state is not None:
            return self._read_on(fq, inputs, state)
        assert inputs is not None
        return self._read_text(fq, inputs)

    def _read_text(self, fq: Tensor, inputs: FastInputs) -> tuple[Tensor, _WeightsInForce]:
        """Read [R, T, n, d] of texts from their first token on, and the weights that were in
        force."""
        streams = fq.shape[0]
        initial, norms = self.initial_weights(streams)
        read, chunks = self._chunks(fq, inputs, initial, norms)
        last = WeightRows.of([chunks[-1]])
        return read, _WeightsInForce(chunks, last, tuple(range(streams)), norms)

    def _read_on(
        self, fq: Tensor, inputs: FastInputs | None, state: LaCTState
    ) -> tuple[Tensor, _WeightsInForce]:
        """Read [R, T, n, d] of all new tokens behind a state, and the weights that were in
        force."""
        streams, length = fq.shape[:2]
        size = self.options.chunk_size
        opened = [open_chunk_length(p, size) for p in state.position]
        staying = [r for r in range(streams) if opened[r] + length <= size]
        if len(staying) == streams:
            read = self._read_shared(fq, state, staying)
            rows = state.weight_rows
            return read, _WeightsInForce(None, state.weights, rows, state.norms)
        assert inputs is not None
        groups = [staying] if staying else []
        crossing = sorted({n for n in opened if n + length > size})
        groups += [[r for r in range(streams) if opened[r] == n] for n in crossing]
        reads, ends = [], []
        chunks = ChunkWeights(())
        for group in groups:
            if group is staying:
                reads.append(self._read_shared(take_streams(fq, group), state, group))
                ends.append(state.weights.rows([state.weight_rows[r] for r in group]))
            else:
                part = inputs.map(partial(take_streams, indices=group))
                read, chunks = self._cross_chunks(take_streams(fq, group), part, state, group)
                reads.append(read)
                ends.append(chunks[-1])
        back = inverse([r for group in groups for r in group])
        in_force = _WeightsInForce(chunks, WeightRows.of(ends), tuple(back), state.norms)
        return take_streams(torch.cat(reads), back), in_force

    def _read(self, weights: FastWeights, fq: Tensor) -> Tensor:
        return apply_fast_weights(weights, fq, precision=self._precision)

    def _read_rows(self, weights: FastWeights, fq: Tensor) -> Tensor:
        """Read of streams of which as many share a row, one after the other."""
        rows = fq.reshape(weights.w1.shape[0], -1, *fq.shape[2:])
        return self._read(weights, rows).reshape(fq.shape)

    def _chunks(
        self, fq: Tensor, inputs: FastInputs, weights: FastWeights, norms: RowNorms
    ) -> tuple[Tensor, ChunkWeights]:
        size = self.options.chunk_size
        return chunk_lact(fq, *inputs, weights, norms, chunk_size=size, **self._update_options)

    def _read_shared(self, fq: Tensor, state: LaCTState, streams: list[int]) -> Tensor:
        """Reads that reach no chunk boundary; streams that share weights meet them in one
        product."""
        rows = [state.weight_rows[r] for r in streams]
        used = sorted(set(rows))
        weights = state.weights.read
        if len(used) < state.weights.count:
            weights = weight_rows(weights, used)
        groups = StreamGroups([used.index(r) for r in rows], len(used))
        return groups.scatter(self._read(weights, groups.gather(fq)))

    def _cross_chunks(
        self, fq: Tensor, inputs: FastInputs, state: LaCTState, streams: list[int]
    ) -> tuple[Tensor, ChunkWeights]:
        """Streams equally far in their chunk, and past its end: finish it, write it, go on chunk by
        chunk.

        Returns the reads and the weights in force, the incoming ones first.
        """
        size = self.options.chunk_size
        opened = open_chunk_length(state.position[streams[0]], size)
        weights = state.weights.rows([state.weight_rows[r] for r in streams])
        rest = size - opened
        read = [self._read(weights, fq[:, :rest])]
        begun = [state.pending.last(r, opened) for r in streams]
        chunk = FastInputs.of(
            torch.cat([torch.cat(parts), y[:, :rest]], dim=1)
            for parts, y in zip(zip(*begun, strict=True), inputs.tensors(), strict=True)
        )
        written = update_fast_weights(weights, state.norms, *chunk, **self._update_options)
        rest_inputs = inputs.map(lambda y: y[:, rest:])
        rest_read, chunks = self._chunks(fq[:, rest:], rest_inputs, written, state.norms)
        return torch.cat([*read, rest_read], dim=1), ChunkWeights((weights, *chunks))

    def _next_state(
        self, attention: AttentionState, pending: TokenHistory, weights: _WeightsInForce
    ) -> LaCTState:
        if pending.text is None:
            pending = pending.keep_last(
                max(open_chunk_length(p, self.options.chunk_size) for p in attention.position)
            )
        return LaCTState(attention, weights.last, weights.rows, weights.norms, pending)

    def _record(
        self, attention: AttentionTape, pending: TokenHistory, end: int, weights: _WeightsInForce
    ) -> LaCTTape:
        """The tape of a forward over tokens up to `end`."""
        assert weights.rows == tuple(range(len(weights.rows))), "a tape needs texts, not branches"
        return LaCTTape(
            self.options.chunk_size,
            attention,
            pending.own,
            end - pending.own_length,
            weights.chunks
            if weights.chunks is not None
            else ChunkWeights((weights.last.rows(weights.rows),)),
            weights.norms,
            weights_index(attention.start, self.options.chunk_size),
        )


class _WeightsInForce(NamedTuple):
    """Weights during each chunk of a forward (of one group of streams; None: the last ones), at its
    end the row each stream uses, and the norms of all their rows."""

    chunks: ChunkWeights | None
    last: WeightRows
    rows: tuple[int, ...]
    norms: RowNorms


@lru_cache(maxsize=4)
def _half_identity(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not to be written to; all layers of a model add the same one."""
    with torch.inference_mode(False):
        return 0.5 * torch.eye(rows, columns, dtype=dtype, device=device)


def _add_read(attended: Tensor, read: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    """Both branches [R, T, width]: attended, and what the fast weights read, normed and gated."""
    return rms_norm(read, gain, _NORM_EPS, gate, attended.reshape(read.shape)).flatten(2)
