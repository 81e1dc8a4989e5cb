"""What travels inside a checkpoint beside its tensors: the architecture and its HF origin.

    architecture.json            the `Architecture`, for whoever loads the checkpoint
    hf/                          config.json and tokenizer files, byte for byte
    hf/safetensors_headers/      the header of each original weight file, so that an export has the
                                 same files, names, dtypes and order
    hf/untouched.safetensors     the original tensors that no text pass uses, if there are any

A training run that starts from a converted checkpoint passes all of it on with `copy_description`.
"""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine_mcore.conversion.parameters import (
    HFParameter,
    hf_parameter_map,
    with_stored_cuts,
    with_stored_names,
)
from refine_mcore.conversion.safetensors_file import Header, parse_header
from refine_mcore.errors import UserError
from refine_mcore.models.architecture import Architecture

ARCHITECTURE_FILE = "architecture.json"
HF_DIRECTORY = "hf"
HF_CONFIG = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
UNTOUCHED_FILE = "untouched.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_HEADERS = "safetensors_headers"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_GENERATION_CONFIG = "generation_config.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"

# Configuration and tokenizers; never code, never pickles.
_TRAVELLERS = (
    HF_CONFIG,
    _GENERATION_CONFIG,
    "tokenizer.json",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",  # these three: what a vision tower's inputs are made with
    "video_preprocessor_config.json",
    "processor_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    INDEX_FILE,
)


@dataclass(frozen=True)
class Description:
    """A checkpoint's architecture, its `hf` directory if it has one, and the original headers."""

    architecture: Architecture
    hf_directory: Path | None
    headers: dict[str, Header]

    @property
    def model_type(self) -> str | None:
        """The `model_type` of the HF config, if there is one."""
        if self.hf_directory is None or not (self.hf_directory / HF_CONFIG).is_file():
            return None
        found = read_json_object(self.hf_directory / HF_CONFIG).get("model_type")
        return found if isinstance(found, str) else None

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the original files' tensors, by name."""
        return {
            name: entry.shape
            for header in self.headers.values()
            for name, entry in header.tensors.items()
        }

    def parameters(self) -> list[HFParameter]:
        """The HF parameters as the class has them, under the names of the original files."""
        table = hf_parameter_map(self.architecture, self.model_type)
        return with_stored_names(table, self.stored_shapes)

    def stored_parameters(self) -> list[HFParameter]:
        """The same, cut as the original files cut them."""
        return with_stored_cuts(self.parameters(), self.stored_shapes)


def write_description(
    directory: Path,
    architecture: Architecture,
    hf_source: Path | None = None,
    headers: dict[str, Header] | None = None,
) -> None:
    """Write the description into a checkpoint directory; the HF files come from `hf_source`."""
    text = json.dumps(architecture.to_dict(), indent=2)
    (directory / ARCHITECTURE_FILE).write_text(text + "\n")
    if hf_source is None:
        return
    hf = directory / HF_DIRECTORY
    (hf / _HEADERS).mkdir(parents=True)
    copy_travellers(hf_source, hf)
    for name, header in (headers or {}).items():
        (hf / _HEADERS / f"{name}.json").write_bytes(header.text)


def copy_description(source: Path, target: Path, architecture: Architecture) -> None:
    """Pass a checkpoint's HF files on to the checkpoint `target`, now of `architecture`."""
    write_description(target, architecture)
    # without permissions: what comes from a checkpoint kept read-only must be removable again
    for file in (source / HF_DIRECTORY).rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer file of a Hugging Face directory, if it has one."""
    found = (directory / name for name in TOKENIZER_FILES)
    return next((path for path in found if path.is_file()), None)


def keep_tokenizer(directory: Path, tokenizer: Path) -> None:
    """Give the description in `directory` the tokenizer file of its run, unless it has one: under
    the name and with the settings by which transformers' AutoTokenizer knows it."""
    hf = directory / HF_DIRECTORY
    if find_tokenizer(hf) is not None:
        return
    hf.mkdir(exist_ok=True)
    is_json = tokenizer.suffix == ".json"
    shutil.copyfile(tokenizer, hf / ("tokenizer.json" if is_json else "tokenizer.model"))
    beside = tokenizer.with_name(_TOKENIZER_CONFIG)
    if is_json and beside.is_file():
        shutil.copyfile(beside, hf / _TOKENIZER_CONFIG)
        return
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not is_json:
        settings = _sentencepiece_settings(tokenizer)
    (hf / _TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _sentencepiece_settings(tokenizer: Path) -> dict[str, Any]:
    """By which transformers reads a SentencePiece model as training does: without BOS and EOS, with
    a blank before a text only if the model asks for one."""
    generated: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = generated.ModelProto()
    model.ParseFromString(tokenizer.read_bytes())
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": model.normalizer_spec.add_dummy_prefix,
        "legacy": False,
    }


def own_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer file that a checkpoint carries, if it does."""
    return find_tokenizer(find_checkpoint(checkpoint) / HF_DIRECTORY)


def end_token_ids(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text by the generation settings that the checkpoint or description in
    `directory` carries; none without such settings. Raises UserError for bad ones."""
    path = directory / HF_DIRECTORY / _GENERATION_CONFIG
    try:
        found = read_json_object(path).get("eos_token_id")
    except FileNotFoundError:
        return ()
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them, not {found!r}")
    return tuple(ids)


def read_description(directory: Path) -> Description:
    """The description of a checkpoint. Raises UserError if it is absent or damaged."""
    path = directory / ARCHITECTURE_FILE
    try:
        data = read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{directory} does not say what model it holds: no {path.name}") from None
    try:
        architecture = Architecture.from_dict(data)
    except (UserError, TypeError) as error:  # TypeError: a value of another type
        raise UserError(f"{path}: {error}") from None
    hf = directory / HF_DIRECTORY
    headers = {}
    for file in sorted((hf / _HEADERS).glob("*.json")):
        headers[file.name.removesuffix(".json")] = parse_header(file.read_bytes(), str(file))
    return Description(architecture, hf if hf.is_dir() else None, headers)


def copy_travellers(source: Path, target: Path) -> None:
    """Copy the configuration and tokenizer files that `source` has."""
    for pattern in _TRAVELLERS:
        for file in source.glob(pattern):
            if file.is_file():
                try:
                    content = file.read_bytes()
                except OSError as error:
                    raise UserError(f"{file} cannot be read: {error.strerror}") from None
                (target / file.name).write_bytes(content)


def find_checkpoint(path: Path) -> Path:
    """`path`, or the newest iteration of a training run's checkpoint directory.

    Raises UserError if `path` is no directory, or its record of the newest iteration is unusable.
    """
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {path} {state}")
    latest = path / LATEST_FILE
    if not latest.is_file():
        of_run = path / "checkpoints"
        if (of_run / LATEST_FILE).is_file():
            raise UserError(f"{path} is the directory of a run: its checkpoints are in {of_run}")
        return path
    text = latest.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise UserError(f"{latest} should hold an iteration number, not {text[:40]!r}")
    iteration = path / f"iter_{int(text):07d}"
    if not iteration.is_dir():
        raise UserError(f"{latest} names iteration {text}, but {iteration} does not exist")
    return iteration


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises FileNotFoundError, and UserError for bad content."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold a JSON object")
    return data
