"""Hugging Face model directory -> Megatron `torch_dist` checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from refine_mcore.conversion.description import (
    HF_CONFIG,
    HF_DIRECTORY,
    UNTOUCHED_FILE,
    write_description,
)
from refine_mcore.conversion.finite import require_finite
from refine_mcore.conversion.hf_directory import HFDirectory
from refine_mcore.conversion.output_directory import new_directory
from refine_mcore.conversion.parameters import LM_HEAD, checkpoint_shapes, embeddings_name
from refine_mcore.conversion.safetensors_file import (
    Header,
    build_header,
    read_bytes,
    read_rows,
    torch_dtype,
    write_file,
)
from refine_mcore.conversion.torch_dist import Chunk, write_checkpoint
from refine_mcore.errors import UserError

Report = Callable[[str], None]
logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1024


def import_hf(source: HFDirectory, output: Path, report: Report = logger.info) -> None:
    """Write the model as a checkpoint, dtypes kept, one tensor in memory at a time. `report` is
    told of settings that are not known, and of tensors that no text pass uses: they travel as they
    are.

    Raises UserError if a weight is not finite, if a tied `lm_head.weight` differs from the
    embedding, if tensors that become one differ in dtype, or if `output` cannot be written.
    """
    with new_directory(output) as directory:
        if source.architecture.tie_embeddings and LM_HEAD in source.file_of:
            _require_tied(source)
        shapes = checkpoint_shapes(source.parameters)
        write_checkpoint(directory, shapes, _chunks(source))
        write_description(directory, source.architecture, source.path, source.headers)
        if source.not_read:
            report(
                f"{source.path / HF_CONFIG} sets {', '.join(source.not_read)}: not known here, and "
                "left out of account"
            )
        if source.untouched:
            _pass_on(source, directory / HF_DIRECTORY / UNTOUCHED_FILE, report)


def _pass_on(source: HFDirectory, target: Path, report: Report) -> None:
    """Tensors that no text pass uses, byte for byte."""

    def header_of(name: str) -> Header:
        return source.headers[source.file_of[name]]

    entries = {name: header_of(name).tensors[name] for name in source.untouched}
    header = build_header({name: (e.dtype, e.shape) for name, e in entries.items()}, {})
    write_file(
        target,
        header,
        lambda name: read_bytes(source.path / source.file_of[name], header_of(name), name),
    )
    report(f"{len(entries)} tensors that no text pass uses travel untouched: {', '.join(entries)}")


def _chunks(source: HFDirectory) -> list[Chunk]:
    chunks: list[Chunk] = []
    dtypes: dict[str, str] = {}
    for parameter in source.parameters:
        dtype, row = source.dtype(parameter.name), 0
        for part in parameter.parts:
            if dtypes.setdefault(part.key, dtype) != dtype:
                raise UserError(
                    f"{source.path}: {parameter.name} is {dtype}, but becomes part of {part.key} "
                    f"together with a tensor of {dtypes[part.key]}"
                )
            read = partial(_read_finite, source, parameter.name, row, part.rows)
            shape = (part.rows, *parameter.shape[1:])
            chunks.append(Chunk(part.key, part.start, shape, torch_dtype(dtype), read))
            row += part.rows
    return chunks


def _read_finite(source: HFDirectory, name: str, start: int, rows: int) -> torch.Tensor:
    file = source.file_of[name]
    tensor = read_rows(source.path / file, source.headers[file], name, start, rows)
    require_finite(tensor, f"{source.path / file}: {name}")
    return tensor


def _require_tied(source: HFDirectory) -> None:
    rows, embeddings = source.architecture.vocab_size, embeddings_name(source.parameters)
    for start in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - start)
        head, embedding = (
            _read_finite(source, name, start, count) for name in (LM_HEAD, embeddings)
        )
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise UserError(
                f"{source.path}: config.json sets tie_word_embeddings, but {LM_HEAD} and "
                f"{embeddings} differ"
            )
