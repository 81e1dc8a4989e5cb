"""ModuleSpecs of a fast-weight model: which module each place of each layer is built from.

The local spec uses Megatron's own torch layers and runs anywhere; the Transformer Engine spec swaps
in its parallel linears and norm and needs a GPU machine that has it. A family is one entry of
`_MIXERS`.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from refine_mcore.errors import UserError
from refine_mcore.models.architecture import (
    DeltaNetOptions,
    GatedDeltaNetOptions,
    LaCTOptions,
)
from refine_mcore.models.attention import SelfAttention
from refine_mcore.models.delta_net import DeltaNet
from refine_mcore.models.fast_weight_block import FastWeightLayer, FastWeightLayerSubmodules
from refine_mcore.models.gated_delta_net import GatedDeltaNet
from refine_mcore.models.lact import LaCT
from refine_mcore.models.mixer import Mixer, MixerSubmodules
from refine_mcore.models.parallel_layers import RMSNorm, SwiGLU
from refine_mcore.models.transformer_config import FastWeightConfig

_MIXERS: dict[str, type[Mixer]] = {
    DeltaNetOptions.family: DeltaNet,
    GatedDeltaNetOptions.family: GatedDeltaNet,
    LaCTOptions.family: LaCT,
}


def block_spec(
    config: FastWeightConfig, *, pipeline_rank: int, transformer_engine: bool = False
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm. Raises UserError if Transformer Engine
    is asked for but absent."""
    backend, norm = _backend(transformer_engine)
    start = get_transformer_layer_offset(config, None, pipeline_rank)
    count = _layers_of_stage(config, pipeline_rank)
    specs = [_layer_spec(index, config, backend, norm) for index in range(start, start + count)]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_spec(
    index: int, config: FastWeightConfig, backend: LocalSpecProvider, norm: type
) -> ModuleSpec:
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    attention = config.arch.is_attention_layer(index)
    mixer = SelfAttention if attention else _MIXERS[config.arch.family]
    post_norm = index in config.arch.post_norm_layers
    before, after = (IdentityOp, norm) if post_norm else (norm, IdentityOp)
    return ModuleSpec(
        module=FastWeightLayer,
        submodules=FastWeightLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(module=mixer, submodules=MixerSubmodules(column, row)),
            self_attn_bda=get_bias_dropout_add,
            post_self_attn_layernorm=after,
            pre_mlp_layernorm=before,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column, activation_func=SwiGLU, linear_fc2=row),
            ),
            mlp_bda=get_bias_dropout_add,
            post_mlp_layernorm=after,
        ),
    )


def _backend(transformer_engine: bool) -> tuple[LocalSpecProvider, type]:
    if not transformer_engine:
        return LocalSpecProvider(), RMSNorm
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise UserError(
            "model.transformer_engine is set but Transformer Engine is not installed: "
            "install it or unset the option"
        )
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider(), TENorm


def _layers_of_stage(config: FastWeightConfig, pipeline_rank: int) -> int:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    return get_num_layers_to_build(config, None, pipeline_rank)
