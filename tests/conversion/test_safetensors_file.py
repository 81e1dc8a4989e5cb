"""The safetensors format in our own hands: equal to the library's, and strict."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from refine_mcore.conversion.safetensors_file import (
    FLOAT_DTYPES,
    build_header,
    read_header,
    read_rows,
    safetensors_dtype,
    torch_dtype,
    write_file,
)
from refine_mcore.errors import UserError

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
FILES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.tuples(st.sampled_from(FLOAT_DTYPES), SHAPES),
    min_size=1,
    max_size=6,
).filter(lambda tensors: "__metadata__" not in tensors)


def random_tensors(specification: dict[str, tuple[str, tuple[int, ...]]]) -> dict:
    return {
        name: torch.randn(shape).to(torch_dtype(dtype))
        for name, (dtype, shape) in specification.items()
    }


@given(FILES)
def test_written_as_the_library_writes(tmp_path_factory, specification) -> None:
    directory: Path = tmp_path_factory.mktemp("files")
    tensors = random_tensors(specification)
    save_file(tensors, directory / "library", {"format": "pt"})
    write_file(
        directory / "ours", build_header(specification, {"format": "pt"}), tensors.__getitem__
    )
    assert (directory / "ours").read_bytes() == (directory / "library").read_bytes()


@given(FILES, st.data())
def test_reads_any_rows(tmp_path_factory, specification, data) -> None:
    path: Path = tmp_path_factory.mktemp("files") / "file"
    tensors = random_tensors(specification)
    save_file(tensors, path)
    header = read_header(path)
    assert sorted(header.tensors) == sorted(tensors)
    for name, tensor in load_file(path).items():
        assert safetensors_dtype(tensor.dtype) == header.tensors[name].dtype
        start = data.draw(st.integers(0, tensor.shape[0] - 1))
        rows = data.draw(st.integers(1, tensor.shape[0] - start))
        found = read_rows(path, header, name, start, rows)
        expected = tensor[start : start + rows]
        assert found.dtype == tensor.dtype and found.shape == expected.shape
        assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


@given(st.integers(1, 10_000))
def test_truncated_anywhere(tmp_path_factory, missing: int) -> None:
    path: Path = tmp_path_factory.mktemp("files") / "file"
    save_file({"a": torch.zeros(4), "b": torch.zeros(3, 2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 1 - missing % len(whole)])
    with pytest.raises(UserError, match="truncated"):
        read_header(path)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_damage_is_never_a_crash(tmp_path_factory, position: int, damage: bytes) -> None:
    path: Path = tmp_path_factory.mktemp("files") / "file"
    save_file({"a": torch.zeros(4), "b": torch.zeros(3, 2)}, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    position %= len(content) - len(damage)
    content[position : position + len(damage)] = damage
    path.write_bytes(content)
    try:
        read_header(path)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": 5}',
        b"[" * 100_000,
    ],
)
def test_malformed_header(tmp_path, text: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UserError, match="corrupt"):
        read_header(path)
