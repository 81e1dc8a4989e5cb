"""What one pipeline stage does with one micro-batch: the passes F, D, S and W on its layers.

`StageWork` runs the passes in the order of `passes.py`; each takes the tensors of its message and
returns those it hands on. The graph is cut at slice borders and where branches leave (`cut.py`), so
W(i) is one autograd call over slice i: its output, the states it handed on, the states and hidden
states that branches took from it. The gradients are those of the uncut step.

Branches leave a slice once its positions are known, until when it keeps its tape: those of stored
rollouts at once, new ones after the last slice.

With full recomputation F keeps no graph: a slice's activations are made again, all layers of the
stage at once, just before its backward. So at most one slice's activations are alive. With any
recomputation the last stage, which draws the positions, does so slice by slice, and a tape is let
go as soon as no branch can leave it any more; the stages before learn them after the last slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from refine_kernels.host import to_device
from refine_kernels.streams import take_streams
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from refine_mcore.config import RefineConfig
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import FastWeightModel, ModelOutput
from refine_mcore.models.state import inverse
from refine_mcore.pipeline.branch_passes import BranchPasses
from refine_mcore.pipeline.cut import Cut, Root, run_backward
from refine_mcore.pipeline.head import Head
from refine_mcore.pipeline.micro_batch import MicroBatch, StoredRollouts
from refine_mcore.pipeline.passes import Pass
from refine_mcore.platform import device
from refine_mcore.rollout.branches import Branches
from refine_mcore.rollout.decode_passes import Decoder

Span = tuple[int, int]

_TOKENS: Any = {"dtype": torch.long, "device": "meta"}


@dataclass
class _Slice:
    """What is kept of tokens [start, stop) from their forward to their backward.

    `hidden` is the input, None on the first stage; `incoming` hands in the states before. `root` is
    where the backward of the output begins, its gradient None if the next stage sends it. `out`
    lives until the branches have left, which took what `branched` hands on.
    """

    start: int
    stop: int
    hidden: Tensor | None
    incoming: Cut | None
    root: Root | None = None
    out: ModelOutput | None = None
    outgoing: Cut | None = None
    branched: Cut | None = None

    def backward(self, gradient: Tensor | None) -> None:
        """From the output's gradient and those that gathered behind the cuts."""
        assert self.root is not None
        edge, own = self.root
        cuts = [cut for cut in (self.outgoing, self.branched) if cut is not None]
        behind_cuts = [root for cut in cuts for root in cut.roots()]
        run_backward([(edge, own if gradient is None else gradient), *behind_cuts])


