"""Training checkpoints: weights, optimizer, schedule and data position, as Megatron `torch_dist`.

    RUN/checkpoints/iter_0000040/          one checkpoint; appears by rename once it is complete
    RUN/checkpoints/latest_checkpointed_iteration.txt

A checkpoint carries the architecture and, if the run began from one, the Hugging Face files
(conversion/description.py), so that `tools/convert_hf.py export` reads it like a converted one.

No random state is stored: each draw is a function of the seed and of counters that `Progress`
restores (rollout/branches.py `Randomness`, data/windows.py), and no layer drops activations out.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from refine_mcore import compat, platform
from refine_mcore.config import CheckpointConfig, flatten, require_claim
from refine_mcore.conversion import checkpoint_shapes, hf_parameter_map
from refine_mcore.conversion.description import (
    LATEST_FILE,
    copy_description,
    find_checkpoint,
    keep_tokenizer,
    read_description,
    write_description,
)
from refine_mcore.conversion.parameters import VOCABULARY_KEYS
from refine_mcore.conversion.torch_dist import most_precise_key, read_metadata
from refine_mcore.errors import UserError, failed_elsewhere
from refine_mcore.files import sync, sync_tree
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.fast_weight_model import FastWeightModel
from refine_mcore.training.optimizer_state import (
    fill_main_weights,
    load_optimizer_state,
    sharded_optimizer_state,
)
from refine_mcore.training.progress import Progress

logger = logging.getLogger(__name__)

# The marker until it is renamed, which comes after its checkpoint: the one that it names, alone and
# without a marker, is of a first save that was interrupted, and no run that has lost its marker.
_NEXT_FILE = f".{LATEST_FILE}.partial"

# What a run's own configuration says of each group of parameters, whatever the checkpoint says.
_GROUP_OPTIONS = ("max_lr", "min_lr", "betas", "eps")


def load_weights(model: FastWeightModel, checkpoint: Path) -> None:
    """Fill the model from a checkpoint of any layout and dtype, from the optimizer's fp32 copy
    where the checkpoint has one. Raises UserError if it does not fit."""
    model.load_state_dict(_read_weights(model, checkpoint, lambda parameter: parameter))


def _read_weights(
    model: FastWeightModel, checkpoint: Path, target_of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The model's weights by name, each read into the `target_of` its parameter."""
    directory = find_checkpoint(checkpoint)
    stored = read_metadata(directory).state_dict_metadata
    sharded = model.sharded_state_dict(metadata=compat.checkpoint_metadata())
    for entry in nested_values(sharded):
        entry.data = target_of(entry.data)
        if isinstance(entry, ShardedTensor):
            entry.dtype = entry.data.dtype
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        key = next(iter(nested_values({"": parts}))).key
        entry.key = most_precise_key(key, stored).removesuffix(key) + entry.key
    found: dict[str, Tensor] = _load(model, {"model": sharded}, directory)["model"]
    return found


