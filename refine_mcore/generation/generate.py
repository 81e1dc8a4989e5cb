"""Generation from fast-weight state. Nothing of a prompt is kept but the state: its memory does not
grow with the prompt, but for the keys and values of attention without a window.

Each prompt is read by itself, in slices, so that no padding ever touches a state. The streams are
then joined and go on together, one token at a time, and leave when they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from refine_kernels.dispatch import combine_keys, log_probs_and_entropy, sample_tokens
from torch import Tensor

from refine_mcore.errors import UserError
from refine_mcore.models.fast_weight_model import LanguageModel
from refine_mcore.models.state import FastWeightState
from refine_mcore.platform import device
from refine_mcore.rollout.vocabulary import vocabulary_options


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from softmax(logits / temperature) over the `top_k` likeliest tokens
    (0: all), and of these over the fewest that hold `top_p` of the probability. Temperature 0 takes
    the likeliest token. Draws depend on the seed, the stream's id and the token's number alone."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"a temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}")


class NotFiniteError(UserError):
    """The model gave no numbers to draw a token of prompt `stream` from."""

    def __init__(self, stream: int, number: int) -> None:
        super().__init__(f"the logits of token {number + 1} of the answer are not finite")
        self.stream = stream


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    ids: Sequence[int] | None = None,
    end_tokens: Collection[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    slice_length: int = 2048,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Token ids after each prompt, `max_new_tokens` at most.

    A stream ends with one of `end_tokens`, which is not handed out, or after the token with which
    `stop(its tokens so far)` is true. `ids` name the streams for the random draws (their places if
    None). `on_token(stream, token)` hears of every token as it comes. Every rank calls this with
    the same arguments and gets the same tokens. Prompts are not empty. Raises NotFiniteError, on
    every rank, for logits that are not finite.
    """
    states, logits = _read(model, prompts, slice_length)
    responses: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    names = torch.tensor(range(len(prompts)) if ids is None else ids, device=device())
    for number in range(max_new_tokens):
        keys = combine_keys(sampling.seed, names[going], number) if sampling.temperature else None
        drawn = draw(model, logits, keys, sampling)
        log_probs, _ = log_probs_and_entropy(
            logits, drawn, with_entropy=False, **vocabulary_options(model)
        )
        # the one wait of a token also tells of logits that are not finite
        tokens = drawn.where(log_probs.isfinite(), -1).tolist()
        on: list[int] = []  # rows of the streams that go on
        for row, (stream, token) in enumerate(zip(going, tokens, strict=True)):
            if token < 0:
                raise NotFiniteError(stream, number)
            if token in end_tokens:
                continue
            responses[stream].append(token)
            if on_token is not None:
                on_token(stream, token)
            if stop is None or not stop(responses[stream]):
                on.append(row)
        if not on or number == max_new_tokens - 1:
            break
        if len(on) < len(going):
            going = [going[row] for row in on]
            states = [state.select(on) for state in states]
            drawn = drawn[on]
        out = model(drawn[:, None], states, output_states=True)
        assert out.states is not None
        states, logits = list(out.states), model.logits(out.hidden)[:, 0]
    return responses


def _read(
    model: LanguageModel, prompts: Sequence[Sequence[int]], slice_length: int
) -> tuple[list[FastWeightState], Tensor]:
    """Per layer the states of all streams after their prompts, and the logits [R, V / tp] of what
    follows."""
    ends: list[tuple[list[FastWeightState], Tensor]] = []
    for prompt in prompts:
        tokens = torch.tensor([list(prompt)], device=device())
        states = None
        for start in range(0, tokens.shape[1], slice_length):
            piece = tokens[:, start : start + slice_length]
            out = model(piece, states, start=start, output_states=True)
            assert out.states is not None
            states, last = list(out.states), out.hidden[:, -1:]
        assert states is not None, "an empty prompt"
        ends.append((states, model.logits(last)[:, 0]))
    layers = zip(*(states for states, _ in ends), strict=True)
    joined = [layer[0] if len(layer) == 1 else layer[0].join(layer) for layer in layers]
    return joined, torch.cat([logits for _, logits in ends])


def draw(model: LanguageModel, logits: Tensor, keys: Tensor | None, sampling: Sampling) -> Tensor:
    """One token [R] for each row of logits [R, V / tp]; the draws follow from `keys` [R], without
    them it is the likeliest."""
    options = vocabulary_options(model)
    if keys is None:
        return sample_tokens(logits, None, **options)
    if sampling.top_k or sampling.top_p < 1:
        logits = gather_from_tensor_model_parallel_region(logits, group=model.tp_group)
        logits = logits[:, : options["vocab_size"]].float() / sampling.temperature
        return sample_tokens(_likeliest(logits, sampling.top_k, sampling.top_p), keys)
    return sample_tokens(logits, keys, temperature=sampling.temperature, **options)


def _likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [R, V] with -inf for what is not among the `top_k`, or past `top_p` of their
    probability."""
    ordered, token = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, token, ordered)
