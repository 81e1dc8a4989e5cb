"""Where every Hugging Face parameter lives in a Megatron checkpoint, for both directions.

The table of an architecture lists each HF parameter with its shape and the rows of checkpoint
tensors that hold it. The two layouts differ in three places only: LaCT's packed `qkv` is three
tensors here, gate and up projections are one, and a Sequential's index is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refine_mcore.models.architecture import (
    Architecture,
    AttentionOptions,
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
)

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

EMBEDDING_KEY = "embedding.word_embeddings.weight"
OUTPUT_KEY = "output_layer.weight"
# A model trained with tensor parallelism may store more rows of these than the vocabulary has.
VOCABULARY_KEYS = (EMBEDDING_KEY, OUTPUT_KEY)


@dataclass(frozen=True)
class Part:
    """`rows` rows of the checkpoint tensor `key`, from row `start` on."""

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class HFParameter:
    """An HF parameter: its parts, stacked along the first dimension, are the tensor."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]


def hf_parameter_map(architecture: Architecture) -> list[HFParameter]:
    """Every parameter of the HF model of `architecture`, each once.

    With tied embeddings there is no `lm_head.weight`, as in `model.named_parameters()`.
    """
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    table = [_whole("model.embeddings.weight", (vocab, hidden), EMBEDDING_KEY)]
    for index in range(architecture.num_layers):
        table += _layer(architecture, index)
    table.append(_whole("model.norm.weight", (hidden,), "decoder.final_layernorm.weight"))
    if not architecture.tie_embeddings:
        table.append(_whole("lm_head.weight", (vocab, hidden), OUTPUT_KEY))
    return table


def checkpoint_shapes(table: Sequence[HFParameter]) -> dict[str, Shape]:
    """Global shape of every checkpoint tensor of the model, without vocabulary padding."""
    shapes: dict[str, Shape] = {}
    for parameter in table:
        for part in parameter.parts:
            rows = shapes.get(part.key, (0,))[0]
            shapes[part.key] = (max(rows, part.start + part.rows), *parameter.shape[1:])
    return shapes


