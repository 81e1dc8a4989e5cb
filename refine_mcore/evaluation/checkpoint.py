"""A checkpoint's model and tokenizer for use, on all ranks started: what ends its texts, and what
distinguishes its figures from those of another."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from refine_mcore import platform
from refine_mcore.config import Config
from refine_mcore.conversion.description import end_token_ids, own_tokenizer
from refine_mcore.data import Tokenizer, load_tokenizer
from refine_mcore.data.tokenizer import check_vocabulary
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import LaCTOptions
from refine_mcore.models.fast_weight_model import LanguageModel
from refine_mcore.models.whole_model import whole_model
from refine_mcore.training.setup import resolve_architecture, training_model, with_one_checkpoint

logger = logging.getLogger(__name__)

# Tokenizers that cut it alike are taken for the same.
_SAMPLE = "Some special magic numbers are hidden, 1234567; naïve readers of 日本 may miss them."


class Opened(NamedTuple):
    """A model, its tokenizer, the tokens that end its texts, and the configuration that names this
    checkpoint and no later one of the same run."""

    model: LanguageModel
    tokenizer: Tokenizer
    end_tokens: frozenset[int]
    config: Config


@contextmanager
def open_checkpoint(config: Config, tokenizer: str | None) -> Iterator[Opened]:
    """The model of `model.checkpoint` in the layout of `parallel`, which takes all ranks started,
    and `tokenizer`, or else the one that the checkpoint carries.

    Raises UserError if the number of ranks is another, the checkpoint cannot be read, there is no
    tokenizer, or it cannot be the model's.
    """
    platform.let_messages_overlap(config.parallel.pipeline)
    platform.initialize()
    parallel = config.parallel
    with platform.distributed(parallel.timeout):
        config = with_one_checkpoint(config)
        directory = checkpoint_directory(config)
        found = tokenizer or own_tokenizer(directory)
        if found is None:
            raise UserError(
                f"checkpoint {directory} carries no tokenizer: name one with --tokenizer"
            )
        loaded = load_tokenizer(found)
        vocab_size = resolve_architecture(config).vocab_size
        check_vocabulary(config.data, str(found), loaded.vocab_size, vocab_size)
        if dist.get_world_size() != parallel.tensor * parallel.pipeline:
            raise UserError(
                f"parallel.tensor x parallel.pipeline = {parallel.tensor * parallel.pipeline} "
                f"ranks, but {dist.get_world_size()} were started"
            )
        groups = platform.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, config.training.seed
        )
        model = whole_model(training_model(config, groups))
        yield Opened(model, loaded, end_tokens(loaded, directory), config)


def end_tokens(tokenizer: Tokenizer, checkpoint: Path | None) -> frozenset[int]:
    """What ends a response: the tokenizer's EOS, and what the generation settings of the
    checkpoint, if there is one, name. A warning says that there is nothing."""
    of_checkpoint = () if checkpoint is None else end_token_ids(checkpoint)
    found = {*of_checkpoint, *([] if tokenizer.eos_id < 0 else [tokenizer.eos_id])}
    if not found and platform.rank() == 0:
        logger.warning(
            "neither the tokenizer nor generation settings (%s) name a token that ends a text: "
            "every response goes on for as long as it may",
            checkpoint,
        )
    return frozenset(found)


def identity(config: Config, tokenizer: Tokenizer, files: Iterable[Path]) -> dict[str, Any]:
    """What figures depend on beside the settings of a task: the checkpoint and `files` by place,
    size and time as the first rank sees them, the architecture with all overrides, the arithmetic
    and the tokenizer. All ranks call this. Raises UserError for a file that is not there."""

    def found() -> dict[str, Any]:
        directory = checkpoint_directory(config)
        return {
            "checkpoint": _stamps(path for path in sorted(directory.rglob("*")) if path.is_file()),
            "architecture": resolve_architecture(config).to_dict(),
            "arithmetic": arithmetic(config),
            "tokenizer": tokenizer.text_to_ids(_SAMPLE),
            "files": _stamps(files),
        }

    return platform.on_first_rank(found)


def arithmetic(config: Config) -> dict[str, str]:
    """The settings that say what a model computes in, by name; of LaCT those of its own too."""
    found: dict[str, str] = {"training.dtype": config.training.dtype}
    mixer = resolve_architecture(config).mixer
    if isinstance(mixer, LaCTOptions):
        found["model.fast_weight_matmul"] = config.model.fast_weight_matmul or config.training.dtype
        if mixer.use_muon:
            found["mixer.muon_dtype"] = mixer.muon_dtype
    return found


def checkpoint_directory(config: Config) -> Path:
    """Of a configuration that names one checkpoint."""
    assert config.model.checkpoint is not None
    return Path(config.model.checkpoint)


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Place, size and time of files."""
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        found.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    return found
