"""Values of the authors' objective, recorded by running their code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def reference(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "objective.safetensors")


@pytest.fixture(scope="session")
def reference_cases(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "objective.json").read_text())
