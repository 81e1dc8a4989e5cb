"""The training loop of all phases: the updates of one batch after the other, with metrics and
checkpoints between batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from refine_kernels import dispatch

from refine_mcore import platform
from refine_mcore.config import (
    TOKENS,
    Config,
    claim_run_directory,
    data_parallel_layout,
    prepare_run_directory,
    require_data,
    runs_in_slices,
    save_config,
)
from refine_mcore.data import (
    batch_iterator,
    load_tokenizer,
    tokenizer_file,
)
from refine_mcore.errors import UserError
from refine_mcore.evaluation.in_training import HeldOut
from refine_mcore.evaluation.show import show_rollouts
from refine_mcore.models.transformer_config import check_layout
from refine_mcore.pipeline.modes import parts_of_step
from refine_mcore.pipeline.plan import describe
from refine_mcore.report import write_json
from refine_mcore.step.metrics import ReducedMetrics
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.checkpointing import (
    CheckpointWriter,
    keep_description,
    latest_checkpoint,
    load_training,
)
from refine_mcore.training.flops import with_equal_flops
from refine_mcore.training.metrics import (
    MetricsWriter,
    PostTrainingMetrics,
    StepMetrics,
    short_hash,
)
from refine_mcore.training.phases import MidTraining, Phase, Update
from refine_mcore.training.progress import progress_of
from refine_mcore.training.setup import (
    DESCRIPTION,
    build_training,
    resolve_architecture,
    training_source,
    with_one_checkpoint,
    with_own_tokenizer,
)
from refine_mcore.training.stop import StopRequests

logger = logging.getLogger(__name__)

MANY_EPOCHS = 10  # more are said at the start


def train(config: Config, kind: type[Phase] = MidTraining) -> None:
    """Run the phase of training described by `config` on the ranks that were started."""
    config = with_own_tokenizer(config)
    require_data(config)
    if config.training.dtype == "float64" and config.optimizer.clip_grad:
        raise UserError(
            "training.dtype float64 needs optimizer.clip_grad 0: Megatron clips float32 gradients"
        )
    platform.initialize()
    # Ranks meet first: one that fails before would keep those of other nodes waiting for it.
    with platform.distributed(config.parallel.timeout):
        Run(config, kind).train()


class Run:
    """The run that `config` describes, before its next step, on ranks that have met."""

    def __init__(self, config: Config, kind: type[Phase] = MidTraining) -> None:
        self.phase = kind(config)
        source = platform.on_first_rank(lambda: training_source(config))
        if source is None:
            config = with_one_checkpoint(config)
        architecture = resolve_architecture(config, source)
        check_layout(
            architecture,
            config.parallel.tensor,
            config.parallel.pipeline,
            config.parallel.layers_per_stage,
        )
        self.config = config = with_equal_flops(config, architecture, self.phase.modes)
        _, self.num_micro_batches = data_parallel_layout(config, dist.get_world_size())
        assert config.data.tokenizer is not None
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.progress = platform.on_first_rank(
            lambda: progress_of(config, source, self.phase.identity())
        )
        self.directory = platform.on_first_rank(lambda: prepare_run_directory(config))
        tokens = Path(config.data.cache or self.directory / TOKENS)
        self.dataset = self.phase.samples(self.tokenizer, architecture.vocab_size, tokens)
        self.first_rank = dist.get_rank() == 0
        self.groups = platform.initialize_model_parallel(
            config.parallel.tensor, config.parallel.pipeline, config.training.seed
        )
        self.model, self.wrapped, self.optimizer, self.scheduler, self.run_step = build_training(
            config, self.groups, source
        )
        self.engine = self.run_step.engine
        self._recorded: dict[str, str] = {}
        start = config.model.checkpoint
        origin = source or (None if start is None else Path(start))
        every = config.evaluation.every
        self.held_out = HeldOut(config, self.tokenizer, origin) if every else None
        if source is not None:
            load_training(source, self.model, self.optimizer, self.scheduler)
            self._say(f"resumed from {source} at step {self.progress.step}")
        description = self.directory / DESCRIPTION
        trained_with = tokenizer_file(config.data.tokenizer)
        arch = self.model.config.arch

        def take_over() -> str:
            save_config(config, self.directory / "config.yaml")
            claim = claim_run_directory(self.directory)
            keep_description(description, arch, origin, trained_with)
            return claim

        claim = platform.on_first_rank(take_over)
        self.checkpoints = CheckpointWriter(self.directory, claim, description, config.checkpoint)

    def train(self) -> None:
        """All remaining steps, then what was learnt and where it lies."""
        config = self.config
        if self.progress.step >= config.training.steps:
            self._say(
                f"{self.directory} has run {self.progress.step} steps: nothing is left to do of "
                f"training.steps {config.training.steps}"
            )
        else:
            with StopRequests() as stop:
                signal = self._steps(stop)
            if signal is not None:
                done = f"{self.progress.step} of {config.training.steps} steps"
                logger.info("%s: ended with %s done and saved", signal, done)
                return
        if set(self.phase.modes) - {"ntp", "sft"}:
            self._say(show_rollouts(self.model, self._first_text(), self.tokenizer, config))
        newest = platform.on_first_rank(lambda: latest_checkpoint(self.directory / "checkpoints"))
        self._say(
            f"metrics      {self.directory / 'metrics.jsonl'}\n"
            + (
                f"TensorBoard  tensorboard --logdir {self.directory}\n"
                if config.run.tensorboard
                else ""
            )
            + f"checkpoint   {newest}"
        )

    def _steps(self, stop: StopRequests) -> str | None:
        """All remaining steps, or those until a signal asks the run to end, which is returned."""
        config, step = self.config, self.progress.step
        self._say_plan()
        self._warn_of_epochs()
        batches = self._batches(self.progress.consumed_samples)
        writer = signal = None
        if self.first_rank:
            writer = MetricsWriter(self.directory, config.run, config.training, step)
        try:
            while step < config.training.steps and signal is None:
                started = time.perf_counter()
                lr = self.optimizer.param_groups[0]["lr"]
                micro_batches = list(islice(batches, self.num_micro_batches))
                outcomes = []
                for update in self.phase.updates(micro_batches, step):
                    reduced, grad_norm = self.run_step(update.micro_batches, step, update.mode)
                    self._warn_of_skipped(step, reduced, grad_norm)
                    outcomes.append((update, reduced, grad_norm))
                self.scheduler.step(increment=1)
                seconds = time.perf_counter() - started
                evaluation = self._evaluate(step + 1)
                if writer is not None:
                    writer.write(self._step_metrics(step, outcomes, lr, seconds), evaluation)
                    self._record_kernels()
                step += 1
                self.progress = self.progress.after(config.training.global_batch_size)
                self.checkpoints.poll()
                signal = stop.asked()
                diverged = self.run_step.skipped_in_a_row > config.training.max_skipped_steps
                due = step % config.checkpoint.save_interval == 0 or step == config.training.steps
                if due or signal is not None or diverged:
                    self._save()
                if diverged:
                    self.checkpoints.wait()
                    raise UserError(
                        f"training diverged: {self.run_step.skipped_in_a_row} optimizer steps in a "
                        f"row, up to step {step - 1}, had no finite loss and gradient; the weights "
                        f"as they were before are saved in {self.directory}"
                    )
            self.checkpoints.wait()
        finally:
            self.checkpoints.abandon()
            if writer is not None:
                writer.close()

        return signal

    def _record_kernels(self) -> None:
        """RUN/kernels.json: which form of each operation has run on this rank, how it decodes, and
        whose linear layers and optimizer."""
        graphs = self.engine.decoder.num_graphs > 0
        ran = dispatch.ran() | {"decode passes": "CUDA graph" if graphs else "one by one"}
        if ran == self._recorded:
            return
        self._recorded = ran
        parts = {
            "linear": self.model.decoder.layers[0].mlp.linear_fc2,
            "optimizer": self.optimizer.chained_optimizers[0].optimizer,
        }
        classes = {
            name: f"{type(part).__module__}.{type(part).__qualname__}"
            for name, part in parts.items()
        }
        write_json(self.directory / "kernels.json", {"kernels": self._recorded, **classes})

    def _evaluate(self, steps: int) -> dict[str, float]:
        """Figures of held-out texts, if they are due after so many steps."""
        every, overlap = self.config.evaluation.every, self.config.optimizer.overlap_param_gather
        if self.held_out is None or every is None or steps % every:
            return {}
        if overlap:  # gather the weights now: ranks do not evaluate in step with each other
            self.wrapped.disable_forward_pre_hook()
        figures = self.held_out.figures(self.model, self.groups)
        if overlap:
            self.wrapped.enable_forward_pre_hook()
        return figures

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
        parts = [
            part
            for mode in self.phase.modes
            for part in parts_of_step(mode, config.refine, self.num_micro_batches, sequences)
        ]
        length = config.data.sequence_length
        for phase, rolls_out in dict.fromkeys((part.phase, part.rolls_out) for part in parts):
            self._say(describe(self.engine.plan(config.refine, length, rolls_out, phase)))

    def _batches(self, first: int) -> Iterator[TextBatch]:
        """This rank's micro-batches from global sample `first` on."""
        device, dp = platform.device(), self.groups.dp
        size = self.config.training.micro_batch_size
        for batch in batch_iterator(self.dataset, first, size, dp.rank(), dp.size()):
            yield TextBatch.of(batch, device)

    def _first_text(self) -> TextBatch:
        first = self.dataset.batch([0]) | {"sample_index": torch.zeros(1, dtype=torch.long)}
        return self.phase.texts(TextBatch.of(first, platform.device()))

    def _save(self) -> None:
        if self.config.optimizer.overlap_param_gather:
            # Else only the next forward pass would gather what the other ranks have updated.
            self.wrapped.start_param_sync(force_sync=True)
        self.checkpoints.save(self.progress, self.model, self.optimizer, self.scheduler)

    def _step_metrics(
        self,
        step: int,
        outcomes: Sequence[tuple[Update, ReducedMetrics, float]],
        lr: float,
        seconds: float,
    ) -> StepMetrics:
        tokens = self.config.training.global_batch_size * self.config.data.sequence_length
        values: dict[str, Any] = {"step": step, "lr": float(lr), "step_seconds": seconds}
        values["tokens_per_second"] = tokens / seconds
        kind: type[StepMetrics] = StepMetrics
        for update, reduced, grad_norm in outcomes:
            if update.mode == "sft":
                kind = PostTrainingMetrics
                values |= {"sft_loss": reduced.loss_ntp, "sft_grad_norm": grad_norm}
                continue
            drawn = {"positions": reduced.positions, "rollout_tokens": reduced.rollout_tokens}
            values |= vars(reduced) | {"grad_norm": grad_norm}
            values |= {name: None if x is None else short_hash(x) for name, x in drawn.items()}
        values["skipped_steps"] = sum(reduced.skipped_steps for _, reduced, _ in outcomes)
        return kind(**values)

    def _say(self, text: str) -> None:
        if self.first_rank:
            print(text, flush=True)
