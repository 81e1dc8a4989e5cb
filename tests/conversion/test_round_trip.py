"""Import then export restores every byte, and what lies between is a Megatron checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refine_mcore import compat
from refine_mcore.conversion import (
    architecture_from_hf,
    checkpoint_shapes,
    hf_parameter_map,
    to_hf_tensors,
)
from refine_mcore.conversion.description import (
    copy_description,
    read_description,
    write_description,
)
from refine_mcore.conversion.torch_dist import CheckpointReader, Chunk, write_checkpoint
from refine_mcore.models.architecture import Architecture
from refine_mcore.models.presets import preset, preset_names
from tests.conversion.helpers import (
    HYBRIDS,
    INDEX,
    MODELS,
    WEIGHTS,
    change_config,
    change_weights,
    copy_model,
    files,
    shard,
    to_checkpoint,
    to_hf,
)

LM_HEAD, EMBEDDINGS = "lm_head.weight", "model.embeddings.weight"


def round_trip(model: Path) -> Path:
    checkpoint = to_checkpoint(model, model.parent / "checkpoint")
    return to_hf(checkpoint, model.parent / "exported")


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_byte_identical(golden, tmp_path, name: str) -> None:
    model = copy_model(golden, name, tmp_path / "model")
    assert files(round_trip(model)) == files(model)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("name", ["gated_deltanet", "lact_lowrank_momentum"])
def test_dtype_is_kept(golden, tmp_path, name: str, dtype: torch.dtype) -> None:
    model = copy_model(golden, name, tmp_path / "model")
    change_weights(model, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    assert files(round_trip(model)) == files(model)
    assert CheckpointReader(tmp_path / "checkpoint").dtype("output_layer.weight") == dtype


def test_mixed_dtypes(golden, tmp_path) -> None:
    model = copy_model(golden, "gated_deltanet", tmp_path / "model")
    change_weights(
        model, lambda ts: {k: t if "A_log" in k else t.bfloat16() for k, t in ts.items()}
    )
    assert files(round_trip(model)) == files(model)


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_shards(golden, tmp_path, name: str) -> None:
    model = copy_model(golden, name, tmp_path / "model")
    shard(model)
    exported = round_trip(model)
    assert files(exported) == files(model)
    assert len(list(exported.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("with_head", [True, False])
def test_tied_embeddings(golden, tmp_path, with_head: bool) -> None:
    model = copy_model(golden, "deltanet", tmp_path / "model")
    change_config(model, tie_word_embeddings=True)
    if with_head:
        change_weights(model, lambda ts: ts | {LM_HEAD: ts[EMBEDDINGS].clone()})
    else:
        change_weights(model, lambda ts: {k: t for k, t in ts.items() if k != LM_HEAD})
    assert files(round_trip(model)) == files(model)
    assert "output_layer.weight" not in CheckpointReader(tmp_path / "checkpoint")


def test_tokenizer_travels_and_code_does_not(golden, tmp_path) -> None:
    model = copy_model(golden, "deltanet", tmp_path / "model")
    expected = files(model)
    names = ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja")
    for name in (*names, "preprocessor_config.json", "video_preprocessor_config.json"):
        expected[name] = name.encode()
        (model / name).write_bytes(expected[name])
    for name in ("modeling.py", "pytorch_model.bin", "README.md"):
        (model / name).write_bytes(b"stays")
    assert files(round_trip(model)) == expected


def test_conversion_on_request(golden, tmp_path, capsys) -> None:
    """--dtype converts values, and config and index say so."""
    model = copy_model(golden, "lact_full_muon", tmp_path / "model")
    original = load_file(model / WEIGHTS)
    shard(model)
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    exported = to_hf(checkpoint, tmp_path / "exported", "--dtype", "bfloat16")
    assert capsys.readouterr().err.count("F32 to BF16") == 1

    index = json.loads((exported / INDEX).read_text())
    found: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        found |= load_file(exported / file)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name].bfloat16()) for name in original)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert json.loads((exported / "config.json").read_text())["torch_dtype"] == "bfloat16"


def full_tensors(checkpoint: Path, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Every tensor of the model in fp32, as Megatron's own loader reads it into two shards."""
    from megatron.core.dist_checkpointing import ShardedTensor, load

    shapes = checkpoint_shapes(hf_parameter_map(architecture))
    wanted = {}
    for key, shape in shapes.items():
        shards = 2 if shape[0] % 2 == 0 else 1
        for index in range(shards):
            target = torch.full((shape[0] // shards, *shape[1:]), float("nan"))
            wanted[f"{key}:{index}"] = ShardedTensor.from_rank_offsets(
                key, target, (0, index, shards)
            )
    loaded = load(wanted, str(checkpoint), validate_access_integrity=False)
    tensors = {}
    for key, shape in shapes.items():
        shards = 2 if shape[0] % 2 == 0 else 1
        tensors[key] = torch.cat([loaded[f"{key}:{index}"] for index in range(shards)])
        assert tensors[key].dtype == torch.float32
    return tensors


@pytest.mark.parametrize("name", [*MODELS, *HYBRIDS])
def test_megatron_loads_it(golden, tmp_path, single_rank, name: str) -> None:
    """bf16 on disk, into fp32 parameters, over other shard borders than were written."""
    model = copy_model(golden, name, tmp_path / "model")
    change_weights(model, lambda tensors: {key: t.bfloat16() for key, t in tensors.items()})
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    description = read_description(checkpoint)
    architecture = description.architecture
    config = json.loads((model / "config.json").read_text())
    assert architecture == architecture_from_hf(config, "config.json")

    tensors = full_tensors(checkpoint, architecture)
    found = to_hf_tensors(description.stored_parameters(), tensors)
    original = {k: t for k, t in load_file(model / WEIGHTS).items() if "visual" not in k}
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], original[key].float()) for key in original)


