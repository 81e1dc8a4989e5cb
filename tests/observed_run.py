"""The main job run inside a test and watched from within: what it builds, computes, prints and
writes. Of a job of several ranks only the building, of the first rank, with no others there."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from refine_kernels import dispatch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from refine_mcore import platform
from refine_mcore.config import load_config
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.delta_rule_state import DeltaRuleTape
from refine_mcore.step.refine_loss import TextBatch
from refine_mcore.training import loop
from refine_mcore.training.checkpointing import CheckpointWriter, latest_checkpoint
from refine_mcore.training.step import TrainStep


@dataclass(frozen=True)
class Built:
    """Megatron's objects as the job made them, before its first step. Plain values: what they
    belong to would keep the threads of its process groups alive."""

    directory: Path
    group_sizes: dict[str, int]
    timeouts: set[float | None]  # of the groups, in seconds
    model: dict[str, Any]  # the TransformerConfig
    layers: int  # on this rank
    linear: type
    fused_gradients: bool  # the products of linear layers add to Megatron's buffer
    dtype: torch.dtype
    weights: Tensor  # all of them in one row
    data_parallel: dict[str, Any]  # the DistributedDataParallelConfig
    optimizer: dict[str, Any]  # the OptimizerConfig
    adam: list[dict[str, Any]]  # the options of every group of parameters
    schedule: dict[str, Any]  # the OptimizerParamScheduler
    kernels: dict[str, str]  # the forms of operations that run

    @classmethod
    def by(cls, run: Any) -> Built:
        """From a `Run`."""
        groups, model, layer = run.groups, run.model, run.model.decoder.layers[0]
        parts = [part.optimizer for part in run.optimizer.chained_optimizers]
        return cls(
            directory=run.directory,
            group_sizes={name: getattr(groups, name).size() for name in ("tp", "pp", "dp")},
            timeouts={_timeout(group) for group in (dist.group.WORLD, groups.dp)},
            model=_plain(vars(model.config)),
            layers=len(model.decoder.layers),
            fused_gradients=layer.self_attention.o_proj.gradient_accumulation_fusion,
            linear=type(layer.mlp.linear_fc2),
            dtype=layer.mlp.linear_fc2.weight.dtype,
            weights=torch.cat([p.data.flatten() for p in model.parameters()]),
            data_parallel=_plain(vars(run.wrapped.ddp_config)),
            optimizer=_plain(vars(run.optimizer.config)),
            adam=[_plain(group) for part in parts for group in part.param_groups],
            schedule=_plain(vars(run.scheduler)),
            kernels={name: dispatch.backend(name, "cpu") for name in dispatch.CHOICES},
        )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    kinds = (bool, int, float, str, tuple, Architecture)
    return {name: value for name, value in values.items() if isinstance(value, kinds)}


def _timeout(group: Any) -> float | None:
    """In seconds; None for a fake group."""
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    return None if options is None else options._timeout.total_seconds()


@dataclass
class Observed:
    """What was seen of one run."""

    built: Built | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    batches: list[Sequence[TextBatch]] = field(default_factory=list)  # of every step
    passes: list[int] = field(default_factory=list)  # tokens of every pass through the model
    kept_states: list[int] = field(default_factory=list)  # of every tape
    saves: list[int] = field(default_factory=list)  # steps
    published: list[bool] = field(default_factory=list)  # whether a save was complete on return
    refused: str = ""  # the sentence with which the run ended
    shown: str = ""
    logged: str = ""
    files: set[str] = field(default_factory=set)
    checkpoints: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[Any]:
        """One metric over the steps."""
        return [step[name] for step in self.metrics]


def observe(
    file: Path, directory: Path, overrides: Sequence[str], *, ranks: int = 1, saves: bool = False
) -> Observed:
    """Run the job of the configuration `file` in `directory`, unless an override says where.

    Without `saves` it is only noted when a checkpoint would be saved.
    """
    config = load_config(file, [f"run.directory={directory}", *overrides])
    seen, shown, logged = Observed(), io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(shown))
        stack.enter_context(contextlib.redirect_stderr(logged))
        for watch in (_watch_run, _watch_steps, _watch_tapes):
            stack.enter_context(watch(seen))
        stack.enter_context(_watch_saves(seen, Path(config.run.directory), saves))
        if ranks > 1:
            stack.enter_context(_without_the_other_ranks(ranks))
        try:
            loop.train(config)
        except UserError as error:
            seen.refused = str(error)
        finally:
            dispatch.use()
    seen.shown, seen.logged = shown.getvalue(), logged.getvalue()
    if directory.is_dir():
        seen.files = {path.name for path in directory.iterdir()}
        seen.checkpoints = sorted(path.name for path in directory.glob("checkpoints/iter_*"))
    if "metrics.jsonl" in seen.files:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        seen.metrics = [json.loads(line) for line in lines]
    return seen


@contextlib.contextmanager
def _watch_run(seen: Observed) -> Iterator[None]:
    class Watched(loop.Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            seen.built = Built.by(self)
            self.model.register_forward_pre_hook(
                lambda model, inputs: seen.passes.append(inputs[0].shape[1])
            )

    with mock.patch.object(loop, "Run", Watched):
        yield


@contextlib.contextmanager
def _watch_steps(seen: Observed) -> Iterator[None]:
    call = TrainStep.__call__

    def watched(self: TrainStep, batches: Sequence[TextBatch], *arguments: Any) -> Any:
        seen.batches.append(batches)
        return call(self, batches, *arguments)

    with mock.patch.object(TrainStep, "__call__", watched):
        yield


@contextlib.contextmanager
def _watch_tapes(seen: Observed) -> Iterator[None]:
    record = DeltaRuleTape.record_outputs

    def watched(self: DeltaRuleTape, *arguments: Any) -> Any:
        output = record(self, *arguments)
        seen.kept_states.append(len(self.kept))
        return output

    with mock.patch.object(DeltaRuleTape, "record_outputs", watched):
        yield


@contextlib.contextmanager
def _watch_saves(seen: Observed, directory: Path, saves: bool) -> Iterator[None]:
    save = CheckpointWriter.save

    def watched(self: CheckpointWriter, progress: Any, *arguments: Any) -> None:
        seen.saves.append(progress.step)
        if not saves:
            return
        save(self, progress, *arguments)
        found = latest_checkpoint(directory / "checkpoints")
        seen.published.append(found is not None and found.name == f"iter_{progress.step:07d}")

    with mock.patch.object(CheckpointWriter, "save", watched):
        yield


@contextlib.contextmanager
def _without_the_other_ranks(ranks: int) -> Iterator[None]:
    """This process as the first of `ranks`: torch's fake backend sends nothing and waits for
    nobody, so the run ends once it is built."""
    new_group = dist.new_group

    def join(timeout_s: float) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)

    def fake_group(*arguments: Any, **options: Any) -> Any:
        return new_group(*arguments, **options | {"backend": "fake"})  # Megatron asks for gloo too

    with (
        mock.patch.object(platform, "init_distributed", join),
        mock.patch.object(dist, "new_group", fake_group),
        mock.patch.object(loop.Run, "train", lambda self: None),
    ):
        yield
        platform.shutdown()
