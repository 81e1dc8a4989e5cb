"""A model, its optimizer and one batch, for measuring steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from refine_mcore import platform
from refine_mcore.config import Config, data_parallel_layout, require_data
from refine_mcore.data import batch_iterator, build_dataset, load_tokenizer
from refine_mcore.pipeline.engine import PipelineEngine
from refine_mcore.rollout.branches import Randomness
from refine_mcore.step.context import StepContext
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.optimizer import build_optimizer, main_gradient, wrap_data_parallel
from refine_mcore.training.setup import build_engine, resolve_architecture, training_model
from refine_mcore.training.step import TrainStep


class Bench:
    """One rank's part of a run that never gets past its first batch."""

    def __init__(self, config: Config) -> None:
        self.config, training, parallel = config, config.training, config.parallel
        _, count = data_parallel_layout(config, torch.distributed.get_world_size())
        self.groups = platform.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, training.seed
        )
        require_data(config)
        assert config.data.tokenizer is not None
        vocab = resolve_architecture(config).vocab_size
        dataset = build_dataset(config.data, load_tokenizer(config.data.tokenizer), vocab)
        self.before_model = resident_bytes()
        self.model = wrap_data_parallel(
            training_model(config, self.groups), config.optimizer, self.groups
        )
        self.optimizer, _ = build_optimizer(self.model, config, getattr(torch, training.dtype))
        self.engine = build_engine(config, self.model, self.groups)
        self.run_step = TrainStep(
            self.model, self.optimizer, config.refine, training.seed, self.groups, self.engine
        )
        batches = batch_iterator(
            dataset, 0, training.micro_batch_size, self.groups.dp.rank(), self.groups.dp.size()
        )
        self.batches = [
            TextBatch(
                *(
                    platform.without_waiting(item[name], platform.device())
                    for name in ("tokens", "mask", "sample_index")
                )
            )
            for item in islice(batches, count)
        ]

    @property
    def context(self) -> StepContext:
        """Of the first step."""
        return StepContext(
            self.model.module,
            self.config.refine,
            Randomness(self.config.training.seed, 0),
            self.groups.dp,
        )

    @cached_property
    def one_slice(self) -> PipelineEngine:
        """The engine over whole sequences; every rank asks for it at the same point."""
        timeout = self.config.parallel.timeout
        return PipelineEngine(self.model, self.groups, slices=1, recompute=False, timeout_s=timeout)

    def zero_gradients(self) -> None:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

    def gradient(self) -> torch.Tensor:
        """All gradients of this rank in one vector."""
        return torch.cat([main_gradient(p).flatten().clone() for p in self.model.parameters()])


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of `run`, the accelerator's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def profiled_parts(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Seconds on the host and number of calls of the named parts of one run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {
        event.key.removeprefix("refine/"): (event.cpu_time_total / 1e6, event.count)
        for event in profile.key_averages()
        if event.key.startswith("refine/")
    }


def resident_bytes() -> int:
    """Memory that this process holds."""
    import psutil

    return psutil.Process().memory_info().rss
