"""Where every Hugging Face parameter lives in a Megatron checkpoint, for both directions.

The table of an architecture lists each HF parameter with its shape and the rows of checkpoint
tensors that hold it. Beside names, the layouts differ in two places only: projections and
convolutions that are fused there are several tensors here, and gate and up projections are one.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from refine_mcore.conversion.hf_config import model_type_of
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
LM_HEAD = "lm_head.weight"
# A model trained with tensor parallelism may store more rows of these than the vocabulary has.
VOCABULARY_KEYS = (EMBEDDING_KEY, OUTPUT_KEY)
_PRE_NORMS = ("input_layernorm", "pre_mlp_layernorm")
_POST_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class Part:
    """`rows` rows of the checkpoint tensor `key`, from row `start` on."""

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class HFParameter:
    """An HF parameter: its parts, stacked along the first dimension, are the tensor.

    Files may have it under one of the `aliases`. Parameters of one `stack` are, one behind the
    other, one tensor of the model, which files may cut at other rows.
    """

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    aliases: tuple[str, ...] = ()
    stack: str | None = None


@dataclass(frozen=True)
class Names:
    """How an HF model type calls its parameters, where a checkpoint here has other names.

    `block` maps the checkpoint's names of norms to those in files, the preferred one first;
    `leaves` maps names inside a mixer, and `fused` those of tensors that are several here.
    """

    model: str = "model."
    model_alias: str | None = None  # files may begin their names with this instead
    embeddings: str = "embeddings.weight"
    mixer: str = "attn."
    attention: str = "attn."
    block: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    leaves: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stack: tuple[str, ...] = ()  # the leaves that are one tensor of the model
    untouched: tuple[str, ...] = ()  # how the names of tensors begin that no text pass uses


_FLA = Names(
    block={
        "input_layernorm": ("attn_norm",),
        "pre_mlp_layernorm": ("mlp_norm",),
        "post_self_attn_layernorm": ("attn_norm",),
        "post_mlp_layernorm": ("mlp_norm",),
    },
)
_LACT = replace(
    _FLA,
    leaves={f"momentum_proj.{leaf}": f"momentum_proj.0.{leaf}" for leaf in ("weight", "bias")},
    fused={
        f"qkv.{leaf}": tuple(f"{name}_proj.{leaf}" for name in "qkv") for leaf in ("weight", "bias")
    },
)
_CONVOLUTIONS = tuple(f"{name}_conv1d.weight" for name in "qkv")
_QWEN = Names(
    embeddings="embed_tokens.weight",
    mixer="linear_attn.",
    attention="self_attn.",
    block={
        "input_layernorm": ("input_layernorm",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
    },
    leaves={
        "a_proj.weight": "in_proj_a.weight",
        "b_proj.weight": "in_proj_b.weight",
        "g_proj.weight": "in_proj_z.weight",
        "o_norm.weight": "norm.weight",
        "o_proj.weight": "out_proj.weight",
    },
    fused={
        "in_proj_qkv.weight": tuple(f"{name}_proj.weight" for name in "qkv"),
        "conv1d.weight": _CONVOLUTIONS,
    },
    untouched=("model.visual.", "mtp."),
)
_NAMES = {
    "lact_swiglu": _LACT,
    # transformers saves a text model that it read from a larger one under the larger one's names
    "qwen3_5_text": replace(_QWEN, model_alias="model.language_model."),
    "qwen3_5": replace(_QWEN, model="model.language_model."),
    "olmo_hybrid": Names(
        embeddings="embed_tokens.weight",
        mixer="linear_attn.",
        attention="self_attn.",
        # the first names are those of published files; transformers saves a layer of attention's
        # first norm under the name that the other layers' second one has, and its class has names
        # of its own for these
        block={
            "input_layernorm": ("attention_layer_norm", "input_layernorm"),
            "pre_mlp_layernorm": ("feedforward_layer_norm", "post_attention_layernorm"),
            "post_self_attn_layernorm": ("post_attention_layernorm", "feedforward_layer_norm"),
            "post_mlp_layernorm": ("post_feedforward_layernorm",),
        },
        # one convolution in the class, which published files cut by the widths of q, k and v, and
        # transformers into three equal parts
        stack=_CONVOLUTIONS,
    ),
}


def names_of(model_type: str | None) -> Names:
    """The names of an HF model type; those of a model that no type holds are fla's."""
    return _NAMES.get(model_type or "", _FLA)