def to_hf_tensors(
    architecture: Architecture, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Full tensors by checkpoint key -> tensors by HF name: parameters, or their gradients.

    Rows that pad the vocabulary are dropped. The results may be views of the input.
    """
    import torch  # here, so that the table itself stays free of it

    def rows(part: Part) -> torch.Tensor:
        return tensors[part.key].narrow(0, part.start, part.rows)

    return {
        parameter.name: torch.cat([rows(part) for part in parameter.parts])
        if len(parameter.parts) > 1
        else rows(parameter.parts[0])
        for parameter in hf_parameter_map(architecture)
    }


def _whole(name: str, shape: Shape, key: str) -> HFParameter:
    return HFParameter(name, shape, (Part(key, 0, shape[0]),))


def _layer(architecture: Architecture, index: int) -> Iterator[HFParameter]:
    """The block: input norm, mixer or attention, norm, SwiGLU MLP."""
    hf, key = f"model.layers.{index}.", f"decoder.layers.{index}."
    hidden, ffn = architecture.hidden_size, architecture.intermediate_size
    yield _whole(f"{hf}attn_norm.weight", (hidden,), f"{key}input_layernorm.weight")
    yield from _mixer(architecture, index, f"{hf}attn.", f"{key}self_attention.")
    yield _whole(f"{hf}mlp_norm.weight", (hidden,), f"{key}pre_mlp_layernorm.weight")
    fc1 = f"{key}mlp.linear_fc1.weight"
    yield HFParameter(f"{hf}mlp.gate_proj.weight", (ffn, hidden), (Part(fc1, 0, ffn),))
    yield HFParameter(f"{hf}mlp.up_proj.weight", (ffn, hidden), (Part(fc1, ffn, ffn),))
    yield _whole(f"{hf}mlp.down_proj.weight", (hidden, ffn), f"{key}mlp.linear_fc2.weight")


def _mixer(architecture: Architecture, index: int, hf: str, key: str) -> Iterator[HFParameter]:
    """The parameters inside `attn.`, which here is called `self_attention.`."""
    mixer, hidden = architecture.mixer, architecture.hidden_size
    if architecture.is_attention_layer(index):
        assert architecture.attention is not None
        shapes = _attention_shapes(architecture.attention, hidden)
    elif isinstance(mixer, DeltaNetOptions):
        shapes = _delta_net_shapes(mixer, hidden)
    elif isinstance(mixer, GatedDeltaNetOptions):
        shapes = _gated_delta_net_shapes(mixer, hidden)
    else:
        shapes = _lact_shapes(mixer, hidden)
    for name, shape in shapes.items():
        if name.startswith("qkv."):
            leaf = name.removeprefix("qkv.")
            parts = tuple(Part(f"{key}{which}_proj.{leaf}", 0, hidden) for which in "qkv")
            yield HFParameter(hf + name, shape, parts)
        else:
            yield _whole(hf + name, shape, key + name.replace("momentum_proj.0.", "momentum_proj."))


def _attention_shapes(attention: AttentionOptions, hidden: int) -> dict[str, Shape]:
    kv_width = attention.kv_heads * (hidden // attention.num_heads)
    widths = {"q_proj": hidden, "k_proj": kv_width, "v_proj": kv_width}
    shapes: dict[str, Shape] = {}
    for name, width in widths.items():
        shapes[f"{name}.weight"] = (width, hidden)
        if attention.qkv_bias:
            shapes[f"{name}.bias"] = (width,)
    shapes["o_proj.weight"] = (hidden, hidden)
    return shapes


def _delta_net_shapes(mixer: DeltaNetOptions, hidden: int) -> dict[str, Shape]:
    value_dim = mixer.value_head_dim(hidden)
    key_width = mixer.num_heads * mixer.key_head_dim(hidden)
    value_width = mixer.num_heads * value_dim
    shapes = _delta_rule_shapes(mixer, hidden, key_width, value_width, value_dim)
    if mixer.use_beta:
        shapes["b_proj.weight"] = (mixer.num_heads, hidden)
    return shapes


def _gated_delta_net_shapes(mixer: GatedDeltaNetOptions, hidden: int) -> dict[str, Shape]:
    key_width = mixer.num_heads * mixer.head_dim
    value_width = mixer.value_heads * mixer.value_head_dim
    shapes = _delta_rule_shapes(mixer, hidden, key_width, value_width, mixer.value_head_dim)
    shapes["a_proj.weight"] = shapes["b_proj.weight"] = (mixer.value_heads, hidden)
    shapes["A_log"] = shapes["dt_bias"] = (mixer.value_heads,)
    return shapes


def _delta_rule_shapes(
    mixer: DeltaNetOptions | GatedDeltaNetOptions,
    hidden: int,
    key_width: int,
    value_width: int,
    value_dim: int,
) -> dict[str, Shape]:
    """What DeltaNet and GatedDeltaNet have in common."""
    widths = {"q": key_width, "k": key_width, "v": value_width}
    shapes: dict[str, Shape] = {f"{n}_proj.weight": (w, hidden) for n, w in widths.items()}
    if mixer.use_short_conv:
        shapes |= {f"{n}_conv1d.weight": (w, 1, mixer.conv_size) for n, w in widths.items()}
    if mixer.use_gate:
        shapes["g_proj.weight"] = (value_width, hidden)
    shapes["o_norm.weight"] = (value_dim,)
    shapes["o_proj.weight"] = (hidden, value_width)
    return shapes


def _lact_shapes(mixer: LaCTOptions, hidden: int) -> dict[str, Shape]:
    heads, dim = mixer.num_fast_heads, mixer.fast_head_dim(hidden)
    inner, rank = mixer.fast_hidden_dim(hidden), mixer.low_rank
    shapes: dict[str, Shape] = {"qkv.weight": (3 * hidden, hidden)}
    if mixer.qkv_bias:
        shapes["qkv.bias"] = (3 * hidden,)
    if mixer.qk_norm:
        shapes["q_norm.weight"] = shapes["k_norm.weight"] = (hidden,)
    shapes["qk_scale"] = shapes["qk_offset"] = (hidden, 2)
    for name in ("w0", "w2"):
        if rank is None:
            shapes[name] = (heads, inner, dim)
        else:
            shapes[f"{name}.w_left"] = (heads, inner, rank)
            shapes[f"{name}.w_right"] = (heads, rank, dim)
    shapes["w1"] = (heads, dim, inner)
    shapes["lr_proj.weight"], shapes["lr_proj.bias"] = (3 * heads, hidden), (3 * heads,)
    if mixer.use_momentum:
        shapes["momentum_proj.0.weight"] = (heads, hidden)
        shapes["momentum_proj.0.bias"] = (heads,)
    if mixer.learnable_scale:
        shapes["ttt_scale_proj.weight"] = (heads, hidden)
        shapes["ttt_scale_proj.bias"] = (heads,)
    shapes["ttt_norm.weight"] = (dim,)
    shapes["o_proj.weight"] = (hidden, hidden)
    return shapes
