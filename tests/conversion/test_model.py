"""The converted checkpoint and the real model agree: load, save, export, and every byte is back."""

from pathlib import Path

import pytest
import torch

from refine_mcore import compat
from refine_mcore.conversion.description import copy_description, read_description
from refine_mcore.models.fast_weight_model import build_model
from refine_mcore.models.transformer_config import transformer_config
from refine_mcore.training.checkpointing import load_weights
from tests.conversion.helpers import HYBRIDS, MODELS, copy_model, files, to_checkpoint, to_hf


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_through_the_model(golden, tmp_path: Path, single_rank, name: str) -> None:
    from megatron.core.dist_checkpointing import save

    source = copy_model(golden, name, tmp_path / "model")
    imported = to_checkpoint(source, tmp_path / "imported")
    architecture = read_description(imported).architecture
    model = build_model(transformer_config(architecture, dtype=torch.float32), single_rank)
    load_weights(model, imported)

    saved = tmp_path / "saved"
    saved.mkdir()
    save({"model": model.sharded_state_dict(metadata=compat.checkpoint_metadata())}, str(saved))
    copy_description(imported, saved, architecture)
    assert files(to_hf(saved, tmp_path / "exported")) == files(source)