def hf_parameter_map(
    architecture: Architecture, model_type: str | None = None
) -> list[HFParameter]:
    """Every parameter of the HF model of `architecture`, each once, as its class has it.

    `model_type` says of which kind, if several can hold it. With tied embeddings there is no
    `lm_head.weight`, as in `model.named_parameters()`.
    """
    if isinstance(architecture.mixer, LaCTOptions):
        model_type = "lact_swiglu"  # also of one that no config can describe
    names = names_of(model_type or model_type_of(architecture))
    hidden, vocab = architecture.hidden_size, architecture.vocab_size
    table = [_whole(f"{names.model}{names.embeddings}", (vocab, hidden), EMBEDDING_KEY)]
    for index in range(architecture.num_layers):
        table += _layer(architecture, index, names)
    table.append(_whole(f"{names.model}norm.weight", (hidden,), "decoder.final_layernorm.weight"))
    if not architecture.tie_embeddings:
        table.append(_whole(LM_HEAD, (vocab, hidden), OUTPUT_KEY))
    return [_with_model_alias(parameter, names) for parameter in table]


def embeddings_name(table: Sequence[HFParameter]) -> str:
    """The HF name of the embeddings."""
    return next(p.name for p in table if p.parts[0].key == EMBEDDING_KEY)


def with_stored_names(table: Sequence[HFParameter], stored: Container[str]) -> list[HFParameter]:
    """The table with the names that files hold, where they know a parameter by another."""
    found = []
    for parameter in table:
        name = next((n for n in (parameter.name, *parameter.aliases) if n in stored), None)
        found.append(replace(parameter, name=name) if name else parameter)
    return found


def with_stored_cuts(
    table: Sequence[HFParameter], stored: Mapping[str, Shape]
) -> list[HFParameter]:
    """The table with its stacks cut where files of these shapes cut them."""
    stacks: dict[str, list[HFParameter]] = {}
    for parameter in table:
        if parameter.stack is not None:
            stacks.setdefault(parameter.stack, []).append(parameter)
    cut: dict[str, HFParameter] = {}
    for stack in stacks.values():
        shapes = [stored.get(p.name, ()) for p in stack]
        rows = [shape[0] if shape else 0 for shape in shapes]
        if sum(rows) == sum(p.shape[0] for p in stack) and all(rows):
            whole = [part for p in stack for part in p.parts]
            for p, count in zip(stack, rows, strict=True):
                parts, whole = _take_rows(whole, count)
                cut[p.name] = replace(p, shape=(count, *p.shape[1:]), parts=tuple(parts))
    return [cut.get(parameter.name, parameter) for parameter in table]


def _take_rows(parts: list[Part], rows: int) -> tuple[list[Part], list[Part]]:
    """The first `rows` rows, and the rest."""
    taken: list[Part] = []
    while rows:
        part, *parts = parts
        count = min(rows, part.rows)
        taken.append(replace(part, rows=count))
        if count < part.rows:
            parts = [Part(part.key, part.start + count, part.rows - count), *parts]
        rows -= count
    return taken, parts


def checkpoint_shapes(table: Sequence[HFParameter]) -> dict[str, Shape]:
    """Global shape of every checkpoint tensor of the model, without vocabulary padding."""
    shapes: dict[str, Shape] = {}
    for parameter in table:
        for part in parameter.parts:
            rows = shapes.get(part.key, (0,))[0]
            shapes[part.key] = (max(rows, part.start + part.rows), *parameter.shape[1:])
    return shapes


def to_hf_tensors(
    table: Sequence[HFParameter], tensors: Mapping[str, torch.Tensor]
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
        for parameter in table
    }


def _with_model_alias(parameter: HFParameter, names: Names) -> HFParameter:
    if names.model_alias is None or not parameter.name.startswith(names.model):
        return parameter
    known = (parameter.name, *parameter.aliases)
    others = (names.model_alias + name.removeprefix(names.model) for name in known)
    return replace(parameter, aliases=(*parameter.aliases, *others))


def _whole(name: str, shape: Shape, key: str) -> HFParameter:
    return HFParameter(name, shape, (Part(key, 0, shape[0]),))


