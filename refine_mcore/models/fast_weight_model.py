"""The language model: embedding, fast-weight block, output layer, for one pipeline stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from refine_mcore.models.embedding import Embedding
from refine_mcore.models.fast_weight_block import FastWeightBlock
from refine_mcore.models.layer_specs import block_spec
from refine_mcore.models.output_layer import OutputLayer
from refine_mcore.models.packing import Documents, Packing
from refine_mcore.models.parallel_layers import mark_sharded_weights
from refine_mcore.models.state import FastWeightState, StateTape
from refine_mcore.models.token_layout import TokenLayout
from refine_mcore.models.transformer_config import FastWeightConfig, padded_vocab_size


@dataclass(frozen=True)
class ModelOutput:
    """hidden: on the last stage [R, T, h], after the final norm; before it [s, 1, h], what the
    next stage takes (models/token_layout.py).

    `states` (per layer, after the tokens) and `tape` (of this forward) only if asked for.
    """

    hidden: Tensor
    states: list[FastWeightState] | None = None
    tape: StateTape | None = None


class LanguageModel(Protocol):
    """What text passes and rollouts ask of a model: a `FastWeightModel` that is the only stage, or
    several stages together (models/whole_model.py)."""

    @property
    def config(self) -> FastWeightConfig: ...

    @property
    def tp_group(self) -> Any: ...

    def __call__(
        self,
        tokens: Tensor,
        states: Sequence[FastWeightState] | None = None,
        *,
        start: int = 0,
        documents: Documents | None = None,
        output_states: bool = False,
        record: bool = False,
    ) -> ModelOutput: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def log_probs_and_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        with_entropy: bool,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]: ...


class FastWeightModel(LanguageModule):
    """A fast-weight language model. Parameters are uninitialised until `initialize` or a checkpoint
    fills them.

    What the hidden states say of the next token is a separate step: `logits` for the few rows that
    a caller needs them of, `log_probs_and_entropy` for a text, whose logits are never all there.
    """

    def __init__(
        self,
        config: FastWeightConfig,
        pg_collection: Any,
        *,
        transformer_engine: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__(config, pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = config.arch.tie_embeddings
        self.vocab_size = padded_vocab_size(config.arch, config.tensor_model_parallel_size)
        if pre_process:
            self.embedding = Embedding(
                config,
                self.vocab_size,
                self.tp_group,
                is_output_weight=post_process and config.arch.tie_embeddings,
            )
        spec = block_spec(
            config, pipeline_rank=self.pp_group.rank(), transformer_engine=transformer_engine
        )
        self.decoder = FastWeightBlock(
            config,
            spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
        )
        if post_process:
            # its input is gathered before, so that callers can pick rows of it
            whole_sequence = copy.copy(config)
            whole_sequence.sequence_parallel = False
            self.output_layer = OutputLayer(
                config.hidden_size,
                self.vocab_size,
                config=whole_sequence,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and config.arch.tie_embeddings,
                tp_group=self.tp_group,
            )
        self.setup_embeddings_and_output_layer()
        mark_sharded_weights(self)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """The previous stage's output, as Megatron's schedules hand it over; none on the first."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def token_layout(self, streams: int, length: int) -> TokenLayout:
        """How `length` tokens of `streams` streams lie between this model's layers."""
        parts = self.tp_group.size() if self.config.sequence_parallel else 1
        return TokenLayout(streams, length, parts)

    def between_stages(self, streams: int, length: int) -> tuple[int, int, int]:
        """The shape [s, 1, h] of what one rank hands to the next stage, in `pipeline_dtype`."""
        tokens = self.token_layout(streams, length).local_tokens
        return tokens, 1, self.config.hidden_size

    def forward(
        self,
        tokens: Tensor,
        states: Sequence[FastWeightState] | None = None,
        *,
        start: int = 0,
        documents: Documents | None = None,
        output_states: bool = False,
        record: bool = False,
    ) -> ModelOutput:
        """Consume tokens [R, T] of R streams, from `states` if given.

        `record` asks for a tape of these T tokens; `start` is how many tokens the texts had
        consumed before them. Of texts that hold `documents` each of those begins without a past,
        and the states are those of the last ones. Stages past the first read of `tokens` its shape
        alone.
        """
        layout = self.token_layout(*tokens.shape)
        if documents is not None:
            packing = Packing(documents, output_states, tokens.device)
            layout = replace(layout, packing=packing)
        embedded = None
        if self.pre_process:
            embedded = self.embedding(layout.join(tokens).transpose(0, 1))
        out = self.decoder(embedded, layout, states, output_states=output_states, record=record)
        hidden, tape = out.hidden_states, None
        if self.post_process:
            if layout.parts > 1:
                hidden = tensor_parallel.gather_from_sequence_parallel_region(
                    hidden, tensor_parallel_output_grad=False, group=self.tp_group
                )
            hidden = layout.split(hidden)
        if out.tapes is not None:
            tape = StateTape(tuple(out.tapes), start, start + tokens.shape[1])
        return ModelOutput(hidden, out.states, tape)

    def fixed_states(
        self, states: Sequence[FastWeightState], tokens: int, rollouts: int
    ) -> list[FastWeightState] | None:
        """Of every layer its `fixed_state`; None if one has none for these streams."""
        layers: Any = self.decoder.layers
        fixed = []
        for layer, state in zip(layers, states, strict=True):
            found = layer.self_attention.fixed_state(state, tokens, rollouts)
            if found is None:
                return None
            fixed.append(found)
        return fixed

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits [R, T, V / tp] of final hidden states [R, T, h]; columns past the
        vocabulary are padding."""
        return self.output_layer(hidden, weight=self._tied_weight())[0]

    def log_probs_and_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        with_entropy: bool,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Of softmax(logits / temperature) of final hidden states [R, T, h], each of which emits
        one of the targets [R, T]: their log-probs [R, T] and, without a gradient, the entropies
        [R, T], in at least float32 and the same on all tensor-parallel ranks."""
        return self.output_layer(
            hidden,
            weight=self._tied_weight(),
            targets=targets,
            with_entropy=with_entropy,
            temperature=temperature,
        )

    def _tied_weight(self) -> Tensor | None:
        """The output weight where it is the embedding's."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Parameters only: the layers' `_extra_state` is empty without fp8, and a converted
        checkpoint has none."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: entry for key, entry in sharded.items() if not key.endswith("_extra_state")}


def build_model(
    config: FastWeightConfig, pg_collection: Any, *, transformer_engine: bool = False
) -> FastWeightModel:
    """This rank's stage of the model, with uninitialised parameters."""
    rank, stages = pg_collection.pp.rank(), pg_collection.pp.size()
    return FastWeightModel(
        config,
        pg_collection,
        transformer_engine=transformer_engine,
        pre_process=rank == 0,
        post_process=rank == stages - 1,
    )
