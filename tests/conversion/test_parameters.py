"""The table of parameters: names, shapes and counts, and that it loses and doubles nothing."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from refine_mcore.conversion import (
    architecture_from_hf,
    checkpoint_shapes,
    hf_config,
    hf_parameter_map,
    to_hf_tensors,
)
from refine_mcore.conversion.parameters import with_stored_cuts
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
)
from refine_mcore.models.presets import preset

FLAGS = st.booleans()


@st.composite
def hybrids(draw: st.DrawFn) -> Architecture:
    """As Qwen3.5 or OLMo-Hybrid, of any sizes."""
    heads, dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 4))
    value_dim, layers = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    attended = tuple(sorted(draw(st.sets(st.integers(0, layers - 1)))))
    mixer = GatedDeltaNetOptions(heads, dim, heads, expand_v=value_dim / dim)
    attention = AttentionOptions(attended, 2 * heads, heads)
    shell = Architecture(7, 12 * heads, layers, 5, mixer, attention, tie_embeddings=draw(FLAGS))
    if draw(FLAGS):
        return replace(
            shell,
            mixer=replace(mixer, norm_eps=1e-5, allow_neg_eigval=draw(FLAGS)),
            attention=replace(
                attention,
                rope_theta=draw(st.sampled_from([None, 500.0])),
                qk_layernorm="full_width",
            ),
            post_norm_layers=attended,
        )
    return replace(
        shell,
        mixer=replace(mixer, num_value_heads=heads * draw(st.integers(1, 2))),
        attention=replace(
            attention,
            kv_channels=8,
            rotary_percent=draw(st.sampled_from([0.25, 1.0])),
            qk_layernorm="per_head",
            attention_output_gate=True,
        ),
        layernorm_zero_centered_gamma=True,
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Any family with any options that shape the parameters."""
    heads = draw(st.integers(1, 3))
    hidden = 12 * draw(st.integers(1, 3))
    mixer = draw(
        st.one_of(
            st.builds(
                DeltaNetOptions,
                num_heads=st.just(heads),
                expand_v=st.sampled_from([1.0, 2.0]),
                use_short_conv=FLAGS,
                use_gate=FLAGS,
                use_beta=FLAGS,
            ),
            st.builds(
                GatedDeltaNetOptions,
                num_heads=st.just(heads),
                head_dim=st.integers(1, 4).map(lambda half: 2 * half),
                num_value_heads=st.sampled_from([None, 2 * heads]),
                expand_v=st.sampled_from([1.5, 2.0]),
                use_short_conv=FLAGS,
                use_gate=FLAGS,
            ),
            st.builds(
                LaCTOptions,
                num_attention_heads=st.just(heads),
                num_fast_heads=st.integers(1, 3),
                chunk_size=st.just(4),
                window_size=st.just(4),
                inter_multi=st.sampled_from([1.0, 1.5]),
                low_rank=st.sampled_from([None, 2]),
                use_momentum=FLAGS,
                use_muon=FLAGS,
                prenorm=FLAGS,
                qkv_bias=FLAGS,
                v_silu=FLAGS,
                fast_rope=FLAGS,
                qk_norm=FLAGS,
                learnable_scale=FLAGS,
            ),
        )
    )
    attention = AttentionOptions((1,), 2, num_kv_heads=1, qkv_bias=draw(FLAGS))
    hybrid = not isinstance(mixer, LaCTOptions) and draw(FLAGS)
    return Architecture(
        7, hidden, 2, 5, mixer, attention if hybrid else None, tie_embeddings=draw(FLAGS)
    )


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("deltanet-1.3b", 339, 1_365_677_056),
        ("lact-760m", 507, 797_625_312),
        ("gated-deltanet-1.3b", 381, 1_387_348_732),
    ],
)
def test_published_sizes(name: str, tensors: int, parameters: int) -> None:
    table = hf_parameter_map(preset(name))
    assert len(table) == tensors
    assert sum(prod(parameter.shape) for parameter in table) == parameters


def test_gated_delta_net_without_gate() -> None:
    full = preset("gated-deltanet-1.3b")
    table = hf_parameter_map(full.with_overrides({"mixer.use_gate": False}))
    assert len(table) == 360
    assert sum(prod(parameter.shape) for parameter in table) == 1_255_228_156


