"""Checkpoints of Qwen3.5 and OLMo-Hybrid as people have them: other names and cuts of the same
tensors, tensors that no text pass uses, settings in nested places."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from refine_mcore.conversion import architecture_from_hf, checkpoint_shapes, hf_parameter_map
from refine_mcore.conversion.description import (
    copy_description,
    read_description,
    write_description,
)
from refine_mcore.conversion.hf_config import hf_config, settings_not_read
from refine_mcore.conversion.torch_dist import CheckpointReader
from refine_mcore.errors import UserError
from refine_mcore.models.presets import preset
from tests.conversion.helpers import (
    WEIGHTS,
    Tensors,
    change_weights,
    copy_model,
    files,
    refusal,
    shard,
    to_checkpoint,
    to_hf,
)


def contents(checkpoint: Path) -> Tensors:
    """Every tensor of a converted checkpoint."""
    reader, found = CheckpointReader(checkpoint), {}
    table = hf_parameter_map(read_description(checkpoint).architecture)
    for key, shape in checkpoint_shapes(table).items():
        found[key] = torch.empty(shape, dtype=reader.dtype(key))
        reader.read_rows(key, 0, found[key])
    return found


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def as_published(tensors: Tensors) -> Tensors:
    """OLMo-Hybrid with its class's names of norms, and q, k and v convolutions of their widths."""
    names = {
        ".attention_layer_norm.": ".input_layernorm.",
        ".feedforward_layer_norm.": ".post_attention_layernorm.",
    }
    found: Tensors = {}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    for layer in range(3):
        prefix = f"model.layers.{layer}.linear_attn."
        whole = torch.cat([tensors[f"{prefix}{n}_conv1d.weight"] for n in "qkv"])
        widths = [tensors[f"{prefix}{n}_proj.weight"].shape[0] for n in "qkv"]
        for n, part in zip("qkv", whole.split(widths), strict=True):
            found[f"{prefix}{n}_conv1d.weight"] = part.clone()
    return found


def test_either_names_and_cuts_of_olmo_hybrid(golden, tmp_path) -> None:
    saved = copy_model(golden, "olmo_hybrid", tmp_path / "saved")
    published = copy_model(golden, "olmo_hybrid", tmp_path / "published")
    change_weights(published, as_published)
    names = load_file(published / WEIGHTS)
    assert names["model.layers.0.linear_attn.k_conv1d.weight"].shape == (48, 1, 4)
    assert "model.layers.3.post_attention_layernorm.weight" in names

    one, two = (to_checkpoint(m, tmp_path / f"{m.name}-checkpoint") for m in (saved, published))

    assert same(contents(one), contents(two))
    assert files(to_hf(two, tmp_path / "exported")) == files(published)


def test_text_model_under_the_names_of_the_larger_one(golden, tmp_path) -> None:
    """As transformers saves what AutoModelForCausalLM read of a checkpoint with a vision tower."""
    plain = copy_model(golden, "qwen35_text", tmp_path / "plain")
    other = copy_model(golden, "qwen35_text", tmp_path / "other")
    change_weights(
        other,
        lambda ts: {re.sub(r"^model\.", "model.language_model.", k): t for k, t in ts.items()},
    )
    assert "model.language_model.embed_tokens.weight" in load_file(other / WEIGHTS)
    one, two = (to_checkpoint(m, tmp_path / f"{m.name}-checkpoint") for m in (plain, other))
    assert same(contents(one), contents(two))
    assert files(to_hf(two, tmp_path / "exported")) == files(other)


def test_settings_of_a_later_day_are_named(golden, tmp_path, capsys) -> None:
    """Which none of the reference configs has, nor one that is written here."""
    for path in golden.glob("*/*/config.json"):
        config = json.loads(path.read_text())
        assert settings_not_read(config) == []
        written = hf_config(architecture_from_hf(config, "config.json"), config["model_type"])
        assert settings_not_read(written) == []
        text = config.get("text_config", config)
        text |= {"logit_scale": 0.5, "norm_first": False, "fuse_more": True, "mlp_only_layers": []}
        assert settings_not_read(config) == ["logit_scale"]
    model = copy_model(golden, "qwen35_text", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"logit_scale": 0.5, "gates": [1]}
    (model / "config.json").write_text(json.dumps(config))
    to_checkpoint(model, tmp_path / "checkpoint")
    told = capsys.readouterr().err
    assert "config.json sets logit_scale, gates: not known here, and left out of account" in told


