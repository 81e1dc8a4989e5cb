"""What rank 0 reports of each step: a JSON line, TensorBoard scalars and a progress line."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from refine_mcore.config import RunConfig, TrainingConfig
from refine_mcore.errors import UserError
from refine_mcore.files import written_whole
from refine_mcore.step.metrics import StepFigures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMetrics(StepFigures):
    """One line of `metrics.jsonl`. ReFINE's fields are null in a next-token step, and so is what is
    not finite in a step that was skipped."""

    # Completed steps before this one: the first step of a run is 0.
    step: int
    grad_norm: float | None = None
    lr: float
    # Columns of the batch over all ranks, padding among them, per second of the step; rollout
    # tokens do not count.
    tokens_per_second: float
    step_seconds: float
    # `short_hash` of all positions and all rollout tokens, in the order of the global samples.
    positions: str | None = None
    rollout_tokens: str | None = None


@dataclass(frozen=True, kw_only=True)
class PostTrainingMetrics(StepMetrics):
    """One line of post-training. What a line of mid-training has is of the inner update, null where
    there is none."""

    # Mean loss per answer token of the outer update, in nats, and the norm of its gradient.
    sft_loss: float
    sft_grad_norm: float


def short_hash(values: Tensor) -> str:
    """12 hex digits that identify integers: the head of SHA-256 over them as little-endian int64.

    Equal for all layouts if the caller passes the values in the order of the global samples.
    """
    data = values.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(data).hexdigest()[:12]


class MetricsWriter:
    """Appends steps to RUN/metrics.jsonl and RUN/tensorboard, and shows progress on stderr.

    `first_step` is the step about to run: on resume, lines and events of that step and later ones
    (and a line cut short by a crash) are dropped first. On a terminal progress is one line that is
    redrawn; elsewhere it is a line every `log_interval` steps. Raises UserError if the files cannot
    be written.
    """

    def __init__(
        self,
        run_dir: Path,
        shown: RunConfig,
        training: TrainingConfig,
        first_step: int = 0,
    ) -> None:
        self._total_steps, self._log_interval = training.steps, training.log_interval
        self._start = time.monotonic()
        self._first_step = first_step
        self._run_dir, path = run_dir, run_dir / "metrics.jsonl"
        with self._naming_failures():
            _truncate(path, first_step)
            self._file = path.open("a", encoding="utf-8")
            events = run_dir / "tensorboard"
            self._events = _event_writer(events, first_step) if shown.tensorboard else None
        self._bar: tqdm | None = None
        self._log_lines = shown.progress and not sys.stderr.isatty()
        if shown.progress and sys.stderr.isatty():
            total = self._total_steps
            self._bar = tqdm(total=total, initial=first_step, unit="step", dynamic_ncols=True)

    def write(self, metrics: StepMetrics, evaluation: Mapping[str, float] | None = None) -> None:
        """Records and shows one finished step, with the figures of an evaluation behind it."""
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in (
                {"step": metrics.step} | asdict(metrics) | dict(evaluation or {})  # the step first
            ).items()
        }
        with self._naming_failures():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            if self._events is not None:
                for name, value in record.items():
                    if isinstance(value, float):
                        self._events.add_scalar(name, value, metrics.step)
        if self._bar is not None:
            self._bar.set_postfix_str(_summary(metrics), refresh=False)
            self._bar.update()
        elif self._log_lines and self._is_logged(metrics.step):
            print(self._log_line(metrics), file=sys.stderr, flush=True)
        if evaluation and (self._bar is not None or self._log_lines):
            named = ((name.split("/"), value) for name, value in evaluation.items())
            # those of parts of the texts are in the files
            figures = " | ".join(f"{name[1]} {x:.4f}" for name, x in named if len(name) == 2)
            tqdm.write(f"evaluation after step {metrics.step + 1} | {figures}", file=sys.stderr)

    def close(self) -> None:
        """Ends the progress bar and closes the files. A failure is only logged, as the run may be
        ending for another reason."""
        if self._bar is not None:
            self._bar.close()
        for file in (self._file, self._events):
            try:
                if file is not None:
                    file.close()
            except OSError as error:
                logger.warning("cannot write metrics in %s: %s", self._run_dir, error.strerror)

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write metrics in {self._run_dir}: {error.strerror}") from None

    def _is_logged(self, step: int) -> bool:
        done = step + 1
        return done % self._log_interval == 0 or done == self._total_steps

    def _log_line(self, metrics: StepMetrics) -> str:
        done = metrics.step + 1
        per_step = (time.monotonic() - self._start) / (done - self._first_step)
        eta = tqdm.format_interval(per_step * (self._total_steps - done))
        return f"step {done}/{self._total_steps} | {_summary(metrics)} | ETA {eta}"


def _summary(metrics: StepMetrics) -> str:
    shown = {"NTP loss": metrics.loss_ntp, "reward": metrics.reward_mean}
    if isinstance(metrics, PostTrainingMetrics):
        shown["SFT loss"] = metrics.sft_loss
    parts = [f"{name} {value:.4f} | " for name, value in shown.items() if value is not None]
    return f"{''.join(parts)}{metrics.tokens_per_second:,.0f} tokens/s"


def _event_writer(directory: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, needed only here

    return SummaryWriter(str(directory), purge_step=first_step)


def _truncate(path: Path, first_step: int) -> None:
    """Keeps the lines of steps before `first_step`; the new file appears by rename."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line)
        except ValueError:  # cut short by a crash
            continue
    with written_whole(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
