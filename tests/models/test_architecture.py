"""Descriptions of models: published sizes, parameters by checkpoint name, impossible sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from refine_mcore.conversion import checkpoint_shapes, hf_parameter_map
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
)
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset, preset_names
from refine_mcore.models.sharding import sharded_tensors
from refine_mcore.models.transformer_config import (
    check_layout,
    padded_vocab_size,
    transformer_config,
)
from tests.models.zoo import ARCHITECTURES, NAMES

LACT = LaCTOptions(num_attention_heads=4, num_fast_heads=2, chunk_size=4, window_size=6)
PARAMETERS = {
    "deltanet-1.3b": 1_365_677_056,
    "gated-deltanet-1.3b": 1_387_348_732,
    "lact-760m": 797_625_312,
}


def _hybrid_parameters(
    width: int,
    mlp: int,
    heads: tuple[int, int, int],
    linear: tuple[int, int, int, int],
    vocab: int,
    embeddings: int,
    q_per_head: int,
    qk_gains: int,
    layers: int,
) -> int:
    """Parameters of a published hybrid, counted from its table: (heads, kv heads, width) of
    attention in every fourth layer, (key heads, value heads, key width, value width) elsewhere."""
    queries, kv, dim = heads
    key_heads, value_heads, key, value = linear
    qk, v = key_heads * key, value_heads * value
    attention = width * dim * (q_per_head * queries + 2 * kv + queries) + qk_gains
    recurrent = width * (2 * qk + 2 * v + 2 * value_heads) + v * width  # q, k; v, z; a, b; out
    recurrent += 4 * (2 * qk + v) + 2 * value_heads + value  # convolutions, A_log, dt_bias, norm
    shell = 3 * width * mlp + 2 * width
    return (
        layers * shell
        + layers // 4 * (attention + 3 * recurrent)
        + embeddings * vocab * width
        + width
    )


def _qwen_parameters(
    layers: int, width: int, mlp: int, heads: int, kv: int, value_heads: int, embeddings: int
) -> int:
    linear = (16, value_heads, 128, 128)
    return _hybrid_parameters(
        width, mlp, (heads, kv, 256), linear, 248_320, embeddings, 2, 2 * 256, layers
    )


PARAMETERS |= {
    "qwen3.5-0.8b": _qwen_parameters(24, 1024, 3584, 8, 2, 16, 1),
    "qwen3.5-2b": _qwen_parameters(24, 2048, 6144, 8, 2, 16, 1),
    "qwen3.5-4b": _qwen_parameters(32, 2560, 9216, 16, 4, 32, 1),
    "qwen3.5-9b": _qwen_parameters(32, 4096, 12288, 16, 4, 32, 2),
    "olmo-hybrid-7b": _hybrid_parameters(
        3840, 11008, (30, 30, 128), (30, 30, 96, 192), 100_352, 2, 1, 2 * 3840, 32
    ),
}


@pytest.mark.parametrize("name", preset_names())
def test_presets_build(name: str, process_groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, put there by saying that it is the current CUDA device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    model = build_model(transformer_config(preset(name)), process_groups)
    assert all(p.is_meta for p in model.parameters())
    parameters = sum(tensor.data.numel() for tensor in sharded_tensors(model))
    assert parameters == PARAMETERS.get(name, parameters)
    assert Architecture.from_dict(preset(name).to_dict()) == preset(name)


def test_an_unknown_preset_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="unknown model preset 'lact-1b', known: .*lact-760m"):
        preset("lact-1b")


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_checkpoint_format(name: str, process_groups: Any) -> None:
    """Keys and shapes that conversion writes, each filled by `initialize`, the same every time."""
    model = build_model(transformer_config(ARCHITECTURES[name]), process_groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, seed=1)
    shards = {shard.key: shard for shard in sharded_tensors(model)}
    shapes = {key: tuple(shard.global_shape) for key, shard in shards.items()}
    assert shapes == checkpoint_shapes(hf_parameter_map(ARCHITECTURES[name]))
    first = {key: shard.data.clone() for key, shard in shards.items()}
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    initialize(model, seed=1)
    assert all(torch.equal(shard.data, first[key]) for key, shard in shards.items())
    initialize(model, seed=2)
    embedding = "embedding.word_embeddings.weight"
    assert not torch.equal(shards[embedding].data, first[embedding])


def test_vocabulary_padding_does_not_change_the_draw(process_groups: Any) -> None:
    """A configuration for two tensor-parallel ranks, built on one, pads 61 tokens to 62."""
    arch = preset("tiny-deltanet").with_overrides({"hidden_size": 20, "intermediate_size": 8})
    drawn = []
    for ranks in (1, 2):
        model = build_model(transformer_config(arch, tensor_parallel=ranks), process_groups)
        initialize(model, seed=1)
        drawn.append({shard.key: shard.data for shard in sharded_tensors(model)})
    for key, plain in drawn[0].items():
        padded = drawn[1][key]
        assert torch.equal(padded[: len(plain)], plain)
        assert len(padded) == {61: 62}.get(len(plain), len(plain))
        assert not padded[len(plain) :].any()


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_survive_json(name: str) -> None:
    architecture = ARCHITECTURES[name]
    data = architecture.to_dict()
    assert Architecture.from_dict(data) == architecture
    if architecture.attention is not None:
        data["attention"]["layers"] = list(architecture.attention.layers)
        assert Architecture.from_dict(data) == architecture


def test_overrides_reach_nested_fields() -> None:
    changed = preset("tiny-lact").with_overrides({"mixer.chunk_size": 16, "norm_eps": 1e-5})
    assert isinstance(changed.mixer, LaCTOptions)
    assert (changed.mixer.chunk_size, changed.norm_eps) == (16, 1e-5)
    assert changed.mixer.window_size == 6


OVERRIDES = {
    "mixer.chunk": "model override 'mixer.chunk': no such field of a lact model, known: chunk_size",
    "mixers.chunk_size": "model override 'mixers.chunk_size': 'mixers' holds no fields",
    "attention.layers": "model override 'attention.layers': 'attention' holds no fields",
    "mixer.chunk_size": "chunk_size must be a positive whole number, got 0",
}


@pytest.mark.parametrize("dotted", OVERRIDES)
def test_bad_overrides(dotted: str) -> None:
    with pytest.raises(UserError, match=OVERRIDES[dotted]):
        preset("tiny-lact").with_overrides({dotted: 0})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"family": "mamba"}, "unknown model family 'mamba', known: delta_net, gated_"),
        (
            {"family": "delta_net", "mixer": {"heads": 2}},
            "unknown model field mixer.heads, known: ",
        ),
        ({"family": "delta_net", "mixer": 3}, "model field mixer must hold named fields"),
        ({"family": "delta_net", "mixer": {}}, "incomplete model .*mixer.*num_heads"),
        (
            {"family": "delta_net", "mixer": {"num_heads": 2}},
            "incomplete model .*architecture.*hidden_size",
        ),
    ],
)
def test_bad_descriptions(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Architecture.from_dict(data)


@pytest.mark.parametrize(
    ("mixer", "attention", "message"),
    [
        (DeltaNetOptions(3), None, "hidden_size / num_heads must be a positive whole .* 5.33"),
        (DeltaNetOptions(0), None, "num_heads must be a positive whole number, got 0"),
        (
            DeltaNetOptions(2, qk_activation="relu"),
            None,
            "must be one of silu, identity, got 'relu'",
        ),
        (
            GatedDeltaNetOptions(2, 6, num_value_heads=3),
            None,
            "num_heads 2 does not divide num_value",
        ),
        (
            GatedDeltaNetOptions(2, 5, expand_v=1.5),
            None,
            "expand_v must be a positive whole number",
        ),
        (
            replace(LACT, num_attention_heads=3),
            None,
            "attention_heads 3 does not divide hidden_size 16",
        ),
        (replace(LACT, num_attention_heads=16), None, "attention head dimension 1 is odd"),
        (replace(LACT, num_fast_heads=5), None, "fast_heads 5 does not divide hidden_size 16"),
        (replace(LACT, window_size=0), None, "window_size must be a positive whole .* got 0"),
        (replace(LACT, low_rank=0), None, "low_rank must be a positive whole number, got 0"),
        (replace(LACT, muon_dtype="int8"), None, "muon_dtype must be one of float32, bfloat16"),
        (DeltaNetOptions(2), AttentionOptions((2,), 4), "attention layer 2 does not exist"),
        (DeltaNetOptions(2), AttentionOptions((0,), 5), "num_heads 5 does not divide hidden_size"),
        (DeltaNetOptions(2), AttentionOptions((0,), 4, 3), "num_kv_heads 3 does not divide"),
        (
            DeltaNetOptions(2),
            AttentionOptions((0,), 4, window_size=-1),
            "window_size must be a positive",
        ),
        (DeltaNetOptions(2), AttentionOptions((0,), 16), "attention head dimension 1 is odd"),
    ],
)
def test_sizes_that_cannot_work(mixer: Any, attention: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Architecture(23, 16, 2, 24, mixer, attention)


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "message"),
    [
        ("tiny-lact", 3, 1, "parallel.tensor 3 does not divide .*; sizes that work: 1, 2$"),
        ("tiny-deltanet", 4, 1, "head count of 2; sizes that work: 1, 2$"),
        ("gated-deltanet-1.3b", 4, 1, "head count of 6; sizes that work: 1, 2$"),
        ("olmo-hybrid-7b", 3, 1, "MLP width of 11008; sizes that work: 1, 2$"),
        ("qwen3.5-2b", 16, 1, "hybrid attention head count of 8; sizes that work: 1, 2, 4, 8$"),
        ("tiny-lact", 1, 3, "parallel.pipeline 3 is more than the model's 2 layers: use at most 2"),
    ],
)
def test_layouts_that_cannot_work(name: str, tensor: int, pipeline: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(preset(name), tensor, pipeline)


def test_layouts_of_a_hybrid_respect_its_key_value_heads() -> None:
    """They divide over the ranks, or each is shared by equally many, who hold equal parts of it."""
    mixer = GatedDeltaNetOptions(12, head_dim=2)

    def check(kv_heads: int, head_dim: int, ranks: int) -> None:
        attention = AttentionOptions((0,), 12, kv_heads, kv_channels=head_dim)
        check_layout(Architecture(23, 16, 2, 24, mixer, attention), ranks, 1)

    for kv_heads, head_dim, ranks in [(4, 2, 2), (2, 2, 4), (1, 4, 4), (2, 6, 12), (3, 2, 3)]:
        check(kv_heads, head_dim, ranks)
    for kv_heads, head_dim, ranks, fitting in [
        (3, 2, 2, "1, 3, 6"),  # neither divides the other
        (2, 2, 12, "1, 2, 4"),  # six ranks to a head of two dimensions
        (4, 2, 6, "1, 2, 4"),
    ]:
        words = f"hybrid key/value head count of {kv_heads}; sizes that work: {fitting}$"
        with pytest.raises(UserError, match=words):
            check(kv_heads, head_dim, ranks)


def test_vocabulary_is_padded_to_the_tensor_parallel_size() -> None:
    assert [padded_vocab_size(preset("tiny-lact"), n) for n in (1, 2, 4)] == [61, 62, 64]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("tie_embeddings", 1, "tie_embeddings must be true or false, got 1"),
        ("mixer.use_muon", "no", "mixer.use_muon must be true or false, got 'no'"),
        ("mixer.chunk_size", 8.0, "mixer.chunk_size must be a whole number, got 8.0"),
        ("norm_eps", "small", "norm_eps must be a number, got 'small'"),
        ("mixer.low_rank", "4", "mixer.low_rank must be a whole number or null, got '4'"),
    ],
)
def test_fields_of_the_wrong_type_are_refused(field: str, value: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        preset("tiny-lact").with_overrides({field: value})


def test_spelled_numbers_serve_as_floats() -> None:
    """YAML reads `1e-5` as text."""
    changed = preset("tiny-lact").with_overrides({"norm_eps": "1e-5", "mixer.rope_theta": 500})
    assert isinstance(changed.mixer, LaCTOptions)
    assert (changed.norm_eps, changed.mixer.rope_theta) == (1e-5, 500.0)
    assert isinstance(changed.mixer.rope_theta, float)
