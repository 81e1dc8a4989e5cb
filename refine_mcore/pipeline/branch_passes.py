"""The passes D and S of one micro-batch on one stage, and the backward of S: its rollouts, all
branches together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from refine_mcore.config import RefineConfig
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.state import FastWeightState
from refine_mcore.pipeline.cut import Root, run_backward
from refine_mcore.pipeline.head import Head
from refine_mcore.rollout.decode_passes import Decoder, Decoding


class BranchPasses:
    """From the states of all streams (rollouts of branches) on, with their gradients.

    The first stage reads tokens, the others the hidden states of the stage before. On the last one,
    which has the `head`, `prefix_hidden` [streams, h] emits the first tokens. On the first stage,
    `tokens` [streams, k] are those of stored rollouts, and `behind` [streams, m] the text tokens
    that are read behind new ones; the pass S reads `scored_tokens` of each stream.
    """

    def __init__(
        self,
        model: FastWeightModel,
        decoder: Decoder,
        head: Head | None,
        config: RefineConfig,
        scored_tokens: int,
        states: Sequence[FastWeightState],
        prefix_hidden: Tensor | None,
        tokens: Tensor | None,
        behind: Tensor | None = None,
    ) -> None:
        self._model, self._head, self._config = model, head, config
        self._scored_tokens = scored_tokens
        self._states, self._decoder = states, decoder
        self._decoding: Decoding | None = None
        self._prefix_hidden, self._behind = prefix_hidden, behind
        self._tokens: list[Tensor] = [] if tokens is None else [*tokens.unbind(1)]
        self._scored_input: Tensor | None = None
        self._scored: Root | None = None

    @property
    def tokens(self) -> Tensor | None:
        """[streams, k] of all rollouts that have been made, on the first stage."""
        return torch.stack(self._tokens, 1) if self._model.pre_process else None

    def draw_first_tokens(self) -> Tensor:
        """[streams], on the last stage."""
        assert self._prefix_hidden is not None
        return self._draw(self._prefix_hidden.detach())

    @torch.no_grad()
    def decode(self, message: Tensor | None) -> Tensor:
        """One more token: its hidden states for the next stage, or on the last the tokens drawn.

        The message is that of the pass; None on a stage that is all of the pipeline.
        """
        hidden = self._take(message)
        tokens = self._tokens[-1][:, None] if self._model.pre_process else self._unread(1)
        if self._decoding is None:
            passes, rollouts = self._config.rollout_tokens - 1, self._config.rollouts_per_position
            self._decoding = self._decoder.start(self._states, passes, rollouts)
        out = self._decoding.step(tokens, hidden)
        return out if self._head is None else self._draw(out[:, 0])

    def score(self, message: Tensor | None) -> Tensor | None:
        """All tokens at once and those behind them, if they are trained on with gradients: hidden
        states for the next stage. The last one makes the policy loss of them."""
        self._decoding = None
        hidden = self._take(message)
        self._scored_input = None if hidden is None else hidden.requires_grad_()
        tokens = self.tokens
        if tokens is not None and self._behind is not None:
            tokens = torch.cat([tokens, self._behind], dim=1)
        self._model.set_input_tensor(hidden)
        out = self._model(
            self._unread(self._scored_tokens) if tokens is None else tokens, self._states
        )
        output, gradient = out.hidden, None
        if self._head is not None:
            assert self._prefix_hidden is not None
            output = self._head.score(out.hidden, self._prefix_hidden)
            gradient = None if output is None else torch.ones_like(output)
        if output is not None and output.requires_grad:
            self._scored = get_gradient_edge(output), gradient
        return None if self._head is not None else out.hidden.detach()

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """Gradients of the states and of `prefix_hidden`, from that of what `score` handed on;
        returns that of its message."""
        assert self._scored is not None
        edge, own = self._scored
        run_backward([(edge, own if gradient is None else gradient)])
        return None if self._scored_input is None else self._scored_input.grad

    def _take(self, message: Tensor | None) -> Tensor | None:
        """Tokens are kept, hidden states returned."""
        if message is not None and self._model.pre_process:
            self._tokens.append(message)
            return None
        return message

    def _draw(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        tokens = self._head.draw(hidden)
        if self._model.pre_process:  # the only stage: they do not come back as a message
            self._tokens.append(tokens)
        return tokens

    def _unread(self, length: int) -> Tensor:
        """Stands for `length` tokens of every stream where only their number matters."""
        streams = self._states[0].num_streams
        return torch.empty(streams, length, dtype=torch.long, device="meta")
