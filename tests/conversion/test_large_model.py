"""Models of 1.3B and 4.2B parameters convert in and out in little memory:
`pytest -m slow tests/conversion`.

Needs 11 GB of disk in fp32, half of it in bf16, and 17 GB for the larger one in bf16.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from refine_mcore.conversion import hf_config, hf_parameter_map
from refine_mcore.conversion.safetensors_file import build_header, torch_dtype, write_file
from refine_mcore.models.presets import preset
from tests.conversion.helpers import WEIGHTS

ROOT = Path(__file__).parents[2]
GIGABYTE = 1 << 30


def random_model(directory: Path, name: str, dtype: str) -> int:
    """Write a random model of a preset; the size of its largest tensor in bytes."""
    architecture = preset(name)
    table = {
        parameter.name: (dtype, parameter.shape) for parameter in hf_parameter_map(architecture)
    }
    header = build_header(table, {"format": "pt"})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf_config(architecture)))

    def draw(name: str) -> torch.Tensor:
        return torch.rand(table[name][1], dtype=torch_dtype(dtype))

    write_file(directory / WEIGHTS, header, draw)
    return max(entry.end - entry.begin for entry in header.tensors.values())


def peak_memory(*arguments: str | Path) -> int:
    """Run the converter; its largest resident memory in bytes."""
    command = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), *map(str, arguments)]
    begin = time.monotonic()
    child = os.posix_spawn(sys.executable, command, os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    seconds = time.monotonic() - begin
    print(f"{arguments[0]}: {usage.ru_maxrss / 2**20:.2f} GB resident, {seconds:.0f} s")
    return usage.ru_maxrss * 1024


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("deltanet-1.3b", "BF16"), ("deltanet-1.3b", "F32"), ("qwen3.5-4b", "BF16")],
)
def test_memory(tmp_path, name: str, dtype: str) -> None:
    model, checkpoint, exported = (tmp_path / name for name in ("model", "checkpoint", "exported"))
    limit = random_model(model, name, dtype) + 2 * GIGABYTE
    original = digest(model / WEIGHTS)
    assert peak_memory("import", "--hf", model, "--output", checkpoint) <= limit
    shutil.rmtree(model)
    assert peak_memory("export", "--checkpoint", checkpoint, "--output", exported) <= limit
    assert digest(exported / WEIGHTS) == original
    shutil.rmtree(checkpoint)
    shutil.rmtree(exported)