class StageWork:
    """One micro-batch on this stage.

    Args:
        wrapped: this stage's part of the model.
        decoder: of this stage.
        micro_batch: what to do; every stage has the texts.
        spans: [start, stop) of each slice.
        config: of the rollouts.
        head: the objective, on the last stage.
        keeps_graph: False where there is no backward, or where slices are read again for it.
    """

    def __init__(
        self,
        wrapped: DistributedDataParallel,
        decoder: Decoder,
        micro_batch: MicroBatch,
        spans: Sequence[Span],
        config: RefineConfig,
        head: Head | None,
        keeps_graph: bool,
    ) -> None:
        self._wrapped, self._decoder, self._spans = wrapped, decoder, spans
        self._batch, self._stored = micro_batch.texts, micro_batch.stored
        self._model: FastWeightModel = wrapped.module
        self._config, self._rolls_out = config, micro_batch.rolls_out
        self._head, self._keeps_graph = head, keeps_graph
        self._slices: dict[int, _Slice] = {}
        # Where branches leave; before the last slice of new ones, those of slices that were let go.
        self._branched_at = None if self._stored is None else self._stored.branches
        self._branches: BranchPasses | None = None

    def run(self, item: Pass, message: Sequence[Tensor], *, last_backward: bool) -> list[Tensor]:
        """Run a pass on the tensors of its message (none if it comes from this stage); returns
        those it hands on. `last_backward` is True once per step: gradients are whole after it."""
        if item.op == "F":
            return self._forward(item.slice, *message)
        if item.op == "W":
            return self._backward(item.slice, message, last_backward)
        return self._branch_pass(item, *message)

    def take_rollouts(self) -> StoredRollouts:
        """What this stage stores of the rollouts that it has scored; all else is let go."""
        assert self._branches is not None and self._branched_at is not None
        scored = None if self._head is None else self._head.scored
        stored = StoredRollouts(self._branched_at, self._branches.tokens, scored)
        self._slices, self._branches = {}, None
        return stored

    def input_like(self, item: Pass) -> list[Tensor]:
        """Tensors without memory, of the shapes and dtypes that the message of a pass holds."""
        start, stop = self._spans[item.slice]
        texts = self._batch.tokens.shape[0]
        text = self._hidden_like(texts, stop - start)
        if item.op == "F" or not self._rolls_out:
            return [text]
        config, last = self._config, len(self._spans) - 1
        streams = texts * config.num_chunks * config.rollouts_per_position
        scored = self._hidden_like(streams, self._scored_tokens)
        if item.op == "W":
            return [text, scored][: 1 + (item.slice == last)]
        begins = item.step == 0 and (item.op == "D" or config.rollout_tokens == 1)
        tell_positions = begins and self._stored is None
        positions = [torch.empty(texts, config.num_chunks, **_TOKENS)] * tell_positions
        if self._model.pre_process:
            return [torch.empty(streams, **_TOKENS), *positions]
        return [self._hidden_like(streams, 1) if item.op == "D" else scored, *positions]

    def made_up_message(self, item: Pass, positions: Sequence[int]) -> list[Tensor]:
        """Any that the pass can run on, with these positions in every text."""
        made = [torch.ones_like(x, device=device()) for x in self.input_like(item)]
        for x in made:
            if x.dtype == torch.long and x.dim() == 2:  # positions
                x *= to_device(positions, x.device)
        return made

    @property
    def _scored_tokens(self) -> int:
        """Tokens of a rollout, and of the text behind it, that the pass S reads; stored rollouts
        have their rewards."""
        behind = 0 if self._stored is not None else self._config.tokens_behind
        return self._config.rollout_tokens + behind

    def _hidden_like(self, streams: int, length: int) -> Tensor:
        shape = self._model.between_stages(streams, length)
        return torch.empty(shape, dtype=self._model.config.pipeline_dtype, device="meta")

    def _forward(self, index: int, hidden: Tensor | None = None) -> list[Tensor]:
        before = self._slices[index - 1].outgoing if index else None
        hidden = None if hidden is None else hidden.requires_grad_()
        piece = self._slices[index] = _Slice(*self._spans[index], hidden, before)
        new_rollouts = self._rolls_out and self._stored is None
        with torch.set_grad_enabled(self._keeps_graph):
            piece.out = self._read(piece, record=new_rollouts or bool(self._leaving(piece)))
        handed_on = [piece.out.hidden.detach()] if self._head is None else []
        if not new_rollouts:
            self._branch_off(until=piece.stop)
        elif self._head is not None:
            last = index == len(self._spans) - 1
            recomputes = not self._keeps_graph or self._model.config.selective_recompute
            if last or recomputes:
                self._branched_at, known = self._head.choose_branches()
                self._branch_off(until=known)
            if last:
                return self._begin_rollouts()
        return handed_on

    def _read(self, piece: _Slice, *, record: bool, again: bool = False) -> ModelOutput:
        """Forward over a slice, on the last stage with its part of the next-token loss; with
        gradients enabled all but its branches is ready for its backward."""
        self._model.set_input_tensor(piece.hidden)
        documents = self._batch.documents
        out = self._model(
            self._batch.tokens[:, piece.start : piece.stop],
            piece.incoming.handed if piece.incoming else None,
            start=piece.start,
            documents=None if documents is None else documents.part(piece.start, piece.stop),
            output_states=piece.stop < self._spans[-1][1],
            record=record,
        )
        output: Tensor | None = out.hidden
        if self._head is not None:
            output = self._head.read(out, piece.start, again=again)
        if output is not None and torch.is_grad_enabled():
            own = None if self._head is None else torch.ones_like(output)
            piece.root = get_gradient_edge(output), own
        if out.states is not None:
            piece.outgoing = _cut_or_reconnect(piece.outgoing, out.states)
        return out

    def _begin_rollouts(self) -> list[Tensor]:
        """On the last stage, after the last slice: first tokens and positions."""
        assert self._branched_at is not None
        tokens = self._leave().draw_first_tokens()
        positions = to_device(self._branched_at.position, tokens.device)
        return [tokens, positions.reshape(self._batch.tokens.shape[0], -1)]

    def _branch_pass(
        self, item: Pass, message: Tensor | None = None, positions: Tensor | None = None
    ) -> list[Tensor]:
        if positions is not None and self._branched_at is None:
            self._branched_at = Branches.at(positions.tolist())
            self._branch_off(until=self._spans[-1][1])
        branches = self._branches or self._leave()
        run = branches.decode if item.op == "D" else branches.score
        handed_on = run(message), positions if self._head is None else None
        return [x for x in handed_on if x is not None]

    def _leaving(self, piece: _Slice) -> list[int]:
        """The rows of the branches that leave a slice: it holds the last token of their prefix."""
        positions = () if self._branched_at is None else self._branched_at.position
        return [row for row, p in enumerate(positions) if piece.start < p <= piece.stop]

    def _branch_off(self, *, until: int) -> None:
        """Slices up to the position `until` hand on what their branches take, and let go all
        else."""
        for piece in self._slices.values():
            if piece.out is not None and piece.stop <= until:
                with torch.set_grad_enabled(self._keeps_graph):
                    self._cut_branches(piece, piece.out)
                piece.out = None

    def _cut_branches(self, piece: _Slice, out: ModelOutput) -> None:
        """Cut off what the branches that leave a slice take from it: per layer their states, and
        on the last stage the hidden states that emit their first tokens."""
        rows = self._leaving(piece)
        if not rows:
            return
        assert out.tape is not None and self._branched_at is not None
        branches = self._branched_at.select(rows)
        states = out.tape.at(branches.batch_index, branches.position)
        hidden = None
        if self._head is not None:
            inside = tuple(position - piece.start for position in branches.position)
            hidden = Branches(branches.batch_index, inside).rows_before(out.hidden)
        piece.branched = _cut_or_reconnect(piece.branched, (states, hidden))

    def _leave(self) -> BranchPasses:
        """All branches together, ready for their passes."""
        pieces = [piece for piece in self._slices.values() if piece.branched is not None]
        back = inverse([row for piece in pieces for row in self._leaving(piece)])
        streams = [row for row in back for _ in range(self._config.rollouts_per_position)]
        handed: list[Any] = [piece.branched.handed for piece in pieces if piece.branched]
        one_text = self._batch.documents is None
        states = [
            type(parts[0]).join(parts, one_text=one_text).select(streams)
            for parts in zip(*(of_slice for of_slice, _ in handed), strict=True)
        ]
        prefix_hidden = None
        if self._head is not None:
            prefix_hidden = take_streams(torch.cat([hidden for _, hidden in handed]), streams)
        tokens = None if self._stored is None else self._stored.tokens
        self._branches = BranchPasses(
            self._model,
            self._decoder,
            self._head,
            self._config,
            self._scored_tokens,
            states,
            prefix_hidden,
            tokens,
            self._text_behind(),
        )
        return self._branches

    def _text_behind(self) -> Tensor | None:
        """The text tokens [streams, m] behind new rollouts that their rewards read, on the first
        stage."""
        config, branches = self._config, self._branched_at
        behind = self._scored_tokens - config.rollout_tokens
        if behind == 0 or not self._model.pre_process:
            return None
        assert branches is not None
        streams, tokens = branches.fork(config.rollouts_per_position), self._batch.tokens[..., None]
        return streams.rows_after(tokens, behind, skip=config.rollout_tokens)[..., 0]

    def _backward(self, index: int, message: Sequence[Tensor], last_backward: bool) -> list[Tensor]:
        """W: on the last slice first the backward of the branches, in the same message."""
        piece, of_branches = self._slices[index], None
        gradient, branch_gradient = [*message, None, None][:2]
        if self._branches is not None:
            with self._wrapped.no_sync():
                of_branches = self._branches.backward(branch_gradient)
            self._branches = None
            for read in self._slices.values():
                if read.branched is not None:
                    read.branched.close()
        if not self._keeps_graph:
            record = piece.branched is not None
            self._cut_branches(piece, self._read(piece, record=record, again=True))
        del self._slices[index]
        with nullcontext() if last_backward else self._wrapped.no_sync():
            piece.backward(gradient)
        of_text = None if piece.hidden is None else piece.hidden.grad
        return [x for x in (of_text, of_branches) if x is not None]


def made_up_positions(
    architecture: Architecture, config: RefineConfig, length: int
) -> list[list[int]]:
    """Positions of a text that between them have rollouts run every kernel: all over it; early; and
    where LaCT writes weights, one just before the end of its first chunk, or of the last whole one.
    """
    first, last, c = config.margin_left, length - config.margin_right, config.num_chunks
    spread, early = (
        [min(last, first + int((i + 0.7) * step)) for i in range(c)]
        for step in ((last - first) / c, 1.0)
    )
    chunk = getattr(architecture.mixer, "chunk_size", length)
    if not first < chunk <= last:
        return [spread, early]
    ends = chunk - 1, last - last % chunk - 1
    return [spread, early, *(sorted([*early[1:], end]) for end in ends)]


def _cut_or_reconnect(cut: Cut | None, value: object) -> Cut:
    """The cut behind `value`, made when it is first handed on."""
    if cut is None:
        return Cut(value)
    cut.reconnect(value)
    return cut
