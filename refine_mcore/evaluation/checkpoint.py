"""A checkpoint's model and tokenizer for use: generation and evaluation, on all ranks started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from refine_mcore import platform
from refine_mcore.config import Config
from refine_mcore.conversion.description import find_checkpoint, own_tokenizer
from refine_mcore.data import Tokenizer, load_tokenizer
from refine_mcore.data.tokenizer import check_vocabulary
from refine_mcore.errors import UserError
from refine_mcore.models.fast_weight_model import LanguageModel
from refine_mcore.models.whole_model import whole_model
from refine_mcore.training.setup import resolve_architecture, training_model


@contextmanager
def open_checkpoint(
    config: Config, tokenizer: str | None
) -> Iterator[tuple[LanguageModel, Tokenizer]]:
    """The model of `model.checkpoint` in the layout of `parallel`, which takes all ranks started,
    and `tokenizer`, or else the one that the checkpoint carries.

    Raises UserError if the number of ranks is another, the checkpoint cannot be read, there is no
    tokenizer, or it cannot be the model's.
    """
    assert config.model.checkpoint is not None
    platform.let_messages_overlap(config.parallel.pipeline)
    platform.initialize()
    found = tokenizer or own_tokenizer(find_checkpoint(Path(config.model.checkpoint)))
    if found is None:
        raise UserError(
            f"checkpoint {config.model.checkpoint} carries no tokenizer: name one with --tokenizer"
        )
    loaded = load_tokenizer(found)
    vocab_size = resolve_architecture(config).vocab_size
    check_vocabulary(config.data, str(found), loaded.vocab_size, vocab_size)
    parallel = config.parallel
    with platform.distributed(parallel.timeout):
        if dist.get_world_size() != parallel.tensor * parallel.pipeline:
            raise UserError(
                f"parallel.tensor x parallel.pipeline = {parallel.tensor * parallel.pipeline} "
                f"ranks, but {dist.get_world_size()} were started"
            )
        groups = platform.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, config.training.seed
        )
        yield whole_model(training_model(config, groups)), loaded
