"""Generation against running the whole text again for every token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from refine_kernels.dispatch import combine_keys, sample_tokens

from refine_mcore.data import load_tokenizer
from refine_mcore.errors import UserError
from refine_mcore.generation import NotFiniteError, Sampling, TextStream, generate, response_text
from refine_mcore.generation.generate import _likeliest
from refine_mcore.models.fast_weight_model import FastWeightModel
from tests.models import zoo

LENGTHS = (11, 3, 20, 1, 11)
TOKENIZER = Path(__file__).parents[2] / "examples/data/tokenizer.model"


def prompts() -> list[list[int]]:
    return [zoo.random_tokens(1, n, seed=n + i)[0].tolist() for i, n in enumerate(LENGTHS)]


def again(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens, each from a forward over everything before it."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model.logits(model(torch.tensor([tokens])).hidden)[0, -1]
        tokens.append(int(logits[: zoo.VOCAB].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", zoo.NAMES)
@torch.no_grad()
def test_equals_running_the_text_again(
    name: str, model_of: Callable[[str], FastWeightModel]
) -> None:
    """Streams of unlike lengths together, whatever the slices."""
    with zoo.short_chunks():
        model = model_of(name)
        expected = [again(model, prompt, 7) for prompt in prompts()]
        for slice_length in (100, 8, 5):
            found = generate(model, prompts(), 7, slice_length=slice_length)
            assert found == expected


def test_streams_do_not_know_of_each_other(model_of: Callable[[str], FastWeightModel]) -> None:
    """Sampled tokens follow from seed and id alone, also when other streams have ended."""
    model, sampling = model_of("delta_net"), Sampling(temperature=1.5, top_p=0.9, seed=3)
    together = generate(model, prompts(), 6, sampling=sampling)
    ends = {together[0][1]}
    cut = [
        tokens[: tokens.index(x)] if (x := min(ends)) in tokens else tokens for tokens in together
    ]
    assert generate(model, prompts(), 6, sampling=sampling, end_tokens=ends) == cut
    order = [3, 1, 4, 0, 2]
    shuffled = generate(model, [prompts()[i] for i in order], 6, sampling=sampling, ids=order)
    assert shuffled == [together[i] for i in order]
    for i, prompt in enumerate(prompts()):
        assert generate(model, [prompt], 6, sampling=sampling, ids=[i]) == [together[i]]
    assert generate(model, prompts(), 6, sampling=Sampling(1.5, top_p=0.9, seed=4)) != together


def test_stops(model_of: Callable[[str], FastWeightModel]) -> None:
    model, heard = model_of("delta_net"), []
    (whole,) = generate(model, prompts()[:1], 9)
    (found,) = generate(
        model,
        prompts()[:1],
        9,
        stop=lambda tokens: len(tokens) == 4,
        on_token=lambda *x: heard.append(x),
    )
    assert found == whole[:4] and heard == [(0, token) for token in whole[:4]]
    assert generate(model, prompts(), 0) == [[] for _ in LENGTHS]


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.6), (3, 1.0), (4, 0.5), (0, 1e-9), (1, 1.0)])
def test_draws_from_the_likeliest(top_k: int, top_p: float) -> None:
    logits = torch.randn(50, 12, dtype=torch.float64)
    kept = _likeliest(logits.clone(), top_k, top_p)
    for row, left in zip(logits, kept, strict=True):
        ranked = sorted(range(12), key=lambda i: -row[i].item())[: top_k or 12]
        shares = row[ranked].softmax(-1).tolist()
        wanted = [i for n, i in enumerate(ranked) if sum(shares[:n]) < top_p]
        assert left.isfinite().nonzero().flatten().tolist() == sorted(wanted)
        assert torch.equal(left[wanted], row[wanted])
    drawn = sample_tokens(kept, combine_keys(1, torch.arange(50)))
    assert kept.gather(1, drawn[:, None]).isfinite().all()


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": -2}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_settings(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"must be (0 or more|above 0 and at most 1), not"):
        Sampling(**options)


def test_text_comes_as_it_is_certain() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    text = "A naïve 日本 reader,  and two blanks."
    tokens = tokenizer.text_to_ids(text)
    for split in range(1, len(tokens)):
        stream = TextStream(tokenizer, tokens[:split])
        pieces = [stream.add(token) for token in tokens[split:]]
        assert not any("�" in piece for piece in pieces)
        whole = response_text(tokenizer, tokens[:split], tokens[split:])
        if "�" not in tokenizer.ids_to_text(tokens[:split]):
            assert "".join(pieces) + stream.rest() == whole
            assert text.endswith(whole)


@pytest.fixture(scope="module")
def json_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bytes, and a special token, 256."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    made.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_what_is_no_text_is_left_out(kind: str, json_tokenizer: Path) -> None:
    """Special tokens, and rows of the vocabulary behind the last piece."""
    path, no_text = (TOKENIZER, (0, 1, 2)) if kind == "sentencepiece" else (json_tokenizer, (256,))
    tokenizer = load_tokenizer(path)
    prompt, said = tokenizer.text_to_ids("Where is it?"), tokenizer.text_to_ids(" In a house")
    for token in (*no_text, tokenizer.vocab_size, tokenizer.vocab_size + 300):
        tokens = [token, *said[:2], token, *said[2:], token]
        assert response_text(tokenizer, prompt, tokens) == response_text(tokenizer, prompt, said)
        stream = TextStream(tokenizer, prompt)
        pieces = "".join(stream.add(x) for x in tokens) + stream.rest()
        assert pieces == response_text(tokenizer, prompt, said)
    if kind == "json":
        assert response_text(tokenizer, prompt, [256], special_tokens=True) == "<end>"


def test_logits_that_are_not_finite_are_told_of(
    model_of: Callable[[str], FastWeightModel],
) -> None:
    model = model_of("delta_net")
    weight = model.output_layer.weight.data
    kept = weight[7].clone()
    for value in (torch.nan, torch.inf):
        weight[7] = value
        with pytest.raises(NotFiniteError, match="logits of token 1 of the answer are not finite"):
            generate(model, prompts(), 3)
    weight[7] = kept
    assert len(generate(model, prompts(), 3)[0]) == 3
