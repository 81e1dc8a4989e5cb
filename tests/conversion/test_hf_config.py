"""Reading config.json: every setting arrives, and what cannot be honoured is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from refine_mcore.conversion import architecture_from_hf
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import LaCTOptions

REMOVED = object()


def config_of(golden: Path, name: str, **settings: object) -> dict[str, Any]:
    config = json.loads((golden / "models" / name / "config.json").read_text()) | settings
    return {key: value for key, value in config.items() if value is not REMOVED}


def test_every_lact_setting_arrives(golden) -> None:
    settings = {
        "num_attn_heads": 8,
        "num_lact_heads": 4,
        "lact_chunk_size": 32,
        "window_size": 20,
        "inter_multi": 2,
        "rope_theta": 500,
        "w0_w2_low_rank": 3,
        "use_momentum": True,
        "use_muon": True,
        "ttt_prenorm": True,
        "qkv_bias": True,
        "qkv_silu": False,
        "no_v_silu": True,
        "attn_qk_norm": True,
        "ttt_nope": True,
        "learnable_ttt_scale": False,
        "fw_init_gain": 0.25,
    }
    architecture = architecture_from_hf(config_of(golden, "lact_full_muon", **settings), "c")
    assert architecture.mixer == LaCTOptions(
        num_attention_heads=8,
        num_fast_heads=4,
        chunk_size=32,
        window_size=20,
        inter_multi=2.0,
        rope_theta=500.0,
        low_rank=3,
        use_momentum=True,
        use_muon=True,
        prenorm=True,
        qkv_bias=True,
        qkv_silu=False,
        v_silu=False,
        qk_norm=True,
        fast_rope=False,
        learnable_scale=False,
        init_gain=0.25,
    )


def test_hybrid_layers(golden) -> None:
    attention = architecture_from_hf(config_of(golden, "deltanet_hybrid"), "c").attention
    assert attention is not None
    assert (attention.layers, attention.kv_heads, attention.window_size) == ((0, 2), 2, 24)


@pytest.mark.parametrize("hidden, width", [(1536, 4096), (2048, 5632), (3072, 8192)])
def test_width_of_the_mlp_when_not_given(golden, hidden: int, width: int) -> None:
    config = config_of(golden, "deltanet", hidden_size=hidden, intermediate_size=None)
    assert architecture_from_hf(config, "c").intermediate_size == width


def test_configs_from_before_a_setting_existed(golden) -> None:
    config = config_of(golden, "gated_deltanet")
    old = config_of(golden, "gated_deltanet", num_v_heads=REMOVED, allow_neg_eigval=REMOVED)
    assert architecture_from_hf(old, "c") == architecture_from_hf(config, "c")


@pytest.mark.parametrize(
    "model, settings, words",
    [
        ("deltanet", {"model_type": "llama"}, "unknown model_type 'llama', known: delta_net"),
        ("deltanet", {"model_type": ["delta_net"]}, "unknown model_type"),
        ("deltanet", {"hidden_size": REMOVED}, "hidden_size is missing"),
        ("deltanet", {"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ("deltanet", {"num_heads": True}, "num_heads must be a whole number"),
        ("deltanet", {"norm_eps": float("nan")}, "norm_eps nan is out of range"),
        ("deltanet", {"hidden_size": 10**400}, "hidden_size"),
        ("deltanet", {"num_heads": 3}, "num_heads"),
        ("deltanet", {"qk_norm": "sum"}, "qk_norm 'sum' is not supported, only 'l2'"),
        ("deltanet", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("deltanet", {"qk_activation": "relu"}, "qk_activation"),
        ("deltanet", {"attn": [0]}, "attn must be"),
        ("deltanet", {"attn": {"layers": [0]}}, "attn: num_heads is missing"),
        ("deltanet", {"attn": {"layers": 0, "num_heads": 2}}, "attn.layers"),
        ("deltanet", {"attn": {"layers": [7], "num_heads": 2}}, "attention layer 7"),
        (
            "deltanet",
            {"attn": {"layers": [0], "num_heads": 2, "qk_norm": True}},
            "attn.qk_norm True is not supported",
        ),
        ("deltanet", {"use_rope": True}, "use_rope True is not supported"),
        ("deltanet", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 is not supported"),
        ("deltanet", {"quantization_config": {"bits": 4}}, "it has a quantization_config, and"),
        ("gated_deltanet", {"expand_v": 1.27}, "head_dim * expand_v"),
        (
            "gated_deltanet",
            {"output_gate_activation": "sigmoid"},
            "output_gate_activation 'sigmoid' is not supported, only 'swish' or 'silu'",
        ),
        ("gated_deltanet", {"num_v_heads": 3}, "num_heads 2 does not divide num_v_heads 3"),
        ("lact_full_muon", {"use_muon": REMOVED}, "use_muon is missing"),
        ("lact_full_muon", {"num_attn_heads": 25}, "num_attn_heads 25 does not divide"),
        ("lact_full_muon", {"lr_dim": 2}, "lr_dim 2 is not supported, only 1"),
        ("lact_full_muon", {"ttt_loss_type": "mse"}, "ttt_loss_type 'mse' is not supported"),
        ("lact_full_muon", {"lr_parameterization": "x"}, "lr_parameterization 'x'"),
        ("lact_full_muon", {"elementwise_affine": False}, "elementwise_affine False"),
    ],
)
def test_refused(golden, model: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        architecture_from_hf(config_of(golden, model, **settings), "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert words in str(caught.value)
