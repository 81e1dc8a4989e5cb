"""Megatron's data parallelism, optimizer and learning-rate schedule, from a run's configuration."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from refine_mcore import compat
from refine_mcore.config import Config, OptimizerConfig
from refine_mcore.models.fast_weight_model import FastWeightModel


def wrap_data_parallel(
    model: FastWeightModel, config: OptimizerConfig, pg_collection: Any
) -> DistributedDataParallel:
    """Megatron's DDP around the model, gradients summed over ranks (the losses are global means
    already)."""
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=config.use_distributed_optimizer,
            # Micro-batches and ranks are summed in float32 where the weights are bfloat16.
            grad_reduce_in_fp32=model.config.params_dtype == torch.bfloat16,
            overlap_grad_reduce=config.overlap_grad_reduce,
            overlap_param_gather=config.overlap_param_gather,
        ),
        model,
        pg_collection=pg_collection,
    )
    if config.gradient_accumulation_fusion:
        compat.fuse_weight_gradients(model)
    return wrapped


def build_optimizer(
    model: DistributedDataParallel, config: Config
) -> tuple[Any, OptimizerParamScheduler]:
    """AdamW over fp32 main weights, and its schedule counted in batches."""
    options, dtype = config.optimizer, model.config.params_dtype
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=options.lr,
            min_lr=options.min_lr,
            adam_beta1=options.beta1,
            adam_beta2=options.beta2,
            adam_eps=options.eps,
            weight_decay=options.weight_decay,
            clip_grad=options.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=options.use_distributed_optimizer,
            overlap_param_gather=options.overlap_param_gather,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_steps,
        lr_decay_steps=options.lr_decay_steps or config.training.steps,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run follows its own configuration, not the one it was saved under.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