@given(architectures() | hybrids())
def test_every_checkpoint_row_belongs_to_one_parameter(architecture: Architecture) -> None:
    table = hf_parameter_map(architecture)
    assert len({parameter.name for parameter in table}) == len(table)
    rows: dict[str, list[int]] = defaultdict(list)
    for parameter in table:
        assert sum(part.rows for part in parameter.parts) == parameter.shape[0]
        for part in parameter.parts:
            rows[part.key] += range(part.start, part.start + part.rows)
    shapes = checkpoint_shapes(table)
    assert {key: sorted(found) for key, found in rows.items()} == {
        key: list(range(shape[0])) for key, shape in shapes.items()
    }


@given(architectures() | hybrids())
def test_config_round_trip(architecture: Architecture) -> None:
    assert architecture_from_hf(hf_config(architecture), "config.json") == architecture


@given(hybrids())
def test_config_of_a_wrapped_model(architecture: Architecture) -> None:
    if architecture.layernorm_zero_centered_gamma:
        config = hf_config(architecture, "qwen3_5")
        assert config["text_config"]["model_type"] == "qwen3_5_text"
        assert architecture_from_hf(config, "config.json") == architecture
    else:
        with pytest.raises(UserError, match="model_type qwen3_5 lacks some of this arch"):
            hf_config(architecture, "qwen3_5")


def test_an_architecture_that_no_config_describes() -> None:
    gated = AttentionOptions((0,), 2, attention_output_gate=True)
    architecture = replace(preset("tiny-deltanet"), attention=gated)
    with pytest.raises(UserError, match="no model_type has this architecture's options"):
        hf_config(architecture)
    assert "model.layers.0.attn.q_proj.weight" in {p.name for p in hf_parameter_map(architecture)}


@given(hybrids(), st.data())
def test_stacks_cut_elsewhere(architecture: Architecture, data: st.DataObject) -> None:
    """Files that cut q, k and v of the convolutions at other rows hold the same stack."""
    table = hf_parameter_map(architecture, "olmo_hybrid")
    stored = {p.name: p.shape for p in table}
    cut: dict[str, int] = {}
    for p in table:
        if p.stack is not None and p.name.endswith("q_conv1d.weight"):
            names = [p.name.replace("q_conv1d", f"{n}_conv1d") for n in "qkv"]
            total = sum(stored[name][0] for name in names)
            first = data.draw(st.integers(1, total - 2))
            second = data.draw(st.integers(1, total - first - 1))
            cut |= dict(zip(names, (first, second, total - first - second), strict=True))
    stored |= {name: (rows, *stored[name][1:]) for name, rows in cut.items()}
    tensors = {key: torch.randn(shape) for key, shape in checkpoint_shapes(table).items()}
    expected = to_hf_tensors(table, tensors)

    found = to_hf_tensors(with_stored_cuts(table, stored), tensors)

    assert {name: tuple(t.shape) for name, t in found.items()} == stored
    assert torch.equal(_stacked(found, cut), _stacked(expected, cut))


def _stacked(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> torch.Tensor:
    return torch.cat([torch.zeros(0, 1, 4), *(tensors[name] for name in names)])


def test_hf_tensors_by_name() -> None:
    """Packed, split and padded tensors come back under their HF names."""
    architecture = replace(preset("tiny-lact"), vocab_size=5)
    table = hf_parameter_map(architecture)
    tensors = {key: torch.randn(shape) for key, shape in checkpoint_shapes(table).items()}
    padding = torch.full((3, architecture.hidden_size), float("nan"))
    embedding = tensors["embedding.word_embeddings.weight"]
    tensors["embedding.word_embeddings.weight"] = torch.cat([embedding, padding])

    found = to_hf_tensors(table, tensors)

    assert {name: tuple(t.shape) for name, t in found.items()} == {p.name: p.shape for p in table}
    assert torch.equal(found["model.embeddings.weight"], embedding)
    layer = "decoder.layers.1.self_attention."
    qkv = [tensors[f"{layer}{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(found["model.layers.1.attn.qkv.weight"], torch.cat(qkv))
    gate, up = tensors["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    assert torch.equal(found["model.layers.0.mlp.gate_proj.weight"], gate)
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], up)
    momentum = tensors["decoder.layers.0.self_attention.momentum_proj.bias"]
    assert torch.equal(found["model.layers.0.attn.momentum_proj.0.bias"], momentum)


def test_gradients_of_the_reference_have_these_names(golden) -> None:
    """`gradnorm_a.NAME` of the fixtures lists the parameters of the reference model."""
    for directory in sorted((golden / "models").iterdir()):
        config = json.loads((directory / "config.json").read_text())
        table = hf_parameter_map(architecture_from_hf(config, "config.json"))
        outputs = load_file(directory / "outputs.safetensors")
        names = {name.removeprefix("gradnorm_a.") for name in outputs if "gradnorm_a" in name}
        assert {parameter.name for parameter in table} == names
