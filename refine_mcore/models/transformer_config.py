"""`FastWeightConfig`: Megatron's `TransformerConfig` with an `Architecture` in it.

The architecture says what the model is; this joins it with how a run holds it (dtype, parallel
sizes) and checks that the two fit, in sentences that name the sizes that would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from refine_kernels.dispatch import Precision

from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture, DeltaNetOptions, LaCTOptions

_SHARED_HEADS = "hybrid key/value head count"
KERNEL_CHUNK = 64  # tokens the delta rules take at a time


@dataclass
class FastWeightConfig(TransformerConfig):
    """TransformerConfig of a fast-weight model; build it with `transformer_config`."""

    architecture: Architecture | None = None
    # Tokens between the states that a delta-rule layer's tape keeps, a multiple of the kernel's
    # chunk. A larger one keeps less memory alive and replays more tokens for a branch.
    tape_interval: int = 8 * KERNEL_CHUNK
    # Precision of LaCT's chunk products; None: the dtype of the activations.
    fast_weight_matmul: Precision | None = None
    # Make norms, gates, convolutions, rotations and activations again in the backward instead of
    # keeping them. Megatron's own selective recomputation frees the memory of outputs in place,
    # which tapes may still read, and refuses torch.autograd.grad.
    selective_recompute: bool = False

    @property
    def arch(self) -> Architecture:
        assert self.architecture is not None
        return self.architecture


def transformer_config(
    architecture: Architecture,
    *,
    dtype: torch.dtype = torch.float32,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    tape_interval: int = 8 * KERNEL_CHUNK,
    fast_weight_matmul: Precision | None = None,
    selective_recompute: bool = False,
) -> FastWeightConfig:
    """The Megatron configuration that runs `architecture` in `dtype` at the given layout.

    Losses and gradients are plain sums over the global batch, so per-token scaling is on. Raises
    UserError where a size does not divide.
    """
    check_layout(architecture, tensor_parallel, pipeline_parallel, layers_per_stage)
    if tape_interval % KERNEL_CHUNK:
        raise UserError(
            f"the tape interval of {tape_interval} tokens must be a multiple of {KERNEL_CHUNK}"
        )
    if fast_weight_matmul is not None and not isinstance(architecture.mixer, LaCTOptions):
        raise UserError(
            f"model.fast_weight_matmul {fast_weight_matmul} needs a LaCT model: "
            "others have no such products"
        )
    return FastWeightConfig(
        architecture=architecture,
        tape_interval=tape_interval,
        fast_weight_matmul=fast_weight_matmul,
        selective_recompute=selective_recompute,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        **_attention_sizes(architecture),
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        layernorm_zero_centered_gamma=architecture.layernorm_zero_centered_gamma,
        gated_linear_unit=True,
        activation_func=F.silu,
        # the MLP takes its activation from the spec (layer_specs.py), whoever made it
        use_te_activation_func=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        init_method_std=architecture.initializer_range,
        # weights are drawn or loaded by name after construction, the same at every layout
        # (initialization.py)
        perform_initialization=False,
        calculate_per_token_loss=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        pipeline_model_parallel_layout=_pipeline_layout(
            architecture.num_layers, pipeline_parallel, layers_per_stage
        ),
        sequence_parallel=sequence_parallel,
    )


def check_layout(
    architecture: Architecture,
    tensor_parallel: int,
    pipeline_parallel: int,
    layers_per_stage: Sequence[int] | None = None,
) -> None:
    """Raise UserError unless heads, MLP width and layers divide as the layout asks."""
    sharded = {"MLP width": architecture.intermediate_size, **_sharded_heads(architecture)}
    divided = {name: size for name, size in sharded.items() if name != _SHARED_HEADS}
    fitting = [
        ranks for ranks in _common_divisors(divided.values()) if _shares_heads(architecture, ranks)
    ]
    if tensor_parallel not in fitting:
        name, size = next(
            ((name, size) for name, size in divided.items() if size % tensor_parallel),
            (_SHARED_HEADS, sharded.get(_SHARED_HEADS)),
        )
        raise UserError(
            f"parallel.tensor {tensor_parallel} does not divide the model's {name} "
            f"of {size}; sizes that work: {', '.join(map(str, fitting))}"
        )
    if pipeline_parallel > architecture.num_layers:
        raise UserError(
            f"parallel.pipeline {pipeline_parallel} is more than the model's "
            f"{architecture.num_layers} layers: use at most {architecture.num_layers}"
        )
    if layers_per_stage is not None and sum(layers_per_stage) != architecture.num_layers:
        raise UserError(
            f"parallel.layers_per_stage {list(layers_per_stage)} adds up to "
            f"{sum(layers_per_stage)} layers, the model has {architecture.num_layers}"
        )


def _pipeline_layout(
    layers: int, stages: int, layers_per_stage: Sequence[int] | None
) -> list[list[str]] | None:
    """Megatron's description of what each stage holds. Layers are spread evenly, what is left over
    over the first stages: the last one has the output layer."""
    if stages == 1:
        return None
    even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
    layout = [["decoder"] * count for count in layers_per_stage or even]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def padded_vocab_size(architecture: Architecture, tensor_parallel: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size; the padding counts as
    -inf."""
    return -(-architecture.vocab_size // tensor_parallel) * tensor_parallel


def _attention_sizes(architecture: Architecture) -> dict[str, Any]:
    """What Megatron's configuration says of heads: those of the attention, or else the mixer's."""
    mixer, attention = architecture.mixer, architecture.attention
    if attention is not None:
        return {
            "num_attention_heads": attention.num_heads,
            "num_query_groups": attention.kv_heads,
            "kv_channels": attention.head_dim(architecture.hidden_size),
            "qk_layernorm": attention.qk_layernorm != "none",
            "attention_output_gate": attention.attention_output_gate,
        }
    heads = mixer.num_attention_heads if isinstance(mixer, LaCTOptions) else mixer.num_heads
    return {"num_attention_heads": heads, "kv_channels": architecture.hidden_size // heads}


def _sharded_heads(architecture: Architecture) -> dict[str, int]:
    mixer = architecture.mixer
    if isinstance(mixer, LaCTOptions):
        heads = {
            "attention head count": mixer.num_attention_heads,
            "fast-weight head count": mixer.num_fast_heads,
        }
    elif isinstance(mixer, DeltaNetOptions):
        heads = {"head count": mixer.num_heads}
    else:
        heads = {"head count": mixer.num_heads, "value head count": mixer.value_heads}
    if architecture.attention is not None:
        heads["hybrid attention head count"] = architecture.attention.num_heads
        heads[_SHARED_HEADS] = architecture.attention.kv_heads
    return heads


def _shares_heads(architecture: Architecture, ranks: int) -> bool:
    """True if `ranks` divide the key/value heads of the attention, or these divide them and several
    ranks share each, of which all hold an equal part of the weights."""
    attention = architecture.attention
    if attention is None or attention.kv_heads % ranks == 0:
        return True
    width = attention.kv_heads * attention.head_dim(architecture.hidden_size)
    return ranks % attention.kv_heads == 0 and width % ranks == 0


def _common_divisors(sizes: Iterable[int]) -> list[int]:
    values = list(sizes)
    return [n for n in range(1, min(values) + 1) if all(size % n == 0 for size in values)]