@pytest.mark.parametrize("sharded", [False, True])
def test_unused_tensors_of_any_dtype_travel(golden, tmp_path, capsys, sharded: bool) -> None:
    """They need not be numbers that a weight can be, and a saved run passes them on."""
    model = copy_model(golden, "qwen35_text", tmp_path / "model")
    extra = {
        "mtp.fc.weight": torch.full((3, 5), float("nan"), dtype=torch.bfloat16),
        "mtp.places": torch.arange(7),
        "mtp.flags": torch.tensor([True, False, True]),
        "mtp.nothing": torch.zeros(0, 4),
    }
    change_weights(model, lambda ts: ts | extra)
    if sharded:
        shard(model)
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    told = capsys.readouterr().err
    assert "4 tensors that no text pass uses travel untouched: " in told
    assert all(name in told for name in extra)
    assert not any("mtp" in key for key in contents(checkpoint))

    run = tmp_path / "run"
    run.mkdir()
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "architecture.json":
            (run / file.name).write_bytes(file.read_bytes())
    copy_description(checkpoint, run, read_description(checkpoint).architecture)
    assert files(to_hf(run, tmp_path / "exported")) == files(model)


def test_conversion_on_request_leaves_unused_tensors(golden, tmp_path) -> None:
    model = copy_model(golden, "qwen35_vl_tied", tmp_path / "model")
    original = load_file(model / WEIGHTS)
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    exported = to_hf(checkpoint, tmp_path / "exported", "--dtype", "bfloat16")
    found = load_file(exported / WEIGHTS)
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        text = name.startswith("model.language_model.")
        assert torch.equal(found[name], tensor.bfloat16() if text else tensor)
    config = json.loads((model / "config.json").read_text())
    assert json.loads((exported / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    again = to_hf(to_checkpoint(exported, tmp_path / "imported"), tmp_path / "again")
    assert files(again) == files(exported)


def test_dtype_is_told_where_the_text_model_tells_it(golden, tmp_path) -> None:
    """The text model loaded alone takes its own setting, and would round what was widened."""
    model = copy_model(golden, "qwen35_vl_tied", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    config["text_config"]["dtype"] = "bfloat16"
    (model / "config.json").write_text(json.dumps(config))
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    exported = to_hf(checkpoint, tmp_path / "exported", "--dtype", "float64")
    config["dtype"] = config["text_config"]["dtype"] = "float64"
    assert json.loads((exported / "config.json").read_text()) == config


def test_config_follows_a_changed_model_where_it_is_nested(golden, tmp_path, capsys) -> None:
    model = copy_model(golden, "qwen35_vl_tied", tmp_path / "model")
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    changed = {"norm_eps": 1e-5, "attention.rope_theta": 500.0}
    write_description(checkpoint, read_description(checkpoint).architecture.with_overrides(changed))
    capsys.readouterr()
    exported = to_hf(checkpoint, tmp_path / "exported")
    expected = json.loads((model / "config.json").read_text())
    expected["text_config"]["rms_norm_eps"] = 1e-5
    expected["text_config"]["rope_parameters"]["rope_theta"] = 500.0
    assert json.loads((exported / "config.json").read_text()) == expected
    settings = "text_config.rms_norm_eps, text_config.rope_parameters.rope_theta"
    assert f"config.json is changed in {settings}, as" in capsys.readouterr().err


def test_a_tensor_without_a_place_is_refused(golden, tmp_path) -> None:
    model = copy_model(golden, "olmo_hybrid", tmp_path / "model")
    change_weights(model, lambda ts: ts | {"mtp.fc.weight": torch.zeros(2, 2)})
    assert "holds mtp.fc.weight that" in refusal(to_checkpoint, model)


def test_convolutions_of_the_wrong_number_of_channels_are_refused(golden, tmp_path) -> None:
    model = copy_model(golden, "olmo_hybrid", tmp_path / "model")
    name = "model.layers.1.linear_attn.k_conv1d.weight"
    change_weights(model, lambda ts: ts | {name: ts[name][1:].clone()})
    message = refusal(to_checkpoint, model)
    assert "layers.1.linear_attn.q_conv1d.weight has shape [64, 1, 4], but" in message
    assert message.endswith("makes it [48, 1, 4]")


def test_the_tower_is_needed_in_the_checkpoint(golden, tmp_path) -> None:
    """Headers that name tensors which are not there: one sentence, and no output."""
    checkpoint = to_checkpoint(
        copy_model(golden, "qwen35_vl_tied", tmp_path / "model"), tmp_path / "checkpoint"
    )
    (checkpoint / "hf" / "untouched.safetensors").unlink()
    assert "describe different models" in refusal(to_hf, checkpoint)


def config_of(golden: Path, name: str, **settings: object) -> dict[str, Any]:
    config = json.loads((golden / "hybrids" / name / "config.json").read_text()) | settings
    return {key: value for key, value in config.items() if value is not ...}


def test_layers_by_interval(golden) -> None:
    """Files may give the distance between layers of attention, by default four."""
    for settings, layers in (
        ({"layer_types": ...}, (3,)),
        ({"layer_types": None, "full_attention_interval": 2}, (1, 3)),
    ):
        config = config_of(golden, "qwen35_text", **settings)
        attention = architecture_from_hf(config, "c").attention
        assert attention is not None and attention.layers == layers


def test_no_positions_where_the_published_olmo_hybrid_has_none(golden) -> None:
    rope = {"rope_type": "default", "rope_theta": None}
    architecture = architecture_from_hf(config_of(golden, "olmo_hybrid", rope_parameters=rope), "c")
    assert architecture.attention is not None and architecture.attention.rope_theta is None


def test_rotation_in_an_older_place(golden) -> None:
    config = config_of(golden, "qwen35_text")
    older = {k: v for k, v in config["rope_parameters"].items() if k != "rope_type"}
    old = config_of(golden, "qwen35_text", rope_parameters=..., **older)
    assert architecture_from_hf(old, "c") == architecture_from_hf(config, "c")

    older.pop("partial_rotary_factor")
    apart = config_of(golden, "qwen35_text", rope_parameters=older, partial_rotary_factor=0.5)
    attention = architecture_from_hf(apart, "c").attention
    assert attention is not None and attention.rotary_percent == 0.5
    inside = config_of(golden, "qwen35_text", partial_rotary_factor=0.5)  # counts no more
    assert architecture_from_hf(inside, "c") == architecture_from_hf(config, "c")

    parameters = {"rope_type": "default"}
    olmo = config_of(golden, "olmo_hybrid", rope_parameters=parameters, rope_theta=500.0)
    attention = architecture_from_hf(olmo, "c").attention
    assert attention is not None and attention.rope_theta == 500.0


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("qwen35_text", {"layer_types": ["linear_attention"]}, "layer_types has 1 entries, num_h"),
        ("qwen35_text", {"layer_types": ["mamba"] * 4}, "layer_types must be a list of linear_att"),
        ("qwen35_text", {"full_attention_interval": 0, "layer_types": None}, "must be positive"),
        ("qwen35_text", {"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ("qwen35_text", {"rope_parameters": [1]}, "rope_parameters must hold named settings"),
        (
            "qwen35_text",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_parameters: rope_type 'yarn' is not supported, only 'default'",
        ),
        (
            "qwen35_text",
            {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}},
            "rope_parameters.factor 8.0 is not supported",
        ),
        ("qwen35_text", {"attention_bias": True}, "attention_bias True is not supported"),
        ("qwen35_text", {"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid' is not supp"),
        ("qwen35_vl_tied", {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        ("qwen35_text", {"head_dim": ...}, "head_dim is missing"),
        (
            "qwen35_text",
            {"head_dim": 9, "rope_parameters": {"rope_theta": 1, "partial_rotary_factor": 1}},
            "dimension 9 is odd",
        ),
        ("qwen35_text", {"linear_key_head_dim": 0}, "linear_key_head_dim must be a positive whole"),
        ("qwen35_text", {"linear_num_value_heads": 3}, "does not divide linear_num_value_heads 3"),
        ("qwen35_text", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ("qwen35_vl_tied", {"text_config": None}, "text_config must hold named settings, got None"),
        ("olmo_hybrid", {"num_attention_heads": 7}, "does not divide hidden_size 60"),
        ("olmo_hybrid", {"rope_parameters": None}, "rope_parameters: rope_theta is missing"),
        ("olmo_hybrid", {"rope_parameters": ...}, "rope_parameters: rope_theta is missing"),
    ],
)
def test_refused(golden, name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        architecture_from_hf(config_of(golden, name, **settings), "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ")
    assert words in str(caught.value)


def test_published_settings_are_those_of_the_presets(golden) -> None:
    """The reference's config with the published sizes."""
    qwen = config_of(golden, "qwen35_vl_tied")
    qwen["text_config"] |= {
        **{"vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 24},
        **{"intermediate_size": 6144, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
        **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
        **{"layer_types": None, "initializer_range": 0.02},
    }
    assert architecture_from_hf(qwen, "c") == preset("qwen3.5-2b")
    olmo = config_of(
        golden,
        "olmo_hybrid",
        **{"vocab_size": 100352, "hidden_size": 3840, "num_hidden_layers": 32},
        **{"intermediate_size": 11008, "num_attention_heads": 30, "num_key_value_heads": 30},
        **{"linear_num_key_heads": 30, "linear_num_value_heads": 30, "layer_types": None},
        **{"linear_key_head_dim": 96, "linear_value_head_dim": 192},
        rope_parameters={"rope_type": "default", "rope_theta": None},
    )
    assert architecture_from_hf(olmo, "c") == preset("olmo-hybrid-7b")