def _check_weights(architecture: Architecture, directory: Path) -> None:
    """Raise UserError unless a checkpoint's weights are those of the architecture."""
    # also refuses foreign pickles before Megatron opens any
    found = {
        key: tuple(entry.size)
        for key, entry in read_metadata(directory).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    }
    wanted = checkpoint_shapes(hf_parameter_map(architecture))
    if extra := sorted(found.keys() - wanted.keys()):
        raise UserError(
            f"checkpoint {directory} holds {len(extra)} tensors, such as {extra[0]}, that the "
            "model has no place for: model.overrides must not make it smaller"
        )
    for key, shape in wanted.items():
        if key not in found:
            raise UserError(f"checkpoint {directory} lacks the tensor {key}")
        if found[key] != shape and key not in VOCABULARY_KEYS:  # those are padded for each layout
            raise UserError(
                f"checkpoint {directory} holds {key} of shape {list(found[key])}, "
                f"the model needs {list(shape)}"
            )


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a run's checkpoint directory; None where no save has ended.
    Raises UserError where that cannot be seen."""
    found: list[str] = []
    interrupted = ""  # the first save, if it was, behind the rename of its checkpoint
    try:
        if directory.is_symlink() or directory.exists():
            found = os.listdir(directory)
        if LATEST_FILE in found:
            return find_checkpoint(directory)
        if _NEXT_FILE in found:
            interrupted = f"iter_{(directory / _NEXT_FILE).read_text().strip():0>7}"
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}") from None
    complete = sorted(name for name in found if name.startswith("iter_"))
    if complete and complete != [interrupted]:
        raise UserError(
            f"{directory} holds {complete[-1]} but no {LATEST_FILE}: write the step to go on from "
            "there, or move the checkpoints away to begin anew"
        )
    return None


def load_main_weights(model: FastWeightModel, optimizer: Any, checkpoint: Path) -> None:
    """Fill the optimizer's fp32 main weights from a checkpoint, past the model's own precision.

    Megatron begins them from the model's weights, which in a bf16 model have lost digits.
    """
    # not by way of the model in fp32: a parameter that changes its dtype, if for a moment only,
    # loses the hook by which its gradient reaches the optimizer
    exact = _read_weights(model, checkpoint, lambda parameter: parameter.detach().float())
    fill_main_weights(optimizer, {p: exact[name] for name, p in model.named_parameters()})


class CheckpointWriter:
    """Writes a run's checkpoints one at a time, if asked to in the background.

    Every rank calls every method but `abandon` at the same point of the run. A failure to write is
    a UserError on every rank; only for the index of the tensors (`.metadata`, `metadata.json`) it
    is one on rank 0, which ends the job.
    """

    def __init__(self, run: Path, claim: str, description: Path, config: CheckpointConfig) -> None:
        """Checkpoints go into RUN/checkpoints as long as nobody else has claimed RUN, each with the
        contents of `description`."""
        self._run, self._claim, self._description, self._config = run, claim, description, config
        self._directory = run / "checkpoints"
        self._queue = AsyncCallsQueue()
        self._step = 0  # of the checkpoint being written, or written last

    def save(
        self, progress: Progress, model: FastWeightModel, optimizer: Any, scheduler: Any
    ) -> None:
        """Write the checkpoint of `progress.step`; in the background, from a copy made here."""
        self.wait()
        self._step = progress.step
        platform.on_first_rank(self._prepare)
        with self._naming_failures():
            state = _training_state(model, optimizer, scheduler, is_loading=False)
            request = dist_checkpointing.save(
                state | {"progress": asdict(progress)},
                str(self._partial),
                # what data-parallel ranks have in common, each writes a part of
                FullyParallelSaveStrategyWrapper(
                    get_default_save_sharded_strategy(), model.pg_collection.dp_cp
                ),
                async_sharded_save=True,
            )
            request.add_finalize_fn(lambda: platform.on_first_rank(self._publish))
            self._queue.schedule_async_request(request)
        if not self._config.async_save:
            self.wait()

    def poll(self) -> None:
        """Publish the checkpoint being written if all ranks have written their part."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Publish the checkpoint being written, if there is one, once it is complete."""
        self._finalize(blocking=True)

    def abandon(self) -> None:
        """Let this rank's part of the checkpoint being written end, and leave it unpublished.

        For a rank that cannot know whether the others are still there.
        """
        for call in self._queue.async_calls:
            call.async_caller.close()
            compat.forget_write_results()
        self._queue.async_calls.clear()

    def _finalize(self, blocking: bool) -> None:
        with self._naming_failures():
            self._queue.maybe_finalize_async_calls(blocking)

    @property
    def _final(self) -> Path:
        return self._directory / f"iter_{self._step:07d}"

    @property
    def _partial(self) -> Path:
        return self._directory / f".{self._final.name}.{self._claim}.partial"

    def _prepare(self) -> None:
        with self._naming_failures():
            require_claim(self._run, self._claim)
            for left_over in self._directory.glob(".iter_*.partial"):
                self._remove(left_over)
            self._partial.mkdir(parents=True)

    def _publish(self) -> None:
        with self._naming_failures():
            shutil.copytree(self._description, self._partial, dirs_exist_ok=True)
            sync_tree(self._partial)
            require_claim(self._run, self._claim)
            marker = self._directory / _NEXT_FILE
            marker.write_text(f"{self._step}\n")
            sync(marker)
            if self._final.exists():
                self._remove(self._final)
            self._partial.rename(self._final)
            os.replace(marker, self._directory / LATEST_FILE)
            sync(self._directory)
            self._remove_old()

    def _remove_old(self) -> None:
        """All but the `keep_last` newest checkpoints and those of every `keep_every` steps."""
        last, every = self._config.keep_last, self._config.keep_every
        if last is None:
            return
        found = self._directory.glob("iter_*")
        steps = {int(path.name[5:]): path for path in found if path.name[5:].isdecimal()}
        for step in sorted(steps)[:-last]:
            if step < self._step and (every is None or step % every):
                self._remove(steps[step])

    def _remove(self, old: Path) -> None:
        """Remove a checkpoint or what is left of one: no save fails where that does."""
        doomed = old
        try:
            if not old.name.startswith("."):  # one being removed is no checkpoint any more
                doomed = old.rename(old.with_name(f".{old.name}.{self._claim}.old.partial"))
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("cannot remove %s: %s", old, _reason(error))

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        """Turn a failure to write into a UserError; rank 0 frees what the attempt took."""
        try:
            yield
        except (OSError, CheckpointException, UserError) as error:
            if platform.rank() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
                require_claim(self._run, self._claim)  # another start may have removed the attempt
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot write checkpoint {self._final}: {_reason(error)}") from error


