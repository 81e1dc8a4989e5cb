"""LaCT's mixer: what it keeps for the backward, what it builds once, in which precision it
multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refine_kernels.lact.naive import naive_lact
from torch import Tensor

from refine_mcore.benchmark.memory import describe, saved_tensors
from refine_mcore.config import config_from_dict
from refine_mcore.errors import UserError
from refine_mcore.models.fast_weight_model import FastWeightModel, build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.lact import LaCT
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.training.setup import training_model
from tests.kernels.test_lact import product_dtypes
from tests.models.zoo import make_model, random_tokens

TOKENS = 1024


@pytest.fixture(scope="module")
def mixers(process_groups) -> Callable[..., LaCT]:
    """LaCT mixers of two fast heads of 96, chunks and a window of 256."""

    def build(dtype: torch.dtype, **mixer: Any) -> LaCT:
        overrides = {f"mixer.{name}": value for name, value in mixer.items()}
        architecture = preset("demo-lact").with_overrides({"num_layers": 1, **overrides})
        model = build_model(transformer_config(architecture, dtype=dtype), process_groups)
        initialize(model, seed=0)
        return model.decoder.layers[0].self_attention

    return build


def packed_tokens(mixer: LaCT, dtype: torch.dtype, tokens: int = TOKENS) -> Tensor:
    """Packed projections of one text."""
    width = sum(mixer.in_proj.widths)
    return torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"prenorm": True, "use_muon": False}])
def test_what_is_kept_for_the_backward(mixers, options: dict[str, Any]) -> None:
    """In widths of 192 channels in bfloat16: packed projections 3, rotated q and k 2, attention 1,
    fast q, k, v 3, the read 1, what the branches add up to 1; with qk_norm 2 more.
    Besides, the fast weights and momentum of each chunk, and the steps of Newton-Schulz, three
    matrices each, between the gradient and what it adds."""
    mixer = mixers(torch.bfloat16, **options)
    tokens = packed_tokens(mixer, torch.bfloat16)
    saved = saved_tensors(lambda: mixer.mix(tokens, None, False, False), mixer.parameters())
    widths = (14 if "qk_norm" in options else 12) * 192 * 2
    matrices = 6 if "use_muon" in options else 6 + 3 * (5 * 3 + 2)
    chunks = matrices * 2 * 96 * 96 * 4 // 256
    small = 1024  # masks, rotary tables, rates: per text, not per token
    total = sum(one.bytes for one in saved)
    assert total <= (widths + chunks + small) * TOKENS, describe(saved)


def test_a_pass_behind_a_state_builds_no_initial_weights(
    model_of: Callable[[str], FastWeightModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("lact")
    states = model(random_tokens(1, 9), output_states=True).states
    monkeypatch.delattr(LaCT, "initial_weights")
    assert model(random_tokens(1, 5), states, start=9).hidden.shape[0] == 1


@pytest.mark.parametrize(
    "setting,dtype,expected",
    [
        (None, "bfloat16", torch.bfloat16),
        (None, "float32", torch.float32),
        ("bfloat16", "float32", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),
        ("tf32", "bfloat16", torch.float32),
    ],
)
def test_the_setting_says_what_the_chunks_multiply(
    process_groups, setting: str | None, dtype: str, expected: torch.dtype
) -> None:
    settings = {
        "model": {"preset": "tiny-lact", "fast_weight_matmul": setting},
        "training": {"dtype": dtype},
    }
    config = config_from_dict(settings, "this test")
    mixer = training_model(config, process_groups).decoder.layers[0].self_attention
    assert isinstance(mixer, LaCT)
    tokens = packed_tokens(mixer, getattr(torch, dtype), 20)
    found = product_dtypes(lambda: _both_passes(mixer, tokens), of_tokens=8)
    assert found == {expected}


def _both_passes(mixer: LaCT, tokens: Tensor) -> None:
    mixer.mix(tokens, None, False, False).hidden_states.float().sum().backward()


def test_the_setting_needs_a_model_that_has_such_products() -> None:
    with pytest.raises(UserError, match="model.fast_weight_matmul tf32 needs a LaCT model"):
        transformer_config(preset("tiny-deltanet"), fast_weight_matmul="tf32")


def test_prenorm_reads_the_first_chunk_as_published(process_groups, monkeypatch) -> None:
    """With the initial weights as they are, by the definition, which the normalisation of later
    chunks would change by its eps; logits of several chunks."""
    model = make_model("lact-prenorm-qk_norm", process_groups)
    tokens = random_tokens(2, 22)
    logits = model.logits(model(tokens).hidden)

    def by_definition(*args: Any, precision: Any, **options: Any) -> Any:
        return naive_lact(*args, **options)

    monkeypatch.setattr("refine_mcore.models.lact.chunk_lact", by_definition)
    expected = model.logits(model(tokens).hidden)
    assert (logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("length", [1, 4, 5, 9])
@pytest.mark.parametrize("name", ["lact", "lact-muon-plain"])
def test_every_weight_has_a_gradient(name: str, length: int, process_groups) -> None:
    """Which overlapped gradient reduction waits for; before a chunk of 4 is full nothing uses the
    rates."""
    model = make_model(name, process_groups)
    tokens = random_tokens(2, length)
    model.logits(model(tokens).hidden).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    rates = [p.grad for name, p in model.named_parameters() if "lr_proj" in name]
    assert rates and all(bool(grad.any()) == (length > 4) for grad in rates)
