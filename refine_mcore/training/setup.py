"""From a run's configuration to what trains: its model, optimizer and engine."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from refine_kernels import dispatch

from refine_mcore import platform
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
from refine_mcore.training.checkpointing import (
    latest_checkpoint,
    load_main_weights,
    load_weights,
)
from refine_mcore.training.optimizer import build_optimizer, wrap_data_parallel
from refine_mcore.training.step import TrainStep

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


def with_one_checkpoint(config: Config) -> Config:
    """`config` with the newest iteration named where `model.checkpoint` is a run's checkpoint
    directory: the run may save the next one before the last rank has read this one.

    Every rank calls this. Raises UserError if there is no checkpoint.
    """
    given = config.model.checkpoint
    if given is None:
        return config
    found = platform.on_first_rank(lambda: find_checkpoint(Path(given)))
    return replace(config, model=replace(config.model, checkpoint=str(found)))


def resolve_architecture(config: Config, source: Path | None = None) -> Architecture:
    """The architecture a run asks for: its preset's or its checkpoint's, with the overrides on top.

    A run that goes on from `source` needs the checkpoint that it began from no more, and takes the
    architecture from `source` if nothing else says it.
    """
    model, overrides = config.model, config.model.overrides
    named = None if model.preset is None else preset(model.preset).with_overrides(overrides)
    holder = None if model.checkpoint is None else Path(model.checkpoint)
    if holder is None or (source is not None and not os.path.exists(holder)):
        if named is not None:
            return named
        holder = source
    if holder is None:
        raise UserError("model.preset or model.checkpoint must be given")
    stored = read_description(find_checkpoint(holder)).architecture.with_overrides(overrides)
    if named is not None and named != stored:
        raise UserError(
            f"model.preset {model.preset} is not the architecture of "
            f"model.checkpoint {model.checkpoint}"
        )
    return stored


def tape_interval(config: Config) -> int:
    """Tokens between the states that delta-rule layers keep: what branches read of a text is then
    an eighth of it on average, and what is kept grows with the branches."""
    if config.training.tape_interval is not None:
        return config.training.tape_interval
    spread = config.data.sequence_length / (4 * config.refine.num_chunks)
    return min(max(1, round(spread / KERNEL_CHUNK)), 8) * KERNEL_CHUNK


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


class Training(NamedTuple):
    """What trains a model, on this rank."""

    model: FastWeightModel
    wrapped: DistributedDataParallel
    optimizer: Any
    scheduler: OptimizerParamScheduler
    step: TrainStep


def build_training(config: Config, pg_collection: Any, source: Path | None = None) -> Training:
    """Of `training_model`, in a bfloat16 run with float32 main weights as exact as the checkpoint
    that it begins from. Every rank calls it."""
    model = training_model(config, pg_collection, source)
    wrapped = wrap_data_parallel(model, config.optimizer, pg_collection)
    optimizer, scheduler = build_optimizer(wrapped, config)
    begun_from = config.model.checkpoint
    if source is None and begun_from is not None and config.training.dtype == "bfloat16":
        load_main_weights(model, optimizer, Path(begun_from))
    engine = PipelineEngine(
        wrapped,
        pg_collection,
        slices=config.parallel.slices,
        recompute=config.training.recompute == "full",
        decode_graphs=config.training.decode_graphs,
        timeout_s=config.parallel.timeout,
    )
    step = TrainStep(wrapped, optimizer, config.refine, config.training.seed, pg_collection, engine)
    return Training(model, wrapped, optimizer, scheduler, step)
