"""Each bad input ends in one sentence that names file and field, and leaves nothing behind."""

import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conversion.helpers import (
    INDEX,
    WEIGHTS,
    change_config,
    change_weights,
    copy_model,
    refusal,
    shard,
    to_checkpoint,
    to_hf,
)

NORM = "model.layers.1.attn_norm.weight"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(golden, tmp_path) -> Path:
    return copy_model(golden, "deltanet", tmp_path / "model")


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    return to_checkpoint(model, tmp_path / "checkpoint")


def refused_import(model: Path) -> str:
    return refusal(to_checkpoint, model)


def refused_export(checkpoint: Path) -> str:
    return refusal(to_hf, checkpoint)


def test_no_directory(tmp_path) -> None:
    assert "nowhere does not exist" in refused_import(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "file is not a directory" in refused_import(tmp_path / "file")


def test_config_missing(model) -> None:
    (model / "config.json").unlink()
    assert "config.json does not exist" in refused_import(model)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000])
def test_config_not_json(model, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused_import(model)


def test_unknown_model_type(model) -> None:
    change_config(model, model_type="mamba")
    assert "config.json: unknown model_type 'mamba'" in refused_import(model)


def test_truncated(model) -> None:
    content = (model / WEIGHTS).read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (model / WEIGHTS).write_bytes(content[:length])
        assert f"{WEIGHTS} is truncated" in refused_import(model)


def test_corrupt_header(model) -> None:
    content = bytearray((model / WEIGHTS).read_bytes())
    content[8:12] = b"\xff\xff\xff\xff"
    (model / WEIGHTS).write_bytes(content)
    assert f"{WEIGHTS} is corrupt" in refused_import(model)


def test_missing_tensor(model) -> None:
    change_weights(model, lambda ts: {name: t for name, t in ts.items() if name != NORM})
    assert f"lacks {NORM}" in refused_import(model)


def test_extra_tensor(model) -> None:
    change_weights(model, lambda tensors: tensors | {"model.extra": torch.zeros(2)})
    assert "holds model.extra that" in refused_import(model)


def test_misshapen_tensor(model) -> None:
    change_weights(model, lambda tensors: tensors | {NORM: torch.zeros(63)})
    message = refused_import(model)
    assert f"{NORM} has shape [63]" in message and "makes it [64]" in message


def test_integer_tensor(model) -> None:
    change_weights(model, lambda tensors: tensors | {NORM: torch.zeros(64, dtype=torch.int64)})
    assert f"{NORM} is I64" in refused_import(model)


@pytest.mark.parametrize("key, value", [("hidden_size", 32), ("intermediate_size", 25)])
def test_config_contradicts_the_tensors(model, key: str, value: int) -> None:
    change_config(model, **{key: value})
    message = refused_import(model)
    assert "has shape" in message and "config.json makes it" in message


@pytest.mark.parametrize("layers", [2, 4, 10**9])
def test_config_contradicts_the_layers(model, layers: int) -> None:
    change_config(model, num_hidden_layers=layers)
    assert "config.json" in refused_import(model)


def test_heads_do_not_divide(model) -> None:
    change_config(model, num_heads=3)
    message = refused_import(model)
    assert "config.json" in message and "num_heads" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_not_finite(model, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM] = tensors[NORM].to(dtype)
        tensors[NORM][7] = value

    change_weights(model, spoil)
    message = refused_import(model)
    assert f"{WEIGHTS}: {NORM}" in message and "not finite" in message


def test_nan_in_eight_bits(model) -> None:
    change_weights(model, lambda ts: ts | {NORM: (ts[NORM] * torch.nan).to(torch.float8_e4m3fn)})
    assert "not finite" in refused_import(model)


def test_parts_of_one_tensor_differ_in_dtype(model) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(model, lambda tensors: tensors | {name: tensors[name].half()})
    assert f"{name} is F16" in refused_import(model)


def test_tied_embeddings_that_differ(model) -> None:
    change_config(model, tie_word_embeddings=True)
    assert "tie_word_embeddings" in refused_import(model)


def test_index_names_a_missing_file(model) -> None:
    shard(model)
    next(model.glob("*00002*.safetensors")).unlink()
    message = refused_import(model)
    assert INDEX in message and "00002" in message


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", ""])
def test_index_points_elsewhere(model, file: str) -> None:
    shard(model)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"][NORM] = file
    (model / INDEX).write_text(json.dumps(index))
    assert "weight_map names" in refused_import(model)


def test_index_and_shards_disagree(model) -> None:
    shard(model)
    original = (model / INDEX).read_text()
    index = json.loads(original)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    index["weight_map"][NORM] = second if index["weight_map"][NORM] == first else first
    (model / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: {NORM} should be in" in refused_import(model)

    (model / INDEX).write_text(original)
    save_file(load_file(model / first) | {"stray": torch.zeros(1)}, model / first)
    assert f"{first} holds stray" in refused_import(model)


def test_index_without_map(model) -> None:
    shard(model)
    (model / INDEX).write_text('{"weight_map": [1]}')
    assert "weight_map must map" in refused_import(model)


class Trap:
    """Pickles as a call that would leave a mark."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_pickled_weights_are_refused_unopened(model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    message = refused_import(model)
    assert "pytorch_model.bin" in message and "safe_serialization=True" in message
    assert not Path("sprung").exists()


def test_no_weights(model) -> None:
    (model / WEIGHTS).unlink()
    assert f"has neither {WEIGHTS}" in refused_import(model)


def test_output_exists(model, checkpoint) -> None:
    with pytest.raises(Exception, match="output .*checkpoint already exists"):
        to_checkpoint(model, checkpoint)
    with pytest.raises(Exception, match="output .*model already exists"):
        to_hf(checkpoint, model)


def test_output_cannot_be_written(model, tmp_path) -> None:
    for parent in (tmp_path / "absent", model / "config.json"):
        with pytest.raises(Exception, match="output .* cannot be written"):
            to_checkpoint(model, parent / "checkpoint")


def test_not_a_checkpoint(model, tmp_path) -> None:
    assert "does not exist" in refused_export(tmp_path / "nowhere")
    assert "architecture.json" in refused_export(model)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007 does not exist" in refusal(to_hf, tmp_path)


def test_checkpoint_without_metadata(checkpoint) -> None:
    (checkpoint / ".metadata").unlink()
    assert "is not a torch_dist checkpoint" in refused_export(checkpoint)


@pytest.mark.parametrize("damage", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_damaged_metadata(checkpoint, damage: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(damage)
    assert ".metadata is damaged" in refused_export(checkpoint)


def test_metadata_that_would_run_code(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap()))
    message = refused_export(checkpoint)
    assert ".metadata is refused" in message and "mkdir" in message
    assert not Path("sprung").exists()


@pytest.mark.parametrize("damage", ["remove", "truncate", "garble"])
def test_damaged_tensor_file(checkpoint, damage: str) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(bytes(len(content)))
    assert "is damaged" in refused_export(checkpoint)


def test_checkpoint_of_another_model(checkpoint) -> None:
    path = checkpoint / "architecture.json"
    architecture = json.loads(path.read_text())
    path.write_text(json.dumps(architecture | {"hidden_size": 32}))
    assert "has shape" in refused_export(checkpoint)
    path.write_text(json.dumps(architecture | {"num_layers": 4}))
    assert "lacks the tensor decoder.layers.3" in refused_export(checkpoint)
    for field, value in (("family", "mamba"), ("hidden_size", "64"), ("mixer", {"expand_k": "1"})):
        path.write_text(json.dumps(architecture | {field: value}))
        assert "architecture.json: " in refused_export(checkpoint)
    path.write_text(json.dumps(architecture))
    (checkpoint / "hf" / "safetensors_headers" / f"{WEIGHTS}.json").write_text("{}")
    assert "describe different models" in refused_export(checkpoint)


def test_overflow_on_export(model, tmp_path) -> None:
    change_weights(model, lambda tensors: tensors | {NORM: torch.full((64,), 1e6)})
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    message = refusal(lambda *paths: to_hf(*paths, "--dtype", "float16"), checkpoint)
    assert f"{NORM} as float16" in message


def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]


def test_program_says_one_sentence(model, tmp_path) -> None:
    change_config(model, num_heads=3)
    result = run("import", "--hf", model, "--output", tmp_path / "checkpoint")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_disk_full(model, tmp_path) -> None:
    """A limit on the size of files stands in for a full disk: import, then export."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = set(tmp_path.iterdir())
    result = run("import", "--hf", model, "--output", tmp_path / "out", preexec_fn=limit)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "out cannot be written" in result.stderr
    assert set(tmp_path.iterdir()) == before

    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    before = set(tmp_path.iterdir())
    result = run(
        "export", "--checkpoint", checkpoint, "--output", tmp_path / "out", preexec_fn=limit
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "out cannot be written" in result.stderr
    assert set(tmp_path.iterdir()) == before


def test_input_is_checked_before_anything_heavy_is_loaded(model) -> None:
    code = (
        "import sys; from pathlib import Path; import tools.convert_hf as tool;"
        "from refine_mcore.conversion.hf_directory import open_hf_directory;"
        "open_hf_directory(Path(sys.argv[1]));"
        "assert not {'torch', 'numpy', 'megatron'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(model)]
    subprocess.run(command, check=True, cwd=ROOT)
