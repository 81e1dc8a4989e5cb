"""Megatron `torch_dist` checkpoints written and read a tensor at a time, without a process group.

The only module of the package that knows torch.distributed.checkpoint (DCP) and what megatron-core
0.16.1 expects beside it. DCP's planners and storage are driven step by step rather than through
`save` and `load`, which want every tensor at once. Megatron itself is not needed.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    Metadata,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from refine_mcore.errors import UserError

Shape = tuple[int, ...]

METADATA_FILE = ".metadata"
_BACKEND_FILE = "metadata.json"
_DATA_FILE = "__0_0.distcp"
_COMMON_FILE = "common.pt"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """Rows [start, start + shape[0]) of the tensor `key`; `read` fetches them when they are due."""

    key: str
    start: int
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def write_checkpoint(directory: Path, shapes: Mapping[str, Shape], chunks: Sequence[Chunk]) -> None:
    """Write `chunks`, which together fill tensors of global `shapes`, into the empty `directory`.

    Holds one chunk in memory at a time; DCP's own writer would keep every tensor of a file until
    the file is complete. Raises OSError if the disk is full.
    """
    items = [_write_item(chunk, shapes[chunk.key]) for chunk in chunks]
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    [plan], metadata = create_default_global_save_plan([SavePlan(items)])
    results = []
    with (directory / _DATA_FILE).open("wb") as file:
        for item, chunk in zip(plan.items, chunks, strict=True):
            begin = file.tell()
            _save(chunk.read(), file)
            length = file.tell() - begin
            results.append(WriteResult(item.index, length, _StorageInfo(_DATA_FILE, begin, length)))
        file.flush()
        os.fsync(file.fileno())
    writer.finish(metadata, [results])
    with (directory / _COMMON_FILE).open("wb") as file:
        _save({}, file)
    (directory / _BACKEND_FILE).write_text(json.dumps(_BACKEND))


def most_precise_key(key: str, stored: Container[str]) -> str:
    """The checkpoint key to read parameter `key` from: the optimizer's fp32 main copy if there is
    one, since a bf16 run's weights are that copy rounded."""
    copies = (f"optimizer.state.{name}.{key}" for name in ("fp32_param", "param"))
    return next((copy for copy in copies if copy in stored), key)


class CheckpointReader:
    """Reads single parameters of a checkpoint that was written at any parallel layout, from their
    most precise copy."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError if `directory` holds no readable torch_dist checkpoint."""
        self._directory = directory
        metadata = read_metadata(directory)
        self._tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> Shape:
        return tuple(self._stored(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._stored(key).properties.dtype

    def _stored(self, key: str) -> TensorStorageMetadata:
        return self._tensors[most_precise_key(key, self._tensors)]

    def read_rows(self, key: str, start: int, target: torch.Tensor) -> None:
        """Fill `target` with rows from `start` on, converted to its dtype."""
        stored = self._stored(key)
        offsets = torch.Size((start, *(0 for _ in target.shape[1:])))
        wanted = ChunkStorageMetadata(offsets, target.shape)
        source = most_precise_key(key, self._tensors)
        items = create_read_items_for_chunk_list(source, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise UserError(f"{self._directory} holds only a part of {key}")
        try:
            self._reader.read_data(LoadPlan(items), _IntoTarget(target))
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"{self._directory} is damaged: {key} cannot be read") from error


def read_metadata(directory: Path) -> Metadata:
    """The `.metadata` of a checkpoint, unpickled without running anything that is not DCP's own.

    Raises UserError if the file is absent, damaged, or refers to any other code.
    """
    path = directory / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(
            f"{directory} is not a torch_dist checkpoint: it has no {METADATA_FILE}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except _Forbidden as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{path} is damaged") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise UserError(f"{path} is damaged: it does not describe a checkpoint")
    return metadata


class _Forbidden(Exception):
    """The pickle refers to something that no checkpoint's metadata needs."""


class _MetadataUnpickler(pickle.Unpickler):
    _ALLOWED: dict[str, frozenset[str]] = {
        "pathlib": frozenset({"Path", "PosixPath"}),
        "pathlib._local": frozenset({"Path", "PosixPath"}),  # Python 3.13
        "torch": frozenset({"Size"}),
        "torch.serialization": frozenset({"_get_layout"}),
        "torch.distributed.checkpoint.metadata": frozenset(
            {
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            }
        ),
        "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
        "torch.distributed.checkpoint.planner": frozenset(
            {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if name in self._ALLOWED.get(module, ()):
            found = super().find_class(module, name)
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise _Forbidden(f"it refers to {module}.{name}, which is no checkpoint metadata")
        return found


class _IntoTarget(DefaultLoadPlanner):
    """Lets the reader write into one given tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        del index
        return self._target


def _save(content: object, file: IO[bytes]) -> None:
    """torch.save, whose complaint about a failed write hides the reason of the failure."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write_item(chunk: Chunk, shape: Shape) -> WriteItem:
    offsets = torch.Size((chunk.start, *(0 for _ in shape[1:])))
    return WriteItem(
        MetadataIndex(chunk.key, offsets),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(offsets, torch.Size(chunk.shape)),
            TensorProperties(dtype=chunk.dtype),
            torch.Size(shape),
        ),
    )
