"""Where a run is, and in which data: kept with every checkpoint, and held against the run that goes
on from one before it writes anything."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from refine_mcore.config import Config
from refine_mcore.conversion.description import find_checkpoint
from refine_mcore.conversion.torch_dist import read_metadata
from refine_mcore.data import tokenizer_file
from refine_mcore.errors import UserError

logger = logging.getLogger(__name__)

_HEAD = 1 << 20  # bytes of a file that are hashed


@dataclass(frozen=True)
class Progress:
    """Batches done, samples consumed, and what the numbers of the samples mean."""

    step: int = 0
    consumed_samples: int = 0
    # Of `data_identity`; empty where it is not known.
    data: dict[str, Any] = field(default_factory=dict)

    def after(self, samples: int) -> Progress:
        """One step of so many samples later."""
        return replace(self, step=self.step + 1, consumed_samples=self.consumed_samples + samples)


def data_identity(config: Config, of_phase: dict[str, Any]) -> dict[str, Any]:
    """What the samples of a run and their order depend on, by the settings that say it; `of_phase`
    are those of its phase alone.

    Of files the size and a hash of the first MiB: they may move, but not change. Raises UserError
    for one that cannot be read.
    """
    assert config.data.tokenizer is not None
    return {
        "data.paths": [_fingerprint(Path(path)) for path in config.data.paths],
        "data.tokenizer": _fingerprint(tokenizer_file(config.data.tokenizer)),
        "data.sequence_length": config.data.sequence_length,
        "data.seed": config.data.seed,
        "training.seed": config.training.seed,
        "training.global_batch_size": config.training.global_batch_size,
        **of_phase,
    }


def read_progress(directory: Path) -> Progress:
    """Where the run was that wrote a training checkpoint. Raises UserError if it is of another
    kind, or damaged."""
    read_metadata(directory)  # refuses foreign pickles before Megatron opens any
    try:
        stored = dist_checkpointing.load_common_state_dict(str(directory)).get("progress")
    except Exception as error:  # a damaged file may raise anything
        raise UserError(
            f"checkpoint {directory} is damaged: it cannot be read ({type(error).__name__})"
        ) from error
    if stored is None:
        raise UserError(
            f"{directory} holds weights only: name it as model.checkpoint, not checkpoint.load"
        )
    return Progress(**stored)


def progress_of(config: Config, source: Path | None, of_phase: dict[str, Any]) -> Progress:
    """Where a run starts: at its beginning, or where the checkpoint `source` leaves it; `of_phase`
    as for `data_identity`.

    Raises UserError if `source` is another run's that has no step left to do, or saw other data.
    """
    data = data_identity(config, of_phase)
    if source is None:
        return Progress(data=data)
    directory = find_checkpoint(source)
    progress = read_progress(directory)
    own = Path(config.run.directory) / "checkpoints" == directory.parent
    if progress.step >= config.training.steps and not own:
        raise UserError(
            f"checkpoint.load {directory} has done {progress.step} steps: nothing is left to do of "
            f"training.steps {config.training.steps}"
        )
    _compare_data(progress, data, directory, config.checkpoint.allow_other_data)
    return replace(progress, data=data)


def _compare_data(
    progress: Progress, data: dict[str, Any], directory: Path, allow_other: bool
) -> None:
    if not progress.data:
        logger.warning("%s does not say on which data it was trained", directory)
        return
    names = list(data | progress.data)  # another phase has settings of its own
    differing = [name for name in names if progress.data.get(name) != data.get(name)]
    if not differing:
        return
    found = f"{directory} was trained with another {', '.join(differing)}"
    if not allow_other:
        raise UserError(
            f"{found}: its {progress.consumed_samples} samples mean others here; "
            "checkpoint.allow_other_data=true goes on all the same"
        )
    logger.warning("%s; going on from sample %d of the present", found, progress.consumed_samples)


def _fingerprint(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(_HEAD)).hexdigest()
        return {"bytes": path.stat().st_size, "head": head}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
