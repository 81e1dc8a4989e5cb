"""What no single field can say: combinations of settings that cannot work."""

from __future__ import annotations

from refine_mcore.config.schema import Config, RefineConfig
from refine_mcore.errors import UserError


def validate(config: Config, source: str) -> None:
    """Raises UserError for the first impossible combination; `source` names the file."""
    for check in (
        *(_check_required, _check_batches, _check_schedule, _check_parallel, _check_refine),
        _check_evaluation,
    ):
        problem = check(config)
        if problem:
            raise UserError(f"{source}: {problem}")


def require_data(config: Config) -> None:
    """Raises UserError unless the configuration names files of texts and a tokenizer."""
    if not config.data.paths:
        raise UserError("data.paths must name at least one file")
    if config.data.tokenizer is None:
        raise UserError(
            "data.tokenizer must name the model's tokenizer, as model.checkpoint carries none"
        )


def data_parallel_layout(config: Config, world_size: int) -> tuple[int, int]:
    """(data-parallel size, micro-batches per rank and step) on `world_size` ranks.

    Raises UserError if the ranks do not fill whole model replicas or the batch does not divide over
    them.
    """
    parallel, training = config.parallel, config.training
    replica = parallel.tensor * parallel.pipeline
    if world_size % replica:
        raise UserError(
            f"{world_size} rank(s) cannot be shared by model replicas of parallel.tensor x "
            f"parallel.pipeline = {parallel.tensor} x {parallel.pipeline}: start a multiple of "
            f"{replica} ranks"
        )
    data_parallel = world_size // replica
    per_pass = training.micro_batch_size * data_parallel
    batches = {"training.global_batch_size": training.global_batch_size}
    if takes_mini_batches(config.refine) and config.refine.mini_batch_size is not None:
        batches["refine.mini_batch_size"] = config.refine.mini_batch_size
    for key, size in batches.items():
        if size % per_pass:
            raise UserError(
                f"{key} ({size}) must be a multiple of training.micro_batch_size x data-parallel "
                f"ranks ({training.micro_batch_size} x {data_parallel}), such as "
                f"{-(-size // per_pass) * per_pass}"
            )
    if config.refine.mode != "ntp":
        rollout_micro_batches(config.refine, list(batches.values())[-1] // per_pass)
    return data_parallel, training.global_batch_size // per_pass


def runs_in_slices(config: Config) -> bool:
    """Whether a step is more than the plain case of one stage and one slice."""
    return (
        config.parallel.pipeline > 1
        or (config.parallel.slices or 1) > 1
        or config.training.recompute == "full"
    )


def takes_mini_batches(config: RefineConfig) -> bool:
    """Whether runs of this mode take an optimizer step per mini-batch: `ntp` as the baseline of
    `two_phase`."""
    return config.mode in ("two_phase", "ntp")


def rollout_micro_batches(config: RefineConfig, micro_batches: int) -> int:
    """How many of the micro-batches that a rank has in an optimizer step roll out.

    Raises UserError unless `rollout_fraction` comes to a whole number of them: else which texts
    roll out would depend on the layout.
    """
    rolling = round(config.rollout_fraction * micro_batches)
    if rolling < 1 or abs(rolling - config.rollout_fraction * micro_batches) > 1e-6:
        raise UserError(
            f"refine.rollout_fraction ({config.rollout_fraction:g}) must come to whole "
            f"micro-batches: each rank has {micro_batches} in an optimizer step, so it takes "
            f"multiples of 1/{micro_batches}, such as {max(1, rolling) / micro_batches:g}"
        )
    return rolling


def _check_required(config: Config) -> str | None:
    model, load = config.model, config.checkpoint.load
    if model.preset is None and model.checkpoint is None and load is None:
        return "model.preset or model.checkpoint must be given"
    if config.checkpoint.keep_every is not None and config.checkpoint.keep_last is None:
        return "checkpoint.keep_every says what to keep beside checkpoint.keep_last, which is null"
    return None


def _check_batches(config: Config) -> str | None:
    training, mini = config.training, config.refine.mini_batch_size
    if training.global_batch_size % training.micro_batch_size:
        return (
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size})"
        )
    if not takes_mini_batches(config.refine) or mini is None:
        return None
    if training.global_batch_size % mini:
        return (
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"refine.mini_batch_size ({mini})"
        )
    if mini % training.micro_batch_size:
        return (
            f"refine.mini_batch_size ({mini}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size})"
        )
    return None


