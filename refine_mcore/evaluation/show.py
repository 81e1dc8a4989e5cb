"""A look at what the model does: a few rollouts beside the text they leave."""

from __future__ import annotations

from itertools import groupby

import torch

from refine_mcore.config import Config
from refine_mcore.data import Tokenizer
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.models.whole_model import whole_model
from refine_mcore.rollout.branches import Randomness
from refine_mcore.rollout.decode import decode
from refine_mcore.step.refine_loss import (
    TextBatch,
    choose_branches,
    text_pass,
)

_CONTEXT_TOKENS = 16
_SHOWN = 3
# Of a long text only the beginning is read, in one piece: the step may fit only in slices.
_MOST_TOKENS = 2048


@torch.no_grad()
def show_rollouts(
    model: FastWeightModel, text: TextBatch, tokenizer: Tokenizer, config: Config
) -> str:
    """Three rollouts of a batch of one text, at positions chosen as in training, as lines of text.
    Every rank of a pipeline calls it with its own stage and gets them all."""
    refine = config.refine
    most = max(_MOST_TOKENS, refine.margin_left + refine.margin_right)
    tokens, documents = text.tokens[:, :most], text.documents
    if documents is not None:
        documents = documents.part(0, tokens.shape[1])
    batch = TextBatch(tokens, text.mask[:, :most], text.sample_index, documents=documents)
    randomness = Randomness(config.training.seed, config.training.steps)
    whole = whole_model(model)
    out = text_pass(whole, batch, with_entropy=True, record=True)
    assert out.tape is not None
    chosen, _ = choose_branches(whole, out.entropy, batch, refine, randomness)
    branches = chosen.select(range(min(_SHOWN, len(chosen))))
    rollouts, _ = decode(
        whole,
        out.tape.at(branches.batch_index, branches.position),
        whole.logits(branches.rows_before(out.hidden)[:, None])[:, 0],
        refine.rollout_tokens,
        randomness.token_keys(batch.sample_index, branches, 1, refine.rollout_tokens),
        refine.rollout_temperature,
    )
    ids = batch.tokens[0].tolist()

    def words(tokens: list[int]) -> str:
        """With the numbers of those that are no pieces: a vocabulary may have rows beyond them."""
        parts = []
        for known, run in groupby(tokens, lambda token: token < tokenizer.vocab_size):
            some = list(run)
            parts.append(tokenizer.ids_to_text(some) if known else "".join(f"<{t}>" for t in some))
        return "".join(parts).replace("\n", "⏎")

    lines = []
    lengths = branches.length or [refine.rollout_tokens] * len(branches)
    for position, length, rollout in zip(
        branches.position, lengths, rollouts.tolist(), strict=True
    ):
        before = ids[max(0, position - _CONTEXT_TOKENS) : position]
        lines += [
            f"after {position} tokens: … {words(before)}",
            f"    rollout  {words(rollout[:length])}",
            f"    text     {words(ids[position : position + length])}",
        ]
    return "\n".join(lines)