def _reason(error: OSError | CheckpointException) -> str:
    if isinstance(error, CheckpointException):  # what went wrong is told to rank 0 only
        failures = (f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        return "; ".join(failures) or "a rank failed to write its part"
    if isinstance(error, shutil.Error):  # of copytree: (source, target, why) for each file
        return str(error.args[0][0][2])
    return error.strerror or str(error)


def keep_description(
    target: Path, architecture: Architecture, origin: Path | None, tokenizer: Path
) -> None:
    """Write what a run's checkpoints carry beside their tensors to `target`, replacing it.

    `origin`, the checkpoint that the run began from, is not needed afterwards; if it carries no
    tokenizer, the file `tokenizer` is kept. One rank calls this.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if origin is None:
            write_description(partial, architecture)
        else:
            copy_description(find_checkpoint(origin), partial, architecture)
        keep_tokenizer(partial, tokenizer)
        sync_tree(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {_reason(error)}") from error


def load_training(checkpoint: Path, model: FastWeightModel, optimizer: Any, scheduler: Any) -> None:
    """Restore weights, optimizer state and place in the schedule.

    Learning rates and the optimizer's other options stay those of the present configuration.
    """
    directory = find_checkpoint(checkpoint)
    _check_architecture(model.config.arch, directory)
    template = _training_state(model, optimizer, scheduler, is_loading=True)
    _check_optimizer(template["optimizer"], directory)
    state = _load(model, template, directory)
    model.load_state_dict(state["model"])
    options = [{name: group[name] for name in _GROUP_OPTIONS} for group in optimizer.param_groups]
    load_optimizer_state(optimizer, template["optimizer"], state["optimizer"])
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    scheduler.load_state_dict(state["scheduler"])


def _check_architecture(architecture: Architecture, directory: Path) -> None:
    """Raise UserError unless the run goes on with the model that the checkpoint holds."""
    stored, own = (
        flatten(of.to_dict()) for of in (read_description(directory).architecture, architecture)
    )
    differing = sorted(key for key in stored | own if stored.get(key) != own.get(key))
    if "family" in differing:  # all else differs with it
        differing = ["family"]
    if differing:
        named = ", ".join(f"{key} {stored.get(key)}, not {own.get(key)}" for key in differing)
        raise UserError(f"{directory} holds another model than the run asks for: {named}")


def _check_optimizer(template: dict[str, Any], directory: Path) -> None:
    """Raise UserError unless the checkpoint holds what this kind of optimizer keeps per parameter.

    Its keys are `optimizer.state.<name>.<parameter>`; the names depend on dtype and sharding.
    """

    def names(keys: Iterable[str]) -> set[str]:
        return {key.split(".")[2] for key in keys if key.startswith("optimizer.state.")}

    stored = names(read_metadata(directory).state_dict_metadata)
    if stored != names(entry.key for entry in nested_values(template) if hasattr(entry, "key")):
        raise UserError(
            f"{directory} holds the state of another optimizer: training.dtype and "
            "optimizer.use_distributed_optimizer must stay as they were when it was saved"
        )


def _training_state(
    model: FastWeightModel, optimizer: Any, scheduler: Any, *, is_loading: bool
) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=compat.checkpoint_metadata())
    return {
        "model": weights,
        "optimizer": sharded_optimizer_state(optimizer, weights, is_loading=is_loading),
        "scheduler": scheduler.state_dict(),
    }


def _load(model: FastWeightModel, template: dict[str, Any], directory: Path) -> dict[str, Any]:
    _check_weights(model.config.arch, directory)
    try:
        # what data-parallel ranks have in common is read once and handed round
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(directory)), model.pg_collection.dp_cp
        )
        return dist_checkpointing.load(template, str(directory), strategy)
    except (Exception, CheckpointException) as error:  # a damaged file may raise anything
        if isinstance(error, torch.OutOfMemoryError) or failed_elsewhere(error):
            raise
        raise UserError(
            f"checkpoint {directory} is damaged: it cannot be read ({type(error).__name__})"
        ) from error
