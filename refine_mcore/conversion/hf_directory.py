"""An HF model directory, checked against its own config before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from refine_mcore.conversion.description import (
    HF_CONFIG,
    INDEX_FILE,
    SINGLE_FILE,
    read_json_object,
)
from refine_mcore.conversion.hf_config import architecture_from_hf, settings_not_read
from refine_mcore.conversion.parameters import (
    LM_HEAD,
    HFParameter,
    embeddings_name,
    hf_parameter_map,
    names_of,
    with_stored_cuts,
    with_stored_names,
)
from refine_mcore.conversion.safetensors_file import FLOAT_DTYPES, Header, read_header
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture


@dataclass(frozen=True)
class HFDirectory:
    """A directory whose tensors are exactly those of its config: names, shapes, float dtypes; and
    those that no text pass uses, as they are."""

    path: Path
    architecture: Architecture
    parameters: list[HFParameter]
    headers: dict[str, Header]  # by file name
    file_of: dict[str, str]  # tensor name -> file name
    untouched: tuple[str, ...]  # names of the tensors that no text pass uses
    not_read: list[str]  # settings of the config that nothing here knows

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor."""
        return self.headers[self.file_of[name]].tensors[name].dtype


def open_hf_directory(path: Path) -> HFDirectory:
    """Read config and headers. Raises UserError on anything that does not fit together."""
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"HF model {path} {state}")
    config_path = path / HF_CONFIG
    try:
        config = read_json_object(config_path)
    except FileNotFoundError:
        raise UserError(f"{config_path} does not exist") from None
    architecture = architecture_from_hf(config, str(config_path))
    headers, file_of = _open_weights(path)
    if architecture.num_layers > len(file_of):  # before a table of that many layers is made
        raise UserError(
            f"{config_path}: num_hidden_layers {architecture.num_layers} contradicts the weights, "
            f"which are {len(file_of)} tensors"
        )
    model_type = config["model_type"]
    shapes = {name: headers[file].tensors[name].shape for name, file in file_of.items()}
    parameters = with_stored_names(hf_parameter_map(architecture, model_type), shapes)
    parameters = with_stored_cuts(parameters, shapes)
    passed_on = names_of(model_type).untouched
    untouched = tuple(name for name in file_of if name.startswith(passed_on)) if passed_on else ()
    not_read = settings_not_read(config)
    directory = HFDirectory(path, architecture, parameters, headers, file_of, untouched, not_read)
    _compare(directory)
    return directory


def _open_weights(path: Path) -> tuple[dict[str, Header], dict[str, str]]:
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file():
        header = read_header(single)
        return {SINGLE_FILE: header}, dict.fromkeys(header.tensors, SINGLE_FILE)
    if index.is_file():
        return _open_shards(path, index)
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{path} has {pickles[0]} but no {SINGLE_FILE}: pickles are never opened, so make "
            "safetensors first, with save_pretrained(DIR, safe_serialization=True) in transformers"
        )
    raise UserError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _open_shards(path: Path, index: Path) -> tuple[dict[str, Header], dict[str, str]]:
    file_of = read_json_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    headers = {}
    for name in sorted(set(file_of.values())):
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{index}: weight_map names {name}, which is not a file of {path}")
        headers[name] = read_header(path / name)
    for tensor, name in file_of.items():
        if tensor not in headers[name].tensors:
            raise UserError(f"{index}: {tensor} should be in {name}, which does not hold it")
    for name, header in headers.items():
        for tensor in header.tensors:
            if file_of.get(tensor) != name:
                raise UserError(
                    f"{path / name} holds {tensor}, which {index.name} does not place there"
                )
    return headers, file_of


def _compare(directory: HFDirectory) -> None:
    """The tensors must be those of the config."""
    path, config = directory.path, directory.path / HF_CONFIG
    expected = {parameter.name: parameter.shape for parameter in directory.parameters}
    if directory.architecture.tie_embeddings and LM_HEAD in directory.file_of:
        expected[LM_HEAD] = expected[embeddings_name(directory.parameters)]
    missing = [name for name in expected if name not in directory.file_of]
    if missing:
        raise UserError(f"{path} lacks {_count(missing)} that {config} asks for")
    extra = [n for n in directory.file_of if n not in expected and n not in directory.untouched]
    if extra:
        raise UserError(f"{path} holds {_count(extra)} that {config} has no place for")
    for name in expected:
        file = directory.file_of[name]
        entry = directory.headers[file].tensors[name]
        if entry.shape != expected[name]:
            raise UserError(
                f"{path / file}: {name} has shape {list(entry.shape)}, "
                f"but {config} makes it {list(expected[name])}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{path / file}: {name} is {entry.dtype}, weights must be one of "
                f"{', '.join(FLOAT_DTYPES)}"
            )


def _count(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors (first {names[0]})"
