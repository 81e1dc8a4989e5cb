"""From a run's configuration to its model and engine; refuses options that do not run together."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from refine_kernels import dispatch

from refine_mcore.config import Config
from refine_mcore.conversion.description import (
    HF_DIRECTORY,
    find_checkpoint,
    find_tokenizer,
    own_tokenizer,
    read_description,
)
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import FastWeightModel, build_model
from refine_mcore.models.initialization import initialize
from refine_mcore.models.presets import preset
from refine_mcore.models.transformer_config import KERNEL_CHUNK, transformer_config
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.training.checkpointing import latest_checkpoint, load_weights

DESCRIPTION = "description"  # of RUN: what its checkpoints carry beside their tensors


def training_source(config: Config) -> Path | None:
    """The training checkpoint to go on from: the run's own newest, else `checkpoint.load`; None for
    a run that begins.

    One rank calls this for all: a network file system may show each node another newest one.
    """
    own = latest_checkpoint(Path(config.run.directory) / "checkpoints")
    load = config.checkpoint.load
    return own or (None if load is None else find_checkpoint(Path(load)))


def with_own_tokenizer(config: Config) -> Config:
    """`config` with the tokenizer that the run or the checkpoint it begins from carries, if it
    names none and there is one."""
    begun_from = config.model.checkpoint
    if config.data.tokenizer is not None:
        return config
    found = find_tokenizer(Path(config.run.directory) / DESCRIPTION / HF_DIRECTORY)
    if found is None and begun_from is not None and os.path.exists(begun_from):
        found = own_tokenizer(Path(begun_from))
    if found is None:
        return config
    return replace(config, data=replace(config.data, tokenizer=str(found)))


def resolve_architecture(config: Config, source: Path | None = None) -> Architecture:
    """The architecture a run asks for: its preset's or its checkpoint's, with the overrides on top.

    A run that goes on from `source` needs the checkpoint that it began from no more, and takes the
    architecture from `source` if nothing else says it.
    """
    model = config.model
    overrides = dict(model.overrides)
    architecture = None
    if model.preset is not None:
        architecture = preset(model.preset).with_overrides(overrides)
    if model.checkpoint is not None and (source is None or os.path.exists(model.checkpoint)):
        stored = read_description(find_checkpoint(Path(model.checkpoint))).architecture
        stored = stored.with_overrides(overrides)
        if architecture is not None and architecture != stored:
            raise UserError(
                f"model.preset {model.preset} is not the architecture of "
                f"model.checkpoint {model.checkpoint}"
            )
        architecture = stored
    if architecture is None:
        if source is None:
            raise UserError("model.preset or model.checkpoint must be given")
        stored = read_description(find_checkpoint(source)).architecture
        architecture = stored.with_overrides(overrides)
    return architecture


def check_supported(config: Config) -> None:
    """Raise UserError for options that do not run together."""
    if config.refine.mode == "prefix_copy" and runs_in_slices(config):
        raise UserError(
            "refine.mode prefix_copy, the reference, runs on whole texts: it needs "
            "parallel.pipeline 1, parallel.slices 1 and no training.recompute full; all other "
            "modes take these"
        )


def runs_in_slices(config: Config) -> bool:
    """Whether a step is more than the plain case of one stage and one slice."""
    return (
        config.parallel.pipeline > 1
        or (config.parallel.slices or 1) > 1
        or config.training.recompute == "full"
    )


def tape_interval(config: Config) -> int:
    """Tokens between the states that delta-rule layers keep: what branches read of a text is then
    an eighth of it on average, and what is kept grows with the branches."""
    if config.training.tape_interval is not None:
        return config.training.tape_interval
    spread = config.data.sequence_length / (4 * config.refine.num_chunks)
    return min(max(1, round(spread / KERNEL_CHUNK)), 8) * KERNEL_CHUNK


def build_engine(
    config: Config, wrapped: DistributedDataParallel, pg_collection: Any
) -> PipelineEngine:
    """What runs the passes of a step. Every rank calls it."""
    return PipelineEngine(
        wrapped,
        pg_collection,
        slices=config.parallel.slices,
        recompute=config.training.recompute == "full",
        decode_graphs=config.training.decode_graphs,
        timeout_s=config.parallel.timeout,
    )


def training_model(
    config: Config, pg_collection: Any, source: Path | None = None
) -> FastWeightModel:
    """This rank's model, with the weights of `model.checkpoint` or drawn from `training.seed`; for
    a run that goes on from `source` without weights yet. Chooses the kernels of this process."""
    dispatch.use(**asdict(config.kernels))
    model = build_model(
        transformer_config(
            resolve_architecture(config, source),
            dtype=getattr(torch, config.training.dtype),
            tensor_parallel=config.parallel.tensor,
            pipeline_parallel=config.parallel.pipeline,
            layers_per_stage=config.parallel.layers_per_stage,
            sequence_parallel=config.parallel.sequence_parallel,
            tape_interval=tape_interval(config),
            fast_weight_matmul=config.model.fast_weight_matmul,
            selective_recompute=config.training.recompute == "selective",
        ),
        pg_collection,
        transformer_engine=config.model.transformer_engine,
    )
    if source is not None:
        return model
    if config.model.checkpoint is not None:
        load_weights(model, Path(config.model.checkpoint))
    else:
        initialize(model, config.training.seed)
    return model
