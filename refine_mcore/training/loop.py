"""The training loop behind `examples/pretrain_refine.py`: next-token warm-up, then ReFINE steps,
with metrics and checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from refine_mcore import compat, platform
from refine_mcore.config import (
    TOKENS,
    Config,
    data_parallel_layout,
    prepare_run_directory,
    require_data,
    save_config,
)
from refine_mcore.data import (
    LongDocumentWindows,
    Tokenizer,
    batch_iterator,
    build_dataset,
    load_tokenizer,
)
from refine_mcore.errors import UserError
from refine_mcore.models.transformer_config import check_layout
from refine_mcore.pipeline.modes import parts_of_step
from refine_mcore.pipeline.plan import describe
from refine_mcore.step.metrics import ReducedMetrics
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.checkpointing import (
    CheckpointWriter,
    keep_description,
    latest_checkpoint,
    load_main_weights,
    load_training,
    on_first_rank,
)
from refine_mcore.training.metrics import MetricsWriter, StepMetrics, short_hash
from refine_mcore.training.optimizer import build_optimizer, wrap_data_parallel
from refine_mcore.training.progress import Progress, progress_of
from refine_mcore.training.setup import (
    build_engine,
    check_supported,
    resolve_architecture,
    runs_in_slices,
    training_model,
    training_source,
)
from refine_mcore.training.show import show_rollouts
from refine_mcore.training.step import TrainStep
from refine_mcore.training.stop import StopRequests

logger = logging.getLogger(__name__)

MANY_EPOCHS = 10  # more are said at the start


def train(config: Config) -> None:
    """Run the whole training described by `config` on the ranks that were started."""
    check_supported(config)
    require_data(config)
    if config.training.dtype == "float64" and config.optimizer.clip_grad:
        raise UserError(
            "training.dtype float64 needs optimizer.clip_grad 0: Megatron clips float32 gradients"
        )
    platform.initialize()
    # Ranks meet first: one that fails before would keep those of other nodes waiting for it.
    with platform.distributed(config.parallel.timeout):
        build_run(config).train()


def build_run(config: Config) -> _Run:
    """The run that `config` describes, before its next step, on ranks that have met."""
    source = on_first_rank(lambda: training_source(config))
    architecture = resolve_architecture(config, source)
    check_layout(
        architecture,
        config.parallel.tensor,
        config.parallel.pipeline,
        config.parallel.layers_per_stage,
    )
    _, num_micro_batches = data_parallel_layout(config, dist.get_world_size())
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    progress = on_first_rank(lambda: progress_of(config, source))
    run = on_first_rank(lambda: prepare_run_directory(config))
    dataset = build_dataset(config.data, tokenizer, architecture.vocab_size, run / TOKENS)
    return _Run(config, source, progress, dataset, tokenizer, num_micro_batches)


class _Run:
    def __init__(
        self,
        config: Config,
        source: Path | None,
        progress: Progress,
        dataset: LongDocumentWindows,
        tokenizer: Tokenizer,
        num_micro_batches: int,
    ) -> None:
        self.config, self.progress = config, progress
        self.dataset, self.tokenizer = dataset, tokenizer
        self.num_micro_batches = num_micro_batches
        self.first_rank = dist.get_rank() == 0
        self.directory = Path(config.run.directory)
        self.groups = platform.initialize_model_parallel(
            config.parallel.tensor, config.parallel.pipeline, config.training.seed
        )
        self.model = training_model(config, self.groups, source)
        self.wrapped = wrap_data_parallel(self.model, config.optimizer, self.groups)
        self.optimizer, self.scheduler = build_optimizer(
            self.wrapped, config, getattr(torch, config.training.dtype)
        )
        self.engine = build_engine(config, self.wrapped, self.groups)
        self._begin() if source is None else self._go_on(source)
        start = config.model.checkpoint
        origin = source or (None if start is None else Path(start))
        on_first_rank(lambda: save_config(config, self.directory / "config.yaml"))
        description = self.directory / "description"
        on_first_rank(lambda: keep_description(description, self.model.config.arch, origin))
        self.checkpoints = CheckpointWriter(
            self.directory / "checkpoints", description, config.checkpoint
        )

    def _begin(self) -> None:
        start = self.config.model.checkpoint
        if start is not None and self.config.training.dtype == "bfloat16":
            load_main_weights(self.model, self.optimizer, Path(start))

    def _go_on(self, source: Path) -> None:
        load_training(source, self.model, self.optimizer, self.scheduler)
        self._say(f"resumed from {source} at step {self.progress.step}")

    def train(self) -> None:
        """All remaining steps, then what was learnt and where it lies."""
        config = self.config
        if self.progress.step >= config.training.steps:
            self._say(f"{self.directory} has already run its {config.training.steps} steps")
        else:
            with StopRequests() as stop:
                signal = self._steps(stop)
            if signal is not None:
                done = f"{self.progress.step} of {config.training.steps} steps"
                logger.info("%s: ended with %s done and saved", signal, done)
                return
        if config.refine.mode != "ntp":
            samples = show_rollouts(self.model, self.dataset, self.tokenizer, config)
            self._say(samples)
        self._say(
            f"metrics      {self.directory / 'metrics.jsonl'}\n"
            + (
                f"TensorBoard  tensorboard --logdir {self.directory}\n"
                if config.run.tensorboard
                else ""
            )
            + f"checkpoint   {latest_checkpoint(self.directory / 'checkpoints')}"
        )

    def _steps(self, stop: StopRequests) -> str | None:
        """All remaining steps, or those until a signal asks the run to end, which is returned."""
        config, step = self.config, self.progress.step
        run_step = TrainStep(
            self.wrapped,
            self.optimizer,
            config.refine,
            config.training.seed,
            self.groups,
            self.engine,
        )
        self._say_plan()
        self._warn_of_epochs()
        batches = self._batches()
        writer = self._writer() if self.first_rank else None
        signal = None
        try:
            while step < config.training.steps and signal is None:
                started = time.perf_counter()
                mode = "ntp" if step < config.training.ntp_warmup_steps else None
                lr = self.optimizer.param_groups[0]["lr"]
                micro_batches = list(islice(batches, self.num_micro_batches))
                reduced, grad_norm = run_step(micro_batches, step, mode)
                self._warn_of_skipped(step, reduced, grad_norm)
                self.scheduler.step(increment=1)
                if writer is not None:
                    seconds = time.perf_counter() - started
                    writer.write(self._step_metrics(step, reduced, grad_norm, lr, seconds))
                step += 1
                self.progress = self.progress.after(config.training.global_batch_size)
                self.checkpoints.poll()
                signal = stop.asked()
                diverged = run_step.skipped_in_a_row > config.training.max_skipped_steps
                due = step % config.checkpoint.save_interval == 0 or step == config.training.steps
                if due or signal is not None or diverged:
                    self._save()
                if diverged:
                    self.checkpoints.wait()
                    raise UserError(
                        f"training diverged: {run_step.skipped_in_a_row} optimizer steps in a row, "
                        f"up to step {step - 1}, had no finite loss and gradient; the weights as "
                        f"they were before are saved in {self.directory}"
                    )
            self.checkpoints.wait()
        finally:
            self.checkpoints.abandon()
            if writer is not None:
                writer.close()

        return signal

    def _warn_of_skipped(self, step: int, reduced: ReducedMetrics, grad_norm: float) -> None:
        if reduced.skipped_steps and self.first_rank:
            first = self.progress.consumed_samples
            logger.warning(
                "step %d: %d optimizer step(s) skipped, as the loss (next-token: %s) or the norm "
                "of its gradient (%s) is not finite; the batch is samples %d to %d",
                *(step, reduced.skipped_steps, reduced.loss_ntp, grad_norm),
                *(first, first + self.config.training.global_batch_size - 1),
            )

    def _warn_of_epochs(self) -> None:
        samples = self.config.training.steps * self.config.training.global_batch_size
        epochs = samples / len(self.dataset)
        if epochs > MANY_EPOCHS and self.first_rank:
            logger.warning(
                "the run's %d samples are %.0f epochs of its data: %s",
                *(samples, epochs, self.dataset.origin),
            )

    def _say_plan(self) -> None:
        """What the step consists of, where that is more than whole texts on one stage."""
        config = self.config
        if not runs_in_slices(config):
            return
        sequences = config.training.micro_batch_size * self.groups.dp.size()
        mode, length = config.refine.mode, config.data.sequence_length
        parts = parts_of_step(mode, config.refine, self.num_micro_batches, sequences)
        for phase, rolls_out in dict.fromkeys((part.phase, part.rolls_out) for part in parts):
            self._say(describe(self.engine.plan(config.refine, length, rolls_out, phase)))

    def _batches(self) -> Iterator[TextBatch]:
        device = platform.device()
        for batch in batch_iterator(
            self.dataset,
            self.progress.consumed_samples,
            self.config.training.micro_batch_size,
            self.groups.dp.rank(),
            self.groups.dp.size(),
        ):
            yield TextBatch(
                *(
                    platform.without_waiting(batch[name], device)
                    for name in ("tokens", "mask", "sample_index")
                )
            )

    def _save(self) -> None:
        if self.config.optimizer.overlap_param_gather:
            # Else only the next forward pass would gather what the other ranks have updated.
            self.wrapped.start_param_sync(force_sync=True)
        compat.prime_optimizer(self.optimizer)  # if every step so far was skipped
        self.checkpoints.save(self.progress, self.model, self.optimizer, self.scheduler)

    def _writer(self) -> MetricsWriter:
        run, training = self.config.run, self.config.training
        return MetricsWriter(
            self.directory,
            run.tensorboard,
            run.progress,
            training.steps,
            self.progress.step,
            training.log_interval,
        )

    def _step_metrics(
        self, step: int, reduced: ReducedMetrics, grad_norm: float, lr: float, seconds: float
    ) -> StepMetrics:
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        drawn = {"positions": reduced.positions, "rollout_tokens": reduced.rollout_tokens}
        return StepMetrics(
            step=step,
            grad_norm=grad_norm,
            lr=float(lr),
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            **vars(reduced)
            | {name: None if x is None else short_hash(x) for name, x in drawn.items()},
        )

    def _say(self, text: str) -> None:
        if self.first_rank:
            print(text, flush=True)
