"""Token ids handed in as a safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refine_mcore.errors import UserError

_INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)


def read_token_file(path: Path, key: str, vocab_size: int) -> Tensor:
    """The tensor `key` of a safetensors file as token ids [B, T], int64. Raises UserError if it
    holds anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if key not in names:
                raise UserError(f"{path} has no tensor {key!r}, only {', '.join(names)}")
            tokens = file.get_tensor(key)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    if tokens.dim() != 2 or tokens.dtype not in _INTEGERS:
        raise UserError(
            f"{key} in {path} must hold whole numbers [batch, tokens], not "
            f"{tokens.dtype} {list(tokens.shape)}"
        )
    if min(tokens.shape) < 1 or tokens.shape[1] < 2:
        raise UserError(
            f"{key} in {path} has shape {list(tokens.shape)}: at least two tokens are needed"
        )
    tokens = tokens.long()
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        bad = int(tokens.max() if tokens.max() >= vocab_size else tokens.min())
        raise UserError(
            f"{key} in {path}: token id {bad} is outside the model's vocabulary of {vocab_size}"
        )
    return tokens
