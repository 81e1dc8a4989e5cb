"""Token ids from a safetensors file, in every integer dtype; bad files are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refine_mcore.data.token_file import read_token_file
from refine_mcore.errors import UserError

IDS = torch.tensor([[0, 5, 96], [3, 3, 2]])
DTYPES = [f"{sign}int{bits}" for sign in ("u", "") for bits in (8, 16, 32, 64)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Good and bad tensors under descriptive names."""
    path = tmp_path / "tokens.safetensors"
    good = {f"torch.{dtype}": IDS.to(getattr(torch, dtype)) for dtype in DTYPES}
    bad = {
        "float": IDS.float(),
        "complex": IDS.to(torch.complex64),
        "bool": IDS > 3,
        "flat": IDS[0].clone(),
        "cube": IDS[None].clone(),
        "one token": IDS[:, :1].clone(),
        "no text": IDS[:0].clone(),
        "negative": IDS - 1,
        "large": IDS + 1,
    }
    save_file(good | bad, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_integers(file: Path, dtype: str) -> None:
    tokens = read_token_file(file, f"torch.{dtype}", vocab_size=97)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, IDS)


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("float", "must hold whole numbers [batch, tokens], not torch.float32 [2, 3]"),
        ("complex", "must hold whole numbers [batch, tokens], not torch.complex64 [2, 3]"),
        ("bool", "must hold whole numbers [batch, tokens], not torch.bool [2, 3]"),
        ("flat", "must hold whole numbers [batch, tokens], not torch.int64 [3]"),
        ("cube", "must hold whole numbers [batch, tokens], not torch.int64 [1, 2, 3]"),
        ("one token", "has shape [2, 1]: at least two tokens are needed"),
        ("no text", "has shape [0, 3]: at least two tokens are needed"),
        ("negative", "token id -1 is outside the model's vocabulary of 97"),
        ("large", "token id 97 is outside the model's vocabulary of 97"),
    ],
)
def test_refuses_other_tensors(file: Path, key: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        read_token_file(file, key, vocab_size=97)
    message = str(error.value)
    assert complaint in message and key in message and str(file) in message


def test_names_what_the_file_has(file: Path) -> None:
    with pytest.raises(UserError, match="has no tensor 'ids', only bool, complex, cube, flat"):
        read_token_file(file, "ids", vocab_size=97)


def test_refuses_other_files(file: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no.safetensors"
    text = tmp_path / "text"
    text.write_text("not tensors")
    os.truncate(file, file.stat().st_size - 1)
    for path, complaint in (
        (missing, f"{missing} does not exist"),
        (text, f"{text} is not a readable safetensors file"),
        (file, f"{file} is not a readable safetensors file"),
        (tmp_path, f"{tmp_path} is not a readable safetensors file"),
    ):
        with pytest.raises(UserError) as error:
            read_token_file(path, "ids", vocab_size=97)
        assert str(error.value).startswith(complaint)
        assert "\n" not in str(error.value)
