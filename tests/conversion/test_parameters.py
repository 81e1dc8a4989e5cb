"""The table of parameters: names, shapes and counts, and that it loses and doubles nothing."""

import json
from collections import defaultdict
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


@given(architectures())
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


@given(architectures())
def test_config_round_trip(architecture: Architecture) -> None:
    assert architecture_from_hf(hf_config(architecture), "config.json") == architecture


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
