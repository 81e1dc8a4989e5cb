"""A model, its optimizer and one batch, for measuring steps."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from refine_mcore import platform
from refine_mcore.config import Config, data_parallel_layout, require_data
from refine_mcore.data import batch_iterator, load_tokenizer
from refine_mcore.models.sharding import main_gradient
from refine_mcore.pipeline.engine import PASS_NAMES, PipelineEngine
from refine_mcore.pipeline.passes import Pass
from refine_mcore.step.context import StepContext
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training.phases import MidTraining
from refine_mcore.training.setup import build_training, resolve_architecture


class Bench:
    """One rank's part of a run that never gets past its first batch.

    `groups` are those of another one of the same layout, which goes on beside it: a new layout
    closes the groups of the one before.
    """

    def __init__(self, config: Config, groups: Any = None) -> None:
        self.config, training, parallel = config, config.training, config.parallel
        _, count = data_parallel_layout(config, torch.distributed.get_world_size())
        self.groups = groups or platform.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, training.seed
        )
        require_data(config)
        assert config.data.tokenizer is not None
        vocab = resolve_architecture(config).vocab_size
        tokenizer = load_tokenizer(config.data.tokenizer)
        with _temporary_directory() as directory:
            dataset = MidTraining(config).samples(tokenizer, vocab, directory)
        self.before_model = resident_bytes()
        _, self.model, self.optimizer, _, self.run_step = build_training(config, self.groups)
        self.engine = self.run_step.engine
        batches = batch_iterator(
            dataset, 0, training.micro_batch_size, self.groups.dp.rank(), self.groups.dp.size()
        )
        self.batches = [TextBatch.of(item, platform.device()) for item in islice(batches, count)]

    @property
    def context(self) -> StepContext:
        """Of the first step."""
        return self.run_step.context(0)

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


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    """Of one name on all nodes. Tokens mapped inside it stay readable after it is gone."""
    directory = Path(platform.on_first_rank(tempfile.mkdtemp))
    try:
        yield directory
        torch.distributed.barrier()
    finally:
        if platform.first_of_node():
            shutil.rmtree(directory, ignore_errors=True)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of `run`, the accelerator's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def pass_seconds(bench: Bench, mode: str) -> dict[str, float]:
    """`seconds` of one step of a mode, and what its passes and the rest of it take of them.

    On a GPU passes are timed by events, which nothing waits for before the end of the step.
    """
    marks: list[tuple[str, _Mark, _Mark]] = []

    @contextmanager
    def observed(item: Pass) -> Iterator[None]:
        start = _Mark()
        yield
        marks.append((PASS_NAMES[item.op], start, _Mark()))

    engine = bench.engine
    before, engine.observe = engine.observe, observed
    try:
        total = seconds(partial(bench.run_step, bench.batches, 0, mode))
    finally:
        engine.observe = before
    spent = {name: 0.0 for name, _, _ in marks}
    for name, start, stop in marks:
        spent[name] += stop.since(start)
    return {"seconds": total, **spent, "rest": total - sum(spent.values())}


class _Mark:
    """A point in the work of the device."""

    def __init__(self) -> None:
        self._event = None
        if platform.device().type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._time = time.perf_counter()

    def since(self, earlier: _Mark) -> float:
        """In seconds; the work up to here must be done."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


def resident_bytes() -> int:
    """Memory that this process holds."""
    import psutil

    return psutil.Process().memory_info().rss
