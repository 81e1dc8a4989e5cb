"""safetensors files read and written tensor by tensor.

The library maps whole files into memory, where every page read counts as resident, and writes only
what it holds in full. A checkpoint must pass through in the memory of its largest tensor, and an
export must restore a header byte for byte; both need the file format (8 bytes of header length, a
JSON header, the tensors back to back) in our own hands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine_mcore.errors import UserError

if TYPE_CHECKING:
    import torch

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_ITEM_BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2},
    **{"BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8},
}
# In the order in which the library lays a file out: by dtype, widest first, then by name.
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
FLOAT_DTYPES = tuple(_TORCH_NAMES)
_LAYOUT = (*FLOAT_DTYPES, *(name for name in _ITEM_BYTES if name not in FLOAT_DTYPES))


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: safetensors dtype name, shape, and bytes [begin, end) of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header: as written, and parsed, with the tensors in the order of their data."""

    text: bytes
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def data_start(self) -> int:
        return _LENGTH_BYTES + len(self.text)

    @property
    def data_bytes(self) -> int:
        return max((entry.end for entry in self.tensors.values()), default=0)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors float dtype such as `BF16`."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def safetensors_dtype(dtype: torch.dtype) -> str | None:
    """The safetensors name of a torch dtype, None if it is not one of the float dtypes."""
    name = str(dtype).removeprefix("torch.")
    return next((key for key, value in _TORCH_NAMES.items() if value == name), None)


def read_header(path: Path) -> Header:
    """The header of a whole safetensors file. Raises UserError if it is corrupt or cut short."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise UserError(f"{path} is truncated or not a safetensors file: no whole header")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    header = parse_header(text, str(path))
    expected = header.data_start + header.data_bytes
    if size != expected:
        state = "truncated" if size < expected else "corrupt"
        raise UserError(f"{path} is {state}: {size} bytes, its header asks for {expected}")
    return header


def parse_header(text: bytes, source: str) -> Header:
    """A header's JSON, checked. Raises UserError, naming `source`, on anything malformed."""
    try:
        parsed = json.loads(text)
        metadata = parsed.pop("__metadata__", None) or {}
        tensors = {name: _entry(value) for name, value in parsed.items()}
        if any(type(text) is not str for text in metadata.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{source} is corrupt: its safetensors header is malformed") from None
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in tensors.items():
        size = math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]
        if entry.begin != position or entry.end != position + size:
            raise UserError(f"{source} is corrupt: the extent of tensor {name} is wrong")
        position = entry.end
    return Header(text, tensors, metadata)


def build_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Header:
    """The header that the library would write for tensors of these (dtype, shape)."""
    widths = {dtype: (-_ITEM_BYTES[dtype], place) for place, dtype in enumerate(_LAYOUT)}
    order = sorted(tensors, key=lambda name: (widths[tensors[name][0]], name))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * _ITEM_BYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    return parse_header(text, "the new header")


def read_rows(path: Path, header: Header, name: str, start: int, rows: int) -> torch.Tensor:
    """Rows [start, start + rows) of a float tensor, in memory of their own."""
    import torch

    entry = header.tensors[name]
    tensor = torch.empty((rows, *entry.shape[1:]), dtype=torch_dtype(entry.dtype))
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    place = header.data_start + entry.begin + start * row_bytes
    _read_into(tensor.view(torch.uint8), path, place, name)
    return tensor


def read_bytes(path: Path, header: Header, name: str) -> torch.Tensor:
    """The bytes of a tensor of any dtype, in memory of their own."""
    import torch

    entry = header.tensors[name]
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    _read_into(raw, path, header.data_start + entry.begin, name)
    return raw


def _read_into(raw: torch.Tensor, path: Path, place: int, name: str) -> None:
    buffer = raw.numpy().data.cast("B") if raw.numel() else b""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(place)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise UserError(f"{path} ended while tensor {name} was read")
                buffer = buffer[count:]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def write_file(path: Path, header: Header, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Write a file tensor by tensor: `tensor_of(name)` has the dtype and shape in `header`, or is
    the tensor's bytes."""
    import torch

    with path.open("wb") as file:
        file.write(len(header.text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(header.text)
        for name, entry in header.tensors.items():
            tensor = tensor_of(name)
            assert tensor.nbytes == entry.end - entry.begin, name
            if tensor.dtype != torch.uint8:
                assert tensor.dtype == torch_dtype(entry.dtype) and tensor.shape == entry.shape, (
                    name
                )
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def _entry(value: dict[str, Any]) -> TensorEntry:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError
    _ITEM_BYTES[dtype]  # KeyError: unknown
    return TensorEntry(dtype, tuple(shape), begin, end)
