"""From a run's configuration to its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from refine_mcore import platform
from refine_mcore.config import Config
from refine_mcore.conversion.description import find_checkpoint, read_description
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import FastWeightModel, build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.training.checkpointing import load_weights
from refine_mcore.training.step import SLICED_MODES


def resolve_architecture(config: Config) -> Architecture:
    """The architecture a run asks for: its checkpoint's or its preset's, with the overrides on
    top."""
    model = config.model
    named = preset(model.preset) if model.preset is not None else None
    if model.checkpoint is not None:
        stored = read_description(find_checkpoint(Path(model.checkpoint))).architecture
        if named is not None and named != stored:
            raise UserError(
                f"model.preset {model.preset} is not the architecture of "
                f"model.checkpoint {model.checkpoint}"
            )
        named = stored
    assert named is not None, "validate() asks for a preset or a checkpoint"
    return named.with_overrides(dict(model.overrides))


def check_supported(config: Config) -> None:
    """Raise UserError for options that do not run together."""
    if runs_in_slices(config) and config.refine.mode not in SLICED_MODES:
        raise UserError(
            f"refine.mode {config.refine.mode} runs on whole texts: it needs parallel.pipeline 1, "
            "parallel.slices 1 and no training.recompute, or take refine.mode fused or ntp"
        )

    one_queue = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    if config.parallel.pipeline > 1 and one_queue and platform.backend() == "nccl":
        raise UserError(
            "a pipeline needs more than one hardware queue: unset CUDA_DEVICE_MAX_CONNECTIONS or "
            "set it to 32"
        )


def runs_in_slices(config: Config) -> bool:
    """Whether the pipeline engine runs the steps."""
    return (
        config.parallel.pipeline > 1
        or (config.parallel.slices or 1) > 1
        or config.training.recompute is not None
    )


def build_engine(
    config: Config, wrapped: DistributedDataParallel, pg_collection: Any
) -> PipelineEngine | None:
    """What runs a step in slices; None where it runs on whole texts. Every rank calls it."""
    if not runs_in_slices(config):
        return None
    return PipelineEngine(
        wrapped,
        pg_collection,
        slices=config.parallel.slices,
        recompute=config.training.recompute is not None,
        timeout_s=config.parallel.timeout,
    )


def training_model(config: Config, pg_collection: Any) -> FastWeightModel:
    """This rank's model, with the weights of `model.checkpoint` or drawn from `training.seed`."""
    model = build_model(
        transformer_config(
            resolve_architecture(config),
            dtype=getattr(torch, config.training.dtype),
            tensor_parallel=config.parallel.tensor,
            pipeline_parallel=config.parallel.pipeline,
            layers_per_stage=config.parallel.layers_per_stage,
            sequence_parallel=config.parallel.sequence_parallel,
            tape_interval=config.training.tape_interval,
        ),
        pg_collection,
        transformer_engine=config.model.transformer_engine,
    )
    if config.model.checkpoint is not None:
        load_weights(model, Path(config.model.checkpoint))
    else:
        initialize(model, config.training.seed)
    return model
