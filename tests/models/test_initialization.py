"""Initial weights depend on the seed and the parameter's name alone, and follow the reference's
distributions. That layouts agree is tested with the training loop, on two ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.sharding import full_tensors
from refine_mcore.models.transformer_config import transformer_config

FAMILIES = ("tiny-deltanet", "tiny-gated-deltanet", "tiny-lact")
HYBRIDS = ("tiny-qwen3.5", "tiny-olmo-hybrid")
# Wide enough for a standard deviation to be estimated.
WIDE = {"hidden_size": 192, "intermediate_size": 128}


def weights(
    process_groups,
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    architecture = preset(name).with_overrides(overrides or {})
    model = build_model(transformer_config(architecture, dtype=dtype), process_groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # a parameter left out would show
    initialize(model, seed)
    return full_tensors(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_function_of_seed_and_name(process_groups, name: str) -> None:
    first = weights(process_groups, name)
    torch.manual_seed(99)  # the global generator has no part in it
    again, other = weights(process_groups, name), weights(process_groups, name, seed=1)
    deeper = weights(process_groups, name, overrides={"num_layers": 3})
    for key, weight in first.items():
        assert weight.isfinite().all(), key
        assert torch.equal(weight, again[key])
        assert torch.equal(weight, deeper[key])
        assert torch.equal(weight, other[key]) == (weight.unique().numel() == 1)
    drawn = [key for key, weight in deeper.items() if weight.unique().numel() > 1]
    for one, two in ((key.replace("layers.0", "layers.1"), key) for key in drawn if "s.0" in key):
        assert not torch.equal(deeper[one], deeper[two])


@pytest.mark.parametrize("name", [*FAMILIES, *HYBRIDS])
def test_weights_in_another_dtype_are_the_same_rounded(process_groups, name: str) -> None:
    exact = weights(process_groups, name)
    rounded = weights(process_groups, name, dtype=torch.bfloat16)
    assert all(torch.equal(exact[key].to(rounded[key].dtype), rounded[key]) for key in exact)
    kept = {key for key, weight in rounded.items() if weight.dtype != torch.bfloat16}
    precise = ("A_log", "dt_bias", "norm.weight", ".bias", "qk_scale", "qk_offset")
    assert kept == {key for key in exact if key.endswith(precise)}


def std(weight: Tensor) -> float:
    assert abs(weight.mean()) < 0.2 * weight.std()
    return weight.std().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_projections_and_norms(process_groups, name: str) -> None:
    found = weights(process_groups, name, overrides=WIDE | {"initializer_range": 0.05})
    layer = "decoder.layers.1."
    projections = [f"{layer}self_attention.{p}_proj.weight" for p in "qkvo"]
    projections += [f"{layer}mlp.linear_fc1.weight", f"{layer}mlp.linear_fc2.weight"]
    projections += ["embedding.word_embeddings.weight", "output_layer.weight"]
    for key in projections:
        assert std(found[key]) == pytest.approx(0.05, rel=0.05), key
    norms = [key for key in found if key.endswith(("norm.weight", "layernorm.weight"))]
    assert len(norms) == 2 * 3 + 1
    assert all((found[key] == 1).all() for key in norms)
    biases = [key for key in found if key.endswith((".bias", "qk_offset"))]
    assert all((found[key] == 0).all() for key in biases)


@pytest.mark.parametrize("name", HYBRIDS)
def test_norms_begin_with_a_gain_of_one(process_groups, name: str) -> None:
    """What is stored is the gain, or what it is more than one."""
    zero_centered = preset(name).layernorm_zero_centered_gamma
    norms = {k: w for k, w in weights(process_groups, name).items() if k.endswith("norm.weight")}
    assert len(norms) == 4 * 2 + 3 + 2 + 1
    for key, weight in norms.items():
        assert (weight == (0 if zero_centered and "o_norm" not in key else 1)).all(), key


def test_decay_of_gated_delta_net(process_groups) -> None:
    """exp(A_log) is uniform on (0, 16), but at least 0.01; softplus(dt_bias) is log-uniform on
    (1e-3, 0.1)."""
    many_heads = {
        "num_layers": 1,
        "mixer.num_heads": 2,
        "mixer.num_value_heads": 4000,
        "mixer.head_dim": 1,
        "mixer.expand_v": 1.0,
    }
    found = weights(process_groups, "tiny-gated-deltanet", overrides=many_heads)
    prefix = "decoder.layers.0.self_attention."
    decay = found[f"{prefix}A_log"].exp()
    assert decay.min().item() == pytest.approx(0.01) and 15.9 < decay.max() <= 16
    assert decay.mean().item() == pytest.approx(8, rel=0.03)
    step = torch.nn.functional.softplus(found[f"{prefix}dt_bias"]).log10()
    assert -3.001 < step.min() < -2.98 and -1.02 < step.max() < -0.999
    assert step.mean().item() == pytest.approx(-2, abs=0.03)


def test_fast_weights_of_lact(process_groups) -> None:
    """Full: 1/sqrt(fan-in). Low rank: gain/sqrt(rank) and gain/sqrt(head width), gain 0.5."""
    prefix = "decoder.layers.0.self_attention."
    wide = WIDE | {"mixer.inter_multi": 2.0}
    full = weights(process_groups, "tiny-lact", overrides=wide | {"mixer.low_rank": None})
    assert full[f"{prefix}w0"].shape == full[f"{prefix}w2"].shape == (2, 192, 96)
    assert std(full[f"{prefix}w0"]) == pytest.approx(96**-0.5, rel=0.05)
    assert std(full[f"{prefix}w2"]) == pytest.approx(96**-0.5, rel=0.05)
    assert std(full[f"{prefix}w1"]) == pytest.approx(192**-0.5, rel=0.05)
    low = weights(process_groups, "tiny-lact", overrides=wide | {"mixer.low_rank": 16})
    for name in ("w0", "w2"):
        assert std(low[f"{prefix}{name}.w_left"]) == pytest.approx(0.5 / 16**0.5, rel=0.05)
        assert std(low[f"{prefix}{name}.w_right"]) == pytest.approx(0.5 / 96**0.5, rel=0.05)
    assert (low[f"{prefix}qk_scale"] == 1).all()