def _check_schedule(config: Config) -> str | None:
    optimizer, training = config.optimizer, config.training
    if training.equal_flops is not None and config.refine.mode != "ntp":
        return (
            f"training.equal_flops is of a baseline, of refine.mode ntp: the mode is "
            f"{config.refine.mode}"
        )
    if training.ntp_warmup_steps > training.steps:
        return (
            f"training.ntp_warmup_steps ({training.ntp_warmup_steps}) must not exceed "
            f"training.steps ({training.steps})"
        )
    if optimizer.min_lr > optimizer.lr:
        return (
            f"optimizer.min_lr ({optimizer.min_lr}) must not exceed optimizer.lr ({optimizer.lr})"
        )
    decay_key = "training.steps" if optimizer.lr_decay_steps is None else "optimizer.lr_decay_steps"
    decay_steps = optimizer.lr_decay_steps or training.steps
    if optimizer.lr_warmup_steps >= decay_steps:
        return (
            f"optimizer.lr_warmup_steps ({optimizer.lr_warmup_steps}) must be below "
            f"{decay_key} ({decay_steps})"
        )
    return None


def _check_parallel(config: Config) -> str | None:
    parallel, optimizer = config.parallel, config.optimizer
    if parallel.sequence_parallel and parallel.tensor == 1:
        return "parallel.sequence_parallel needs parallel.tensor of at least 2"
    split = parallel.layers_per_stage
    if split is not None and len(split) != parallel.pipeline:
        return (
            f"parallel.layers_per_stage names {len(split)} stages, "
            f"parallel.pipeline is {parallel.pipeline}"
        )
    if parallel.slices is not None and parallel.slices > config.data.sequence_length:
        return (
            f"parallel.slices ({parallel.slices}) exceeds "
            f"data.sequence_length ({config.data.sequence_length})"
        )
    if config.training.recompute == "full" and parallel.pipeline == 1 and parallel.slices == 1:
        return (
            "training.recompute full keeps the activations of one slice at a time: with "
            "parallel.pipeline 1 and parallel.slices 1 it would save nothing"
        )
    if config.refine.mode == "prefix_copy" and runs_in_slices(config):
        return (
            "refine.mode prefix_copy, the reference, runs on whole texts: it needs "
            "parallel.pipeline 1, parallel.slices 1 and no training.recompute full; all other "
            "modes take these"
        )
    if optimizer.overlap_param_gather and not (
        optimizer.use_distributed_optimizer and optimizer.overlap_grad_reduce
    ):
        return (
            "optimizer.overlap_param_gather needs optimizer.use_distributed_optimizer "
            "and optimizer.overlap_grad_reduce"
        )
    return None


def _check_refine(config: Config) -> str | None:
    refine, length = config.refine, config.data.sequence_length
    if refine.mode == "ntp":  # draws no positions
        return None
    if refine.margin_left + refine.margin_right > length:
        return (
            f"data.sequence_length ({length}) is shorter than refine.margin_left + "
            f"refine.margin_right ({refine.margin_left} + {refine.margin_right})"
        )
    if refine.num_chunks > length:
        return f"refine.num_chunks ({refine.num_chunks}) exceeds data.sequence_length ({length})"
    if refine.rollout_tokens > refine.margin_right:
        return (
            f"refine.rollout_tokens ({refine.rollout_tokens}) exceeds refine.margin_right "
            f"({refine.margin_right}), the fewest tokens that follow a position"
        )
    if refine.rollout_entropy is not None and refine.reward == "future":
        return (
            "refine.rollout_entropy makes rollouts of unlike lengths, and refine.reward future "
            "reads the text behind rollouts of one length"
        )
    if refine.rollout_tokens + refine.tokens_behind > refine.margin_right:
        return (
            f"refine.reward future reads refine.rollout_tokens + refine.future_tokens "
            f"({refine.rollout_tokens} + {refine.future_tokens}) tokens after a position, more "
            f"than refine.margin_right ({refine.margin_right}) leaves"
        )
    return None


def _check_evaluation(config: Config) -> str | None:
    evaluation = config.evaluation
    if evaluation.every and not evaluation.paths and evaluation.niah_length is None:
        return "evaluation.every needs evaluation.paths or evaluation.niah_length"
    return None