def test_megatron_splits_gate_and_up(golden, tmp_path, single_rank) -> None:
    """A second tensor-parallel rank of two gets its half of the gate rows and of the up rows."""
    from megatron.core.dist_checkpointing import ShardedTensor, load
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    model = copy_model(golden, "deltanet", tmp_path / "model")
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    weights = load_file(model / WEIGHTS)
    halves = [weights[f"model.layers.0.mlp.{name}_proj.weight"][12:] for name in ("gate", "up")]

    key = "decoder.layers.0.mlp.linear_fc1.weight"
    shard = ShardedTensor.from_rank_offsets(key, torch.zeros(24, 64), (0, 1, 2))
    wanted = {"fc1": apply_swiglu_sharded_factory(shard, ())}
    loaded = load(wanted, str(checkpoint), validate_access_integrity=False)
    assert torch.equal(loaded["fc1"], torch.cat(halves))


def test_trained_checkpoint(golden, tmp_path, single_rank, capsys) -> None:
    """Saved by Megatron: padded vocabulary, optimizer state beside it, an iteration directory."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor, save

    model = copy_model(golden, "deltanet_hybrid", tmp_path / "model")
    imported = to_checkpoint(model, tmp_path / "imported")
    architecture = read_description(imported).architecture
    tensors = {key: t + 1 for key, t in full_tensors(imported, architecture).items()}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padding = torch.full((31, architecture.hidden_size), float("nan"))
        tensors[key] = torch.cat([tensors[key], padding])
    state = {
        "model": {k: ShardedTensor.from_rank_offsets(k, t) for k, t in tensors.items()},
        "optimizer": {"m": ShardedTensor.from_rank_offsets("optimizer.m", torch.zeros(3))},
        "random": ShardedObject("rng_state", {"seed": 1}, (1,), (0,)),
        "iteration": 30,
    }
    iteration = tmp_path / "run" / "iter_0000030"
    iteration.mkdir(parents=True)
    save(state, str(iteration), content_metadata=compat.checkpoint_metadata())
    copy_description(imported, iteration, architecture)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("30\n")

    exported = to_hf(tmp_path / "run", tmp_path / "exported")

    original, found = load_file(model / WEIGHTS), load_file(exported / WEIGHTS)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[key], original[key] + 1) for key in original)
    assert (exported / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert capsys.readouterr().err == ""


def test_description_of_a_checkpoint_kept_read_only(golden, tmp_path) -> None:
    """Passed on, it can be written to and removed."""
    checkpoint = to_checkpoint(
        copy_model(golden, "deltanet", tmp_path / "model"), tmp_path / "checkpoint"
    )
    kept = [checkpoint / "hf", *(checkpoint / "hf").rglob("*")]
    for path in kept:
        path.chmod(0o555 if path.is_dir() else 0o444)
    run = tmp_path / "run"
    run.mkdir()
    copy_description(checkpoint, run, read_description(checkpoint).architecture)
    for path in kept:
        assert (run / path.relative_to(checkpoint)).stat().st_mode & 0o200
        path.chmod(0o755)
    assert read_description(run) == replace(read_description(checkpoint), hf_directory=run / "hf")


def write_random(architecture: Architecture, checkpoint: Path, dtype: torch.dtype) -> None:
    checkpoint.mkdir()
    shapes = checkpoint_shapes(hf_parameter_map(architecture))

    def chunk(key: str, shape: tuple[int, ...]) -> Chunk:
        return Chunk(key, 0, shape, dtype, lambda: torch.randn(shape, dtype=dtype))

    write_checkpoint(checkpoint, shapes, [chunk(key, shape) for key, shape in shapes.items()])


@pytest.mark.parametrize("name", [name for name in preset_names() if name.startswith("tiny-")])
def test_model_that_never_was_hf(tmp_path, name: str) -> None:
    """Its config comes from the architecture, and the result imports like any other."""
    architecture = preset(name)
    write_random(architecture, tmp_path / "checkpoint", torch.bfloat16)
    write_description(tmp_path / "checkpoint", architecture)
    exported = to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    config = json.loads((exported / "config.json").read_text())
    assert architecture_from_hf(config, "config.json") == architecture
    assert config["torch_dtype"] == "bfloat16"
    if architecture.attention is not None:  # the default of OLMo-Hybrid's class is 100277
        assert config["pad_token_id"] is None

    again = to_hf(to_checkpoint(exported, tmp_path / "imported"), tmp_path / "again")
    assert files(again) == files(exported)


def test_config_follows_a_changed_model(golden, tmp_path, capsys) -> None:
    """Trained with another window: the exported config has it, everything else is kept."""
    model = copy_model(golden, "lact_full_muon", tmp_path / "model")
    checkpoint = to_checkpoint(model, tmp_path / "checkpoint")
    longer = read_description(checkpoint).architecture.with_overrides({"mixer.window_size": 48})
    write_description(checkpoint, longer)
    exported = to_hf(checkpoint, tmp_path / "exported")
    before = json.loads((model / "config.json").read_text())
    after = json.loads((exported / "config.json").read_text())
    assert after == before | {"window_size": 48}
    assert "window_size" in capsys.readouterr().err
