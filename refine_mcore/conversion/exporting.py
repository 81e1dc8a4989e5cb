"""Megatron `torch_dist` checkpoint -> Hugging Face model directory.

A checkpoint that came from HF and was not changed since gives the same files, byte for byte. One
that was trained gives the same files with new values. One that never was an HF model gives a single
weight file and a config made from its architecture, with the tokenizer it was trained with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refine_mcore.conversion.description import (
    HF_CONFIG,
    INDEX_FILE,
    SINGLE_FILE,
    UNTOUCHED_FILE,
    Description,
    copy_travellers,
    find_checkpoint,
    read_description,
    read_json_object,
)
from refine_mcore.conversion.finite import require_finite
from refine_mcore.conversion.hf_config import architecture_from_hf, hf_config
from refine_mcore.conversion.output_directory import new_directory
from refine_mcore.conversion.parameters import (
    LM_HEAD,
    VOCABULARY_KEYS,
    HFParameter,
    checkpoint_shapes,
    embeddings_name,
)
from refine_mcore.conversion.safetensors_file import (
    FLOAT_DTYPES,
    Header,
    build_header,
    read_bytes,
    read_header,
    safetensors_dtype,
    torch_dtype,
    write_file,
)
from refine_mcore.conversion.torch_dist import CheckpointReader
from refine_mcore.errors import UserError

Report = Callable[[str], None]


def export_hf(checkpoint: Path, output: Path, dtype: str | None, report: Report) -> None:
    """Write the model of `checkpoint` as an HF directory, one tensor in memory at a time.

    `dtype` (a safetensors name) converts every tensor of the text model; None keeps the dtypes
    recorded at import, or else the checkpoint's. `report` is told once if values are converted.
    Raises UserError if the checkpoint is incomplete or damaged, a value is not finite, or `output`
    cannot be written.
    """
    directory = find_checkpoint(checkpoint)
    description = read_description(directory)
    parameters = description.stored_parameters()
    table = {parameter.name: parameter for parameter in parameters}
    if description.architecture.tie_embeddings:  # a file may hold both
        table.setdefault(LM_HEAD, table[embeddings_name(parameters)])
    reader = CheckpointReader(directory)
    _require_complete(reader, parameters, directory)
    untouched = _untouched(description)
    headers = _headers(description, reader, table, parameters, untouched, dtype, directory)
    _report_conversion(headers, reader, table, report)

    with new_directory(output) as temporary:
        if description.hf_directory is not None:
            copy_travellers(description.hf_directory, temporary)
        if (
            dtype is None and description.model_type is None
        ):  # no config says what the weights are: let the new one do
            dtype = headers[SINGLE_FILE].tensors[embeddings_name(parameters)].dtype
        _write_config(description, temporary / HF_CONFIG, dtype, report)
        _update_index(temporary / INDEX_FILE, headers)
        for file, header in headers.items():

            def read(name: str, header: Header = header) -> torch.Tensor:
                if untouched is not None and name in untouched[1].tensors:
                    return read_bytes(*untouched, name)
                target = torch_dtype(header.tensors[name].dtype)
                return _read(reader, table[name], target, directory)

            write_file(temporary / file, header, read)


def _untouched(description: Description) -> tuple[Path, Header] | None:
    """The file of tensors that no text pass uses."""
    if description.hf_directory is None:
        return None
    path = description.hf_directory / UNTOUCHED_FILE
    return (path, read_header(path)) if path.is_file() else None


def _read(
    reader: CheckpointReader, parameter: HFParameter, dtype: torch.dtype, directory: Path
) -> torch.Tensor:
    tensor, row = torch.empty(parameter.shape, dtype=dtype), 0
    for part in parameter.parts:
        reader.read_rows(part.key, part.start, tensor[row : row + part.rows])
        row += part.rows
    require_finite(tensor, f"{directory}: {parameter.name} as {str(dtype).removeprefix('torch.')}")
    return tensor


def _require_complete(reader: CheckpointReader, table: list[HFParameter], directory: Path) -> None:
    """Every tensor of the model, in its shape; vocabularies may be padded."""
    for key, shape in checkpoint_shapes(table).items():
        if key not in reader:
            raise UserError(f"{directory} lacks the tensor {key}")
        stored = reader.shape(key)
        padded = key in VOCABULARY_KEYS and stored[0] >= shape[0] and stored[1:] == shape[1:]
        if stored != shape and not padded:
            raise UserError(
                f"{directory}: {key} has shape {list(stored)}, but architecture.json makes it "
                f"{list(shape)}"
            )
        if safetensors_dtype(reader.dtype(key)) is None:
            raise UserError(
                f"{directory}: {key} is {reader.dtype(key)}, not a floating-point dtype"
            )


def _headers(
    description: Description,
    reader: CheckpointReader,
    table: dict[str, HFParameter],
    parameters: list[HFParameter],
    untouched: tuple[Path, Header] | None,
    dtype: str | None,
    directory: Path,
) -> dict[str, Header]:
    """The headers to write: the original ones wherever nothing differs."""
    if not description.headers:
        tensors = {
            parameter.name: (dtype or _stored_dtype(reader, parameter), parameter.shape)
            for parameter in parameters
        }
        return {SINGLE_FILE: build_header(tensors, {"format": "pt"})}
    passed_on = untouched[1].tensors if untouched else {}
    shapes = description.stored_shapes
    expected = {parameter.name: parameter.shape for parameter in parameters}
    expected |= {name: entry.shape for name, entry in passed_on.items()}
    if LM_HEAD in shapes and LM_HEAD in table:
        expected[LM_HEAD] = table[LM_HEAD].shape
    if shapes != expected:
        raise UserError(f"{directory}: hf/ and architecture.json describe different models")

    def converted(header: Header) -> Header:
        tensors = {
            name: (entry.dtype if dtype is None or name in passed_on else dtype, entry.shape)
            for name, entry in header.tensors.items()
        }
        same = all(entry.dtype == tensors[name][0] for name, entry in header.tensors.items())
        return header if same else build_header(tensors, header.metadata)

    return {file: converted(header) for file, header in description.headers.items()}


def _stored_dtype(reader: CheckpointReader, parameter: HFParameter) -> str:
    """The widest dtype among the parts."""
    stored = (safetensors_dtype(reader.dtype(part.key)) for part in parameter.parts)
    return min((name for name in stored if name is not None), key=FLOAT_DTYPES.index)


def _report_conversion(
    headers: dict[str, Header],
    reader: CheckpointReader,
    table: dict[str, HFParameter],
    report: Report,
) -> None:
    converted = {
        (_stored_dtype(reader, table[name]), entry.dtype)
        for header in headers.values()
        for name, entry in header.tensors.items()
        if name in table
    }
    changes = sorted(f"{stored} to {written}" for stored, written in converted if stored != written)
    if changes:
        report(f"the checkpoint's values are converted from {', '.join(changes)}")


def _write_config(description: Description, path: Path, dtype: str | None, report: Report) -> None:
    """Leave the original config as it is unless training or `dtype` changed what it says."""
    config: dict[str, Any] = {}
    changed = hf_config(description.architecture, description.model_type)
    if path.exists():
        config = read_json_object(path)
        before = hf_config(architecture_from_hf(config, str(path)), description.model_type)
        changed = _difference(before, changed)
        if changed:
            report(f"config.json is changed in {', '.join(_leaves(changed))}, as the model was")
    if dtype is not None:
        changed = _merged(changed, _dtype_settings(config, dtype))
    merged = _merged(config, changed)
    if merged != config:
        path.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def _dtype_settings(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What to set in `config`, by the name of newer or older transformers; the text model of a
    larger one may say it for itself, which counts where it is loaded alone."""
    name = str(torch_dtype(dtype)).removeprefix("torch.")
    text = config.get("text_config") or {}
    inner = {key: name for key in ("dtype", "torch_dtype") if key in text}
    outer = "dtype" if "dtype" in config or "dtype" in inner else "torch_dtype"
    return {outer: name, **({"text_config": inner} if inner else {})}


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What of `after` is not so in `before`, setting by setting in nested ones too."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            value = _difference(old, value)
            if value:
                found[key] = value
        elif old != value:
            found[key] = value
    return found


def _leaves(settings: dict[str, Any]) -> list[str]:
    return sorted(
        f"{key}.{leaf}" if leaf else key
        for key, value in settings.items()
        for leaf in (_leaves(value) if isinstance(value, dict) else [""])
    )


def _merged(config: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(config[key], value)
        for key, value in changed.items()
        if isinstance(value, dict) and isinstance(config.get(key), dict)
    }
    return config | changed | nested


def _update_index(path: Path, headers: dict[str, Header]) -> None:
    """A shard index states the total size, which another dtype changes."""
    if not path.exists():
        return
    index = read_json_object(path)
    metadata = index.get("metadata")
    total = sum(header.data_bytes for header in headers.values())
    if isinstance(metadata, dict) and metadata.get("total_size", total) != total:
        metadata["total_size"] = total
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
