"""Model directories to convert, and spoiled copies of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from refine_mcore.errors import UserError
from tools.convert_hf import main

MODELS = (
    "deltanet",
    "deltanet_hybrid",
    "gated_deltanet",
    "lact_full_muon",
    "lact_lowrank_momentum",
    "lact_lowrank_momentum_muon",
)
HYBRIDS = ("olmo_hybrid", "qwen35_text", "qwen35_vl_tied")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def reference(golden: Path, name: str) -> Path:
    """The folder of a reference model."""
    return golden / ("hybrids" if name in HYBRIDS else "models") / name


def copy_model(golden: Path, name: str, target: Path) -> Path:
    """A writable copy of a reference model: config, generation config and weights."""
    target.mkdir()
    for file in ("config.json", "generation_config.json", WEIGHTS):
        shutil.copyfile(reference(golden, name) / file, target / file)
    return target


def change_weights(model: Path, change: Callable[[Tensors], Any]) -> None:
    """Apply `change` to the dictionary of tensors, in place or by returning another."""
    tensors = load_file(model / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file(tensors, model / WEIGHTS, {"format": "pt"})


def change_config(model: Path, **settings: object) -> None:
    """Set entries of config.json; `...` removes one."""
    config = json.loads((model / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not ...}
    (model / "config.json").write_text(json.dumps(config))


def shard(model: Path, files: int = 3) -> None:
    """Split the weights over several files with an index, as transformers does."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (model / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def to_checkpoint(model: Path, checkpoint: Path) -> Path:
    """Import `model`."""
    main(["import", "--hf", str(model), "--output", str(checkpoint)])
    return checkpoint


def to_hf(checkpoint: Path, output: Path, *options: str) -> Path:
    """Export `checkpoint`."""
    main(["export", "--checkpoint", str(checkpoint), "--output", str(output), *options])
    return output


def files(directory: Path) -> dict[str, bytes]:
    """Every file's content."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def refusal(convert: Callable[[Path, Path], Path], source: Path) -> str:
    """The sentence with which converting `source` is refused; nothing may be left behind."""
    output = source.parent / "refused"
    before = set(source.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert(source, output)
    assert set(source.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message