def _layer(architecture: Architecture, index: int, names: Names) -> Iterator[HFParameter]:
    """The block: mixer or attention, SwiGLU MLP, and the norms before or after them."""
    hf, key = f"{names.model}layers.{index}.", f"decoder.layers.{index}."
    hidden, ffn = architecture.hidden_size, architecture.intermediate_size
    post = index in architecture.post_norm_layers
    norms = _POST_NORMS if post else _PRE_NORMS
    for norm in norms:
        name, *aliases = (f"{hf}{name}.weight" for name in names.block[norm])
        whole = _whole(name, (hidden,), f"{key}{norm}.weight")
        yield replace(whole, aliases=tuple(aliases))
    yield from _mixer(architecture, index, hf, f"{key}self_attention.", names)
    fc1 = f"{key}mlp.linear_fc1.weight"
    yield HFParameter(f"{hf}mlp.gate_proj.weight", (ffn, hidden), (Part(fc1, 0, ffn),))
    yield HFParameter(f"{hf}mlp.up_proj.weight", (ffn, hidden), (Part(fc1, ffn, ffn),))
    yield _whole(f"{hf}mlp.down_proj.weight", (hidden, ffn), f"{key}mlp.linear_fc2.weight")


def _mixer(
    architecture: Architecture, index: int, hf: str, key: str, names: Names
) -> Iterator[HFParameter]:
    """The parameters of what is called `self_attention.` here."""
    mixer, hidden = architecture.mixer, architecture.hidden_size
    if architecture.is_attention_layer(index):
        assert architecture.attention is not None
        for name, shape in _attention_shapes(architecture.attention, hidden).items():
            yield _whole(f"{hf}{names.attention}{name}", shape, key + name)
        return
    hf += names.mixer
    if isinstance(mixer, DeltaNetOptions):
        shapes = _delta_net_shapes(mixer, hidden)
    elif isinstance(mixer, GatedDeltaNetOptions):
        shapes = _gated_delta_net_shapes(mixer, hidden)
    else:
        shapes = _lact_shapes(mixer, hidden)
    for fused, leaves in names.fused.items():
        if leaves[0] in shapes:
            parts = tuple(Part(key + leaf, 0, shapes[leaf][0]) for leaf in leaves)
            rows = sum(part.rows for part in parts)
            yield HFParameter(hf + fused, (rows, *shapes[leaves[0]][1:]), parts)
            shapes = {name: shape for name, shape in shapes.items() if name not in leaves}
    for name, shape in shapes.items():
        stack = hf if name in names.stack else None
        yield replace(_whole(hf + names.leaves.get(name, name), shape, key + name), stack=stack)


def _attention_shapes(attention: AttentionOptions, hidden: int) -> dict[str, Shape]:
    dim = attention.head_dim(hidden)
    q_width, kv_width = attention.num_heads * dim, attention.kv_heads * dim
    gated = 2 if attention.attention_output_gate else 1
    widths = {"q_proj": gated * q_width, "k_proj": kv_width, "v_proj": kv_width}
    shapes: dict[str, Shape] = {}
    for name, width in widths.items():
        shapes[f"{name}.weight"] = (width, hidden)
        if attention.qkv_bias:
            shapes[f"{name}.bias"] = (width,)
    if attention.qk_layernorm != "none":
        per_head = attention.qk_layernorm == "per_head"
        shapes["q_norm.weight"] = (dim if per_head else q_width,)
        shapes["k_norm.weight"] = (dim if per_head else kv_width,)
    shapes["o_proj.weight"] = (hidden, q_width)
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
    shapes: dict[str, Shape] = {f"{name}_proj.weight": (hidden, hidden) for name in "qkv"}
    if mixer.qkv_bias:
        shapes |= {f"{name}_proj.bias": (hidden,) for name in "qkv"}
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
        shapes["momentum_proj.weight"] = (heads, hidden)
        shapes["momentum_proj.bias"] = (heads,)
    if mixer.learnable_scale:
        shapes["ttt_scale_proj.weight"] = (heads, hidden)
        shapes["ttt_scale_proj.bias"] = (heads,)
    shapes["ttt_norm.weight"] = (dim,)
    shapes["o_proj.weight"] = (hidden, hidden)
    return shapes
